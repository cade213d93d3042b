"""What the first screen of a report says, and what makes a run repeatable: numbers, sentences, commands."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from config import base, dgx, tiny
from config.batches import derive_batches
from config.validate import flatten
from ddpo.evaluation import paired_p_value
from ddpo.report.curves import mean_and_error
from ddpo.report.read import Run

SIGNIFICANT = 0.05
NO_BREAK = "\N{NO-BREAK SPACE}"
STARTS = {  # what a command may build on
    "config/base.py": base.get_config,
    "config/tiny.py": tiny.get_config,
    "config/tiny.py:mvdream": tiny.mvdream,
    "config/tiny.py:clean": tiny.clean,
    "config/dgx.py:carve3d_train": dgx.carve3d_train,
    "config/dgx.py:instant3d_grm": dgx.instant3d_grm,
    "config/dgx.py:mvdream_lgm": dgx.mvdream_lgm,
}
OF_A_FOLDER = ("run_name", "logdir", "resume_from", "report")  # keys that say where a run goes, not what it is
REWARDS = {"mrc": "MRC: minus the mean LPIPS between painted and re-rendered views, 0 would be perfect"}


@dataclass
class Change:
    """A quantity before and after, painted with the same noise, as means over captions with standard errors.

    Captions without a number before or after do not count. p: of the paired t-test, None for one caption."""

    before: float
    before_se: float
    after: float
    after_se: float
    p: float | None

    @classmethod
    def between(cls, before: Sequence[float], after: Sequence[float]) -> "Change":
        a, b = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
        both = np.isfinite(a) & np.isfinite(b)
        a, b = a[both], b[both]
        return cls(*mean_and_error(a), *mean_and_error(b), paired_p_value(b, a) if len(a) > 1 else None)

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def relative(self) -> str:
        """The difference in units of |before|, "+19.7 %"; empty if that is 0."""
        return f"{100 * self.difference / abs(self.before):+.1f} %" if self.before else ""

    @property
    def direction(self) -> str:
        """One of "rose", "fell" and "did not measurably change"."""
        if self.p is None or self.p >= SIGNIFICANT:
            return "did not measurably change"
        return "rose" if self.difference > 0 else "fell"

    @property
    def p_value(self) -> str:
        """As in "5e-07"; empty for one caption."""
        return "" if self.p is None else f"{self.p:.1g}"

    def __str__(self):
        """The relative change and its p value, for the end of a sentence: " (+19.7 %, p = 5e-07)"."""
        parts = [part for part in (self.relative, self.p_value and f"p = {self.p_value}") if part]
        return f" ({', '.join(part.replace(' ', NO_BREAK) for part in parts)})" if parts else ""


def changes(run: Run) -> dict[str, Change]:
    """{"reward": ..., judge: ...} between the first and the last validation; empty with fewer than two."""
    lines = [line for line in run.of_kind("validation") if line.get("rewards")]
    found = {}
    if len(lines) > 1 and len(lines[0]["rewards"]) == len(lines[-1]["rewards"]):
        found["reward"] = Change.between(lines[0]["rewards"], lines[-1]["rewards"])
    if len(run.comparable) > 1:
        first, last = run.comparable[0].judges, run.comparable[-1].judges
        found |= {name: Change.between(first[name], last[name]) for name in first if name in last}
    return found


def headline(run: Run, found: dict[str, Change]) -> str:
    """One sentence: what the run did to its reward on captions that it was not trained on."""
    if "reward" not in found:
        return "This run has not been validated twice yet, so there is nothing to compare."
    count = len(next(line["rewards"] for line in run.of_kind("validation") if line.get("rewards")))
    updates = len(run.of_kind("update"))
    what = f"{updates} update{'' if updates == 1 else 's'}"
    if run.is_control:
        what += " with shuffled advantages (a control: nothing can be learned from them)"
    reward = found["reward"]
    return f"After {what} the {_reward_name(run)} of {count} validation captions {reward.direction}{reward}."


def controls(runs: Sequence[Run], found: dict[str, dict[str, Change]]) -> str:
    """What the controls among several runs did, in a sentence each, or how to get one."""
    sentences = [
        f"In the control {run.name}, whose advantages were shuffled, the reward "
        f"{found[run.name]['reward'].direction}{found[run.name]['reward']}."
        for run in runs
        if run.is_control and "reward" in found[run.name]
    ]
    return " ".join(sentences) or (
        "What chance and drift do is not shown: name a run with config.shuffle_advantages = True beside this one."
    )


def agreement(found: dict[str, Change]) -> str:
    """One sentence: whether the judges, if there are any, say what the reward says."""
    if "reward" not in found:
        return ""
    judges = {name: change for name, change in found.items() if name != "reward"}
    if not judges:
        return (
            "No judge other than the reward was recorded, so whether more than the reward changed must be seen in the "
            "pictures, or be measured with python -m tools.evaluate --judge."
        )
    reward = found["reward"].direction
    directions = {name: change.direction for name, change in judges.items()}
    said = ", ".join(f"{name} {direction}" for name, direction in directions.items())
    if set(directions.values()) == {reward}:
        return f"The reward and the judges agree: the reward {reward}, and so did {_and(list(judges))}."
    return f"The reward and the judges do not agree: the reward {reward}, but {said}."


def _reward_name(run):
    return "MRC reward" if run.config.get("reward_fn", "mrc") == "mrc" else "reward"


def _and(words):
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def facts(run: Run) -> dict[str, str]:
    """What was trained, on what, how long: {name: words}."""
    epochs, config = run.of_kind("epoch"), flat(run)
    if not config:
        return {}
    seconds = sum(sum(line.get("seconds", {}).values()) for line in epochs)
    lora = f" with the LoRA {config['pretrained.lora']} fused in" if config["pretrained.lora"] else ""
    numbers = f"{config['prompts.num_train']} of " if config["prompts.num_train"] else ""
    found = {
        "painter": f"{config['painter.name']}, {config['pretrained.model']}{lora}",
        "reward": REWARDS.get(config["reward_fn"], config["reward_fn"]),
        "reconstructor": f"{config['recon.name']}, {config['recon.checkpoint']}",
        "training captions": numbers + config["prompts.train_file"],
        "validation captions": config["prompts.val_file"],
        "length": f"{len(epochs)} epochs of {config['sample.total_batch_size']} samples, "
        f"{len(run.of_kind('update'))} updates, {seconds / 60:.1f} minutes without validations",
        "seed": str(config["seed"]),
    }
    if config["reward_fn"] != "mrc":
        del found["reconstructor"]
    if epochs and epochs[-1].get("kl_mean") is not None:
        found["KL to the base model"] = f"{epochs[-1]['kl_mean']:.2e} in the last epoch"
    return found


# -- the configuration -------------------------------------------------------------------------------------------------


def flat(run: Run) -> dict[str, object]:
    """The configuration under dotted names; empty if there is none or it is no configuration of this program."""
    found = flatten(ConfigDict(run.config))
    known = flatten(base.get_config())
    return found if "per_prompt_stat_tracking" in found or known.keys() <= found.keys() | {"report"} else {}


def processes(config: dict[str, object]) -> int:
    """On how many processes a run with this (resolved) flat configuration ran."""
    per_process = config["sample.batch_size"] * config["sample.num_batches_per_epoch"]
    return max(1, config["sample.total_batch_size"] // max(1, per_process))


def differences(config: dict[str, object], start: ConfigDict) -> dict[str, object]:
    """The values of a flat configuration that `start` would not have on as many processes."""
    try:
        derive_batches(start, processes(config))
    except ValueError:
        pass  # the processes cannot share its batches, which are then differences
    other = flatten(start)
    return {key: value for key, value in config.items() if key not in other or other[key] != value}


def commands(run: Run) -> dict[str, str]:
    """{"repeat": command, "resume": command}, from the shipped configuration with the fewest differences."""
    config = flat(run)
    if not config:
        return {}
    name, changed = min(
        ((name, differences(config, start())) for name, start in STARTS.items()), key=lambda item: len(item[1])
    )
    flags = [_flag(key, value) for key, value in changed.items() if key not in OF_A_FOLDER]
    parts = [
        f"CARVE3D_PROCESSES={processes(config)}",
        "bash",
        "carve3d_train.sh",
        "--config",
        shlex.quote(name),
        *flags,
    ]
    repeat = " ".join(parts)
    return {"repeat": repeat, "resume": f"{repeat} {_flag('resume_from', str(run.folder))}"}


def _flag(key, value):
    if value is None:
        return f"--config.{key}.buffer_size=0"
    return f"--config.{key}={shlex.quote(str(value))}"
