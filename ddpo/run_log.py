"""What a run reports: metrics.jsonl, curves.png, pictures, lines of text, and an experiment tracker if wanted."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from scipy.stats import sem

from config.errors import UserError
from ddpo.evaluation import JUDGES, paired_p_value
from ddpo.files import append_whole, remove_partial, whole, write_whole
from ddpo.pictures import load_views, sample_picture, save_views
from ddpo.run_folder import OpenRun, replaced_later, set_aside
from ddpo.sampling import Samples
from ddpo.setup import environment
from ddpo.tracking import log_histogram, log_numbers, log_picture, log_report

CURVES = {  # curves.png: title -> (kind of line, key)
    "reward of the samples": ("epoch", "reward_mean"),
    "reward on validation prompts": ("validation", "reward_mean"),
    "KL to the base model": ("epoch", "kl_mean"),
    "samples with an empty view": ("epoch", "reward/empty_views"),
    "foreground area": ("epoch", "reward/foreground"),
    "gradient norm": ("update", "grad_norm"),
}
ROWS = {"views": "painted", "renders": "re-rendered"}  # images of a sample -> their label in pictures


class RunLog:
    """The reports of one run in `folder`, written by the main process; the others are silent."""

    def __init__(self, folder: Path, accelerator: Accelerator, config: ConfigDict):
        self.folder, self.accelerator, self.config = Path(folder), accelerator, config
        self.lines = []  # of metrics.jsonl

    def start(self, epochs_done: int, finished: bool, opened: OpenRun) -> None:
        """Begin the reports of a run, or of one that resumes after `epochs_done` epochs.

        finished: it has no epochs left to do. What a resumed run will replace by something else is kept in a branch.
        The metrics and validations of epochs that are only run again are dropped: they would otherwise be compared
        with if the resumed run is shorter than before."""
        if not self.accelerator.is_main_process:
            return
        remove_partial(self.folder)
        if opened.checkpoint:
            changes = "".join(f"\n  {change}" for change in opened.changes)
            self.say(f"resumed from {opened.checkpoint}, {epochs_done} epochs done{changes}")
            replaced = replaced_later(self.folder, epochs_done, finished)
            if replaced:
                self.say(f"what was made after {epochs_done} epochs is now in {set_aside(self.folder, replaced)}")
        write_whole(self.folder / "config.json", self.config.to_json_best_effort(indent=1))
        about = environment(self.accelerator.num_processes)
        write_whole(self.folder / "environment.json", json.dumps(about, indent=1))
        self._drop_from(epochs_done)
        self._say_what_is_missing(epochs_done)

    def say(self, text: str) -> None:
        """Print a line once, not once per process."""
        self.accelerator.print(text, flush=True)

    def _drop_from(self, epochs_done):
        """Drop metrics of the epochs from `epochs_done` on, and the validation before them."""
        file = self.folder / "metrics.jsonl"
        for text in file.read_text().splitlines() if file.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # a line cut short when the run was killed; its epoch is run again
            if line["epoch"] < epochs_done:
                self.lines.append(line)
        if file.exists():
            with whole(file) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        for validation in self._validations():
            if int(validation.name.removeprefix("epoch_")) >= epochs_done:
                shutil.rmtree(validation)

    def _say_what_is_missing(self, epochs_done):
        """A run can go on without its metrics and validations, but its report will be less than it was."""
        seen = {(line["kind"], line["epoch"]) for line in self.lines}
        missing = [epoch for epoch in range(epochs_done) if ("epoch", epoch) not in seen]
        if missing:
            self.say(
                f"{self.folder / 'metrics.jsonl'} lacks {len(missing)} of the {epochs_done} epochs done, the first is "
                f"{missing[0]}: put the file back and resume again, or curves.png will lack them too"
            )
        if epochs_done and ("validation", 0) not in seen:
            self.say("  and the validation before training: the gain will be counted from the first that is there")
        for _, epoch in sorted(key for key in seen if key[0] == "validation"):
            folder = self._validation(epoch)
            if not (folder / "scores.json").exists():
                self.say(f"{folder} is missing: its rewards are in metrics.jsonl, its pictures will not be shown")

    # -- the three reports of a run -----------------------------------------------------------------------------------

    def epoch(
        self,
        epoch: int,
        samples: Samples,
        prompts: Sequence[str],
        scores: dict[str, np.ndarray],
        updates: list[dict],
        seconds: dict[str, float],
    ) -> None:
        """Metrics of an epoch and its updates, a picture and one line of text.

        samples, prompts: of this process; scores: of all processes' samples that are not bad, see
        `ddpo.sampling.gather_scores`."""
        reward = scores["reward"]
        counts, edges = np.histogram(reward, bins=10)
        line = {
            **summary(scores),
            "reward_std": float(reward.std()),
            "reward_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "learning_rate": updates[-1]["learning_rate"] if updates else None,
            "seconds": seconds,
        }
        self._write("epoch", epoch, line)
        if self.accelerator.is_main_process:
            log_histogram(self.accelerator.trackers, "reward", reward, epoch)
        for i, statistics in enumerate(updates):
            self._write("update", epoch, {"update": i, **statistics})
        self._picture("epoch", epoch, labelled(samples.images), _reward_notes(samples.reward), prompts)

        learning = "(fills the trackers, no update)"
        if updates:
            learning = f"loss {updates[-1]['loss']:+.4f}  grad {updates[-1]['grad_norm']:.2e}"
            if "beyond_chance" in updates[-1]:
                share, deviations = (updates[-1][name] for name in ("beyond_chance", "deviations_above_chance"))
                learning += f"  beyond chance {share:.2f} ({deviations:+.1f} sd)"
            skipped = sum(statistics["step_skipped"] for statistics in updates)
            learning += f"  ({skipped} of {len(updates)} steps skipped: gradient not finite)" if skipped else ""
        times = " ".join(f"{name} {value:.1f}s" for name, value in seconds.items())
        self.say(
            f"epoch {epoch:3d}  reward {reward.mean():+.4f} +- {reward.std():.4f}  kl {line.get('kl_mean', 0.0):.2e}  "
            f"{learning}  {times}"
        )

    def validation_images(self, epochs_done: int, indices: Sequence[int], images: dict[str, torch.Tensor]) -> None:
        """Write validation/epoch_XXXX/NNNN.png of this process's samples: painted views over re-rendered ones.

        indices: NNNN, the prompts' places in the file of validation prompts; images: see `ddpo.sampling.Samples`."""
        folder = self._validation(epochs_done)
        folder.mkdir(parents=True, exist_ok=True)
        for n, index in enumerate(indices):
            save_views({name: value[n] for name, value in images.items()}, folder / f"{index:04d}.png")

    def validation(self, epochs_done: int, scores: dict[str, np.ndarray], prompts: Sequence[str]) -> None:
        """Metrics of a validation, also as validation/epoch_XXXX/scores.json, a picture and one line of text.

        scores: over all processes, see `ddpo.sampling.gather_uneven_scores`."""
        reward, good = scores["reward"], np.isfinite(scores["reward"])
        if not good.any():
            raise UserError(
                f"no validation prompt got a reward that is a number after {epochs_done} epochs: look at "
                f"{self._validation(epochs_done)}, and choose a more precise mixed_precision or an earlier checkpoint"
            )
        line = summary({name: value[good] for name, value in scores.items()}) | {
            "reward_standard_error": standard_error(reward[good]),
            **{f"{name}s": numbers_or_none(scores[name]) for name in ("reward", "kl") if name in scores},
        }
        self._write("validation", epochs_done, line)
        if self.accelerator.is_main_process:
            content = {"prompts": list(prompts), "rewards": line["rewards"]}
            if "lpips" in scores:  # NaN, a view compared with nothing, is null in JSON
                content["lpips"] = [[x if x == x else None for x in row] for row in scores["lpips"].tolist()]
            judges = {name: numbers_or_none(scores[name]) for name in JUDGES if name in scores}
            content |= judges | {"lower_is_better": list(judges)}
            write_whole(self._validation(epochs_done) / "scores.json", json.dumps(content))
            images = self._first_validation_images(self._validation(epochs_done))
            self._picture("validation", epochs_done, labelled(images), _reward_notes(reward), prompts)
        self.say(
            f"validation after {epochs_done} epochs: reward {line['reward_mean']:+.4f} +- "
            f"{line['reward_standard_error']:.4f} (standard error over {good.sum()} prompts)"
            + (f", kl {line['kl_mean']:.2e}" if "kl_mean" in line else "")
        )
        if not good.all():
            self.say(
                f"{(~good).sum()} of {len(good)} validation prompts got NaN or infinite numbers and are not counted, "
                f"the first is {prompts[int(good.argmin())]!r}"
            )

    def final(self) -> None:
        """Compare the last validation with the first: a picture and the closing lines of the run."""
        if not self.accelerator.is_main_process:
            return
        self.curves()
        first, last = [[line for line in self.lines if line["kind"] == "validation"][i] for i in (0, -1)]
        before, after = (np.array(line["rewards"], dtype=float) for line in (first, last))
        both = np.isfinite(before) & np.isfinite(after)
        before, after = before[both], after[both]
        gain = after - before
        self._before_and_after(first, last)
        p = paired_p_value(after, before) if len(gain) > 1 else float("nan")
        start = f" ({first['epoch']} epochs)" if first["epoch"] else ""
        self.say(
            f"\nvalidation reward before{start} {before.mean():+.4f} +- {standard_error(before):.4f}, after "
            f"{after.mean():+.4f} +- {standard_error(after):.4f}: {100 * gain.mean() / abs(before.mean()):+.1f} % "
            f"(paired t-test over {len(gain)} prompts: p = {p:.1e})\n"
            f"the weights are in {self.folder / 'final'}, curves and pictures in {self.folder}"
        )

    def report(self, file: Path) -> None:
        """Say where the report of the run is, and give it to the tracker."""
        self.say(f"the report is {file}: open it in a browser")
        log_report(self.accelerator.trackers, file)

    def curves(self) -> None:
        """Draw curves.png from all metrics so far."""
        if not self.accelerator.is_main_process or not self.lines:
            return
        figure, axes = plt.subplots(2, 3, figsize=(13, 6))
        # as a constrained layout would place them, which draws everything twice
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.08, top=0.95, wspace=0.2, hspace=0.35)
        for axis, (title, (kind, key)) in zip(axes.flat, CURVES.items(), strict=True):
            lines = [line for line in self.lines if line["kind"] == kind and line.get(key) is not None]
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            if not lines:
                axis.text(0.5, 0.5, "nothing yet", ha="center", transform=axis.transAxes, color="gray")
                continue
            x, y = [line["epoch"] for line in lines], [line[key] for line in lines]
            axis.plot(x, y, marker="o", markersize=3)
            if kind == "validation":
                axis.errorbar(x, y, yerr=[line["reward_standard_error"] for line in lines], fmt="none", capsize=3)
        with whole(self.folder / "curves.png") as partial:
            figure.savefig(partial, dpi=100)
        plt.close(figure)

    # -- where reports go ---------------------------------------------------------------------------------------------

    def _write(self, kind, epoch, values):
        """One line of metrics.jsonl; kind is "epoch", "update" or "validation"."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no infinity: a gradient that overflowed in float16 is null
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {"kind": kind, "epoch": epoch, **values}
        self.lines.append(line)
        append_whole(self.folder / "metrics.jsonl", json.dumps(line, allow_nan=False))
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        axis, place = ("updates", self._count("update")) if kind == "update" else ("epoch", epoch)
        log_numbers(self.accelerator.trackers, numbers, axis, place)

    def _count(self, kind):
        return sum(line["kind"] == kind for line in self.lines)

    def _picture(self, kind, epoch, rows, notes, captions):
        """samples/<kind>_<epoch>.png of the first `sample.save_images` objects; rows: label -> uint8 views."""
        shown = self.config.sample.save_images
        if not shown or not rows or not self.accelerator.is_main_process:
            return
        picture = sample_picture({label: row[:shown] / 255 for label, row in rows.items()}, notes, captions)
        file = self.folder / "samples" / f"{kind}_{epoch:04d}.png"
        with whole(file) as partial:
            picture.save(partial)
        log_picture(self.accelerator.trackers, f"samples/{kind}", picture, epoch)

    def _before_and_after(self, first, last):
        """samples/before_after_<epochs>.png: validation prompts, painted and re-rendered, at two validations.

        first, last: their lines of the metrics."""
        folders = {"before": self._validation(first["epoch"]), "after": self._validation(last["epoch"])}
        images = {when: labelled(self._first_validation_images(folder)) for when, folder in folders.items()}
        if not all(images.values()):  # not wanted, or removed by somebody, which was said
            return
        rows = {f"{label}, {when}": row for when, of_time in images.items() for label, row in of_time.items()}
        rewards = zip(first["rewards"], last["rewards"], strict=True)
        notes = [f"reward {_short(before)} before, {_short(after)} after" for before, after in rewards]
        prompts = json.loads((folders["after"] / "scores.json").read_text())["prompts"]
        self._picture("before_after", last["epoch"], rows, notes, prompts)

    def _validation(self, epochs_done):
        return self.folder / "validation" / f"epoch_{epochs_done:04d}"

    def _validations(self):
        """The folders of all validations so far, oldest first."""
        return sorted((self.folder / "validation").glob("epoch_*"))

    def _first_validation_images(self, folder):
        """The first `sample.save_images` samples of a validation: as `Samples.images`."""
        files = sorted(folder.glob("*.png"))[: self.config.sample.save_images]
        samples = [load_views(file) for file in files]
        return {name: torch.stack([sample[name] for sample in samples]) for name in (samples[0] if samples else ())}


def labelled(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Images of samples under the labels that they have in pictures."""
    return {ROWS[name]: value for name, value in images.items()}


def summary(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """The numbers that epochs and validations share, from the scores of all samples."""
    line = {
        "reward_mean": float(scores["reward"].mean()),
        "reward/empty_views": float(scores["empty"].any(1).mean()),
        "reward/foreground": float(scores["foreground"].mean()),
    }
    further = {f"judge/{name}": float(np.nanmean(scores[name])) for name in JUDGES if name in scores}
    return line | further | ({"kl_mean": float(scores["kl"].mean())} if "kl" in scores else {})


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of values (N,); 0 for a single one, which has none."""
    return float(sem(values)) if len(values) > 1 else 0.0


def numbers_or_none(values: np.ndarray) -> list[float | None]:
    """Values (N,) for JSON, which has neither NaN nor infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _short(reward):
    return "not a number" if reward is None else f"{reward:.3f}"


def _reward_notes(rewards):
    return [f"reward {value:.3f}" for value in rewards.tolist()]
