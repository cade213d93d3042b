"""Walk the whole path of a run, from published files to the table of its evaluation, in two minutes and without a GPU.

    bash carve3d_train.sh --rehearse config/dgx.py:instant3d_grm [--config.KEY=VALUE ...]
    python -m tools.rehearse --config config/dgx.py:instant3d_grm [--config.KEY=VALUE ...]

--out   new folder for everything (logs/rehearsal_DATE)

Small random checkpoints are written in the formats of the published files, and then the commands of a real run are run
on them, each with a log of its own: the converters, tools.validate_mrc, tools.curate_prompts, tools.check_config, a
training of two processes (an epoch that fills the trackers, one with updates, two validations, checkpoints), its
resumption for another epoch, and, if it trains a LoRA, tools.evaluate. Nothing is pretended. The configuration is the
given one but for the keys that size, precision and paths must change, which are printed. At the end there is a table of
what ran; a step that fails ends the rehearsal with the last lines of its log, one sentence, and exit status 2.

Not shown by a rehearsal: that the files you download are complete; memory, speed, half precision and communication of
GPUs; gsplat and rembg; several machines; that anything is learned from random weights.
"""

import copy
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from config import cli
from config.errors import UserError
from config.validate import ROOT, check_folder, flatten, validate
from diffusers_patch.checks import check_cameras
from prompts.dataset import load_prompts
from tools.rehearsal import outcomes
from tools.rehearsal.checkpoints import write_painter, write_reconstructor, write_vae

PROCESSES = 2
DENOISING_STEPS = 4
RENDER_SIZE = 32  # pixels, as the views of the small painters
CANDIDATES, KEPT, OTHERS = 3, 2, 2  # prompts: to choose from, to train on, to validate and to evaluate on
EPOCHS = 2  # of the first training: one that fills the trackers, one with updates
TORCHRUN = "torch/distributed/elastic"  # in the first line that torchrun adds to the log of a process that failed
TAIL = 15  # lines of a log that are shown when its step fails
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
NOT_SHOWN = " ".join(__doc__.split("\n\n")[-1].split())


@dataclass(frozen=True)
class Step:
    """One command of a run, and how to see whether it did what it should.

    name: unique. module, arguments: of `python -m`. processes: started by torchrun, 0 = one without it.
    outcome: (log of the command) -> what came out in a few words; raises ValueError or OSError if that is not all.
    """

    name: str
    module: str
    arguments: Sequence[str]
    outcome: Callable[[Path], str]
    processes: int = 0

    @property
    def command(self) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        return [sys.executable, *(launcher if self.processes else []), "-m", self.module, *self.arguments]

    @property
    def shown(self) -> str:
        """The command in a few words."""
        return f"{self.processes} x {self.module}" if self.processes else self.module


###### The configuration ######


def small(config: ConfigDict, folder: Path, painter: Path, reconstructor: Path) -> dict[str, object]:
    """{key: value} of what must differ from `config` for two processes on CPUs and the small weights in `folder`.

    painter, reconstructor: what is loaded. The shape of the run stays: updates per epoch, more than one batch per
    process, training batches half as large as sampled ones. So do all keys that are not named here."""
    given, sample, train = flatten(config), config.sample, config.train
    updates = max(1, sample.total_batch_size // train.total_batch_size) if train.total_batch_size else 1
    per_update = max(1, 4 // updates) * PROCESSES
    steps = min(sample.num_steps, DENOISING_STEPS)
    skipped = min(train.skip_last_steps, steps // 2)
    trained = int((steps - skipped) * train.timestep_fraction)
    values = {
        "run_name": "run",
        "logdir": str(folder / "logs"),
        "resume_from": "",
        "num_epochs": EPOCHS,
        "stop_kl": 0.0,
        "pretrained.model": str(painter),
        "pretrained.tokenizer": "",
        "pretrained.vae": str(folder / "published" / "vae") if config.pretrained.vae else "",
        "pretrained.lora": "",
        "recon.checkpoint": str(reconstructor),
        "prompts.train_file": str(folder / "curated" / "kept.txt"),
        "prompts.val_file": str(folder / "validation.txt"),
        "prompts.test_file": str(folder / "test.txt"),
        "prompts.num_train": KEPT,
        "sample.num_steps": steps,
        "sample.total_batch_size": updates * per_update,
        "sample.batch_size": 2,
        "sample.num_batches_per_epoch": 0,
        "train.total_batch_size": per_update,
        "train.batch_size": 1,
        "train.gradient_accumulation_steps": 0,
        "train.skip_last_steps": skipped,
        "train.timestep_fraction": train.timestep_fraction if trained else 1.0,
        "train.timesteps_per_forward": min(train.timesteps_per_forward, max(1, trained)),
        "recon.render_size": RENDER_SIZE,
        # what needs a GPU, or a network that is nobody's checkpoint here
        "mixed_precision": "no" if config.mixed_precision == "fp16" else config.mixed_precision,
        "recon.dtype": "fp32" if config.recon.dtype == "fp16" else config.recon.dtype,
        "recon.device": "",
        "train.use_8bit_adam": False,
        "recon.remove_background": False,
    }
    if given.get("per_prompt_stat_tracking.buffer_size"):
        per_prompt = updates * per_update // KEPT
        values["per_prompt_stat_tracking.min_count"] = per_prompt
        values["per_prompt_stat_tracking.buffer_size"] = 3 * per_prompt
    return {key: value for key, value in values.items() if given[key] != value}


def write_prompts(config: ConfigDict, folder: Path) -> None:
    """candidates.txt, validation.txt, test.txt: the first prompts of the shipped candidates and of config's files."""
    for name, source, count in (
        ("candidates", "prompts/train_candidates.txt", CANDIDATES),
        ("validation", config.prompts.val_file, OTHERS),
        ("test", config.prompts.test_file, OTHERS),
    ):
        prompts = load_prompts(source if Path(source).exists() else ROOT / source)[:count]
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


###### The rehearsal ######


class Rehearsal:
    """One rehearsal: its checkpoints and prompts are written when it is made, its commands are run by `run`.

    config: the given configuration. config_flags: the flags that made it. folder: a new one for everything.
    execute: (command, log file) -> exit status."""

    def __init__(self, config: ConfigDict, config_flags: Sequence[str], folder: Path, execute: Callable):
        self.folder, self.execute, self.rows = folder, execute, []
        start, published = time.perf_counter(), folder / "published"
        published.mkdir(parents=True)
        (folder / "steps").mkdir()
        self.checkpoints = {
            "painter": write_painter(config, published),
            "reconstructor": write_reconstructor(config, published),
        }
        if config.pretrained.vae:
            write_vae(published)
        write_prompts(config, folder)
        files = ", ".join(sorted(entry.name for entry in published.iterdir()))
        self.report("checkpoints", "", time.perf_counter() - start, files, True)

        changes = small(config, folder, *map(self.loaded, self.checkpoints))
        self.config = copy.deepcopy(config)
        self.config.update_from_flattened_dict(changes)
        print("changed for the rehearsal: " + "; ".join(outcomes.differences(config, self.config)))
        self.flags = [*config_flags, *(f"--config.{key}={value}" for key, value in changes.items())]
        validate(self.config, PROCESSES, "cpu", check_files=False)
        check_cameras(self.config)

    def loaded(self, name: str) -> Path:
        """What the run loads: the published checkpoint "painter" or "reconstructor", or what its converter makes."""
        checkpoint = self.checkpoints[name]
        return self.folder / name if checkpoint.converter else checkpoint.path

    def steps(self) -> list[Step]:
        """The commands of a run in their order."""
        folder, flags = self.folder, self.flags
        run, curated, evaluated = folder / "logs" / "run", folder / "curated", folder / "evaluation"
        mrc, lora = folder / "validate_mrc", str(run / "final")
        candidates = ["--candidates", str(folder / "candidates.txt"), "--samples", "2", "--keep", str(KEPT)]
        evaluation = Step(
            "evaluation",
            "tools.evaluate",
            [*flags, "--lora", lora, "--samples", "2", "--pictures", "2", "--out", str(evaluated)],
            lambda log: outcomes.evaluation(evaluated, lora),
            PROCESSES,
        )
        again = [f"--config.resume_from={run}", f"--config.num_epochs={EPOCHS + 1}"]
        return [
            *(self.conversion(name) for name, checkpoint in self.checkpoints.items() if checkpoint.converter),
            Step(
                "sanity of MRC",
                "tools.validate_mrc",
                [*flags, "--objects", "2", "--out", str(mrc)],
                lambda log: outcomes.experiment(mrc / "validate.json"),
            ),
            Step(
                "curation",
                "tools.curate_prompts",
                [*flags, *candidates, "--out", str(curated)],
                lambda log: outcomes.curation(curated, KEPT, CANDIDATES),
                PROCESSES,
            ),
            Step("check", "tools.check_config", [*flags, "--processes", str(PROCESSES)], outcomes.batches),
            Step(
                "training",
                "carve3d_train",
                flags,
                lambda log: outcomes.training(run, self.config, EPOCHS),
                PROCESSES,
            ),
            Step(
                "resumption",
                "carve3d_train",
                [*flags, *again],
                lambda log: outcomes.training(run, self.config, EPOCHS + 1),
                PROCESSES,
            ),
            *([evaluation] if self.config.use_lora else []),
        ]

    def conversion(self, name: str) -> Step:
        """The step that makes of a published checkpoint the folder that is loaded."""
        module, *options = self.checkpoints[name].converter
        arguments = [str(self.checkpoints[name].path), str(self.loaded(name)), *options]
        return Step(f"conversion of the {name}", module, arguments, lambda log: outcomes.folder(self.loaded(name)))

    def run(self) -> None:
        """Every step, then the table. Raises UserError, after the table and the end of its log, if a step fails."""
        for number, step in enumerate(self.steps(), start=1):
            log = self.folder / "steps" / f"{number}_{step.name.replace(' ', '_')}.log"
            print(f"{step.name}: {step.shown} ...", flush=True)
            start = time.perf_counter()
            problem, outcome = self.attempt(step, log)
            self.report(step.name, step.shown, time.perf_counter() - start, problem or outcome, not problem)
            if problem:
                print(f"\n{self.table()}\n\nthe end of {log}:\n{tail(log)}")
                raise UserError(f"the step {step.name!r} failed: {problem} (all that it said is in {log})")
        print(f"\n{self.table()}\n\nall of it is in {self.folder}\n{NOT_SHOWN}")

    def attempt(self, step: Step, log: Path) -> tuple[str, str]:
        """(what went wrong, what came out), of which one is empty."""
        status = self.execute(step.command, log)
        if status:
            return f"its command ended with exit status {status}", ""
        try:
            return "", step.outcome(log)
        except (ValueError, OSError, KeyError, IndexError) as error:
            return f"its command ended well but not all came out ({error})", ""

    def report(self, *row) -> None:
        """Note and print (step, command, seconds, what came out, whether that is all right)."""
        self.rows.append(row)
        step, _, seconds, outcome, ok = row
        print(f"{step}: {'done' if ok else 'FAILED'} in {seconds:.0f} s: {outcome}", flush=True)

    def table(self) -> str:
        """Markdown, also written to table.md."""
        lines = ["| step | command | seconds | what came out | ok |", "| --- | --- | --- | --- | --- |"]
        for step, command, seconds, outcome, ok in self.rows:
            lines.append(f"| {step} | {command} | {seconds:.0f} | {outcome} | {'yes' if ok else 'NO'} |")
        lines.append(f"| all | | {sum(row[2] for row in self.rows):.0f} | | |")
        table = "\n".join(lines)
        (self.folder / "table.md").write_text(f"{table}\n")
        return table


def execute(command: Sequence[str], log: Path) -> int:
    """Run a command on CPUs, without the hub, with all that it says in `log`; returns its exit status."""
    threads = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **ENVIRONMENT}
    with open(log, "w") as file:
        file.write(f"{shlex.join(command)}\n\n")
        file.flush()
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode


def tail(log: Path) -> str:
    """The last lines of a log, indented, without what torchrun adds when a process has failed."""
    lines = log.read_text(errors="replace").splitlines()
    own = [i for i, line in enumerate(lines) if TORCHRUN in line]
    return "\n".join(f"    {line}" for line in lines[: own[0] if own else None][-TAIL:])


def given_flags() -> list[str]:
    """The flags of this command line that make its configuration."""
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    return ["--config", config_flags.get_config_filename(flag), *(f"--config.{k}={v}" for k, v in overrides.items())]


def define_flags() -> None:
    flags.DEFINE_string("out", "", "New folder for everything.")


def main(args) -> None:
    """args: the parsed flags."""
    folder = Path(args.out or f"logs/rehearsal_{datetime.now():%Y%m%d_%H%M%S}")
    if folder.exists():
        raise UserError(f"--out is {str(folder)!r}, which exists: name a new folder")
    check_folder("--out", folder)
    Rehearsal(args.config, given_flags(), folder, execute).run()


if __name__ == "__main__":
    cli.run("rehearse", main, "config/dgx.py:instant3d_grm", define_flags)
