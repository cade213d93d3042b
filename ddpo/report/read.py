"""Reading the folder of a run for its report. What is missing or damaged becomes a sentence in `problems`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config.errors import MissingFileError

OWN = ("prompts", "rewards", "lpips", "lower_is_better")  # of scores.json; any other list of N numbers is a judge's


@dataclass
class Validation:
    """One validation/epoch_XXXX/ of N captions.

    rewards: (N,), NaN for a sample that has none. views: (N, V) LPIPS between every view and its render, None where it
    was not recorded. judges: {name: (N,)}, all turned so that higher is better. pictures: {index of the caption: its
    file}."""

    epochs_done: int
    prompts: list[str]
    rewards: np.ndarray
    views: np.ndarray | None
    judges: dict[str, np.ndarray]
    pictures: dict[int, Path]


@dataclass
class Run:
    """What a run's folder holds. config: nested dicts; lines: of metrics.jsonl; environment: see
    `ddpo.setup.environment`; problems: sentences."""

    folder: Path
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    lines: list[dict] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def is_control(self) -> bool:
        """Whether nothing could be learned from its advantages."""
        return bool(self.config.get("shuffle_advantages"))

    @property
    def comparable(self) -> list[Validation]:
        """The validations on the captions of the first one."""
        return [one for one in self.validations if one.prompts == self.validations[0].prompts]

    def of_kind(self, kind: str) -> list[dict]:
        """The lines of metrics.jsonl of one kind: "epoch", "update" or "validation"."""
        return [line for line in self.lines if line["kind"] == kind]


def read_run(folder: str | Path) -> Run:
    """Read logs/<run>. Raises MissingFileError if `folder` is not the folder of a run."""
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise MissingFileError(f"{run.folder} does not exist: give the folder of a run, logs/RUN")
    if not (run.folder / "config.json").exists() and not (run.folder / "metrics.jsonl").exists():
        raise MissingFileError(
            f"{run.folder} holds neither config.json nor metrics.jsonl, so it is not the folder of a run: give logs/RUN"
        )
    run.config = _read_json(run, "config.json") or {}
    if (run.folder / "environment.json").exists():
        run.environment = _read_json(run, "environment.json") or {}
    run.lines = _read_lines(run)
    for path in sorted((run.folder / "validation").glob("epoch_*")):
        validation = _read_validation(run, path)
        if validation:
            run.validations.append(validation)
    if not run.validations:
        run.problems.append(
            f"{run.folder / 'validation'} holds no validation, so there are no pictures and no objects."
        )
    return run


def _read_json(run, name):
    """The dict in a file of the run, or None and a sentence."""
    file = run.folder / name
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except FileNotFoundError:
        run.problems.append(f"{file} is missing.")
    except ValueError as error:
        run.problems.append(f"{file} is damaged and left out ({error}).")
    return None


def _read_lines(run):
    file, lines, damaged = run.folder / "metrics.jsonl", [], []
    if not file.exists():
        run.problems.append(f"{file} is missing, so there are no curves.")
        return lines
    for number, text in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            line["kind"], line["epoch"] + 0
            lines.append(line)
        except (ValueError, KeyError, TypeError):
            damaged.append(str(number))
    if damaged:
        run.problems.append(f"{file}: what cannot be read is left out (line {', '.join(damaged)}).")
    return lines


def _read_validation(run, folder):
    try:
        scores = json.loads((folder / "scores.json").read_text())
        prompts, rewards = scores["prompts"], np.array(scores["rewards"], dtype=float)
        if not prompts or rewards.shape != (len(prompts),):
            raise ValueError(f"{len(prompts)} captions and rewards of shape {rewards.shape}")
        epochs_done = int(folder.name.removeprefix("epoch_"))
        views = np.array(scores["lpips"], dtype=float) if scores.get("lpips") else None
        if views is not None and (views.ndim != 2 or len(views) != len(prompts)):
            raise ValueError(f"lpips of shape {views.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(
            f"{folder / 'scores.json'} is missing or damaged, so this validation is left out ({error})."
        )
        return None
    lower = scores.get("lower_is_better", ())
    judges = {
        name: np.array(values, dtype=float) * (-1 if name in lower else 1)
        for name, values in scores.items()
        if name not in OWN and _is_column(values, len(prompts))
    }
    pictures = {index: folder / f"{index:04d}.png" for index in range(len(prompts))}
    pictures = {index: file for index, file in pictures.items() if file.exists()}
    if len(pictures) < len(prompts):
        run.problems.append(f"{folder} has pictures of {len(pictures)} of its {len(prompts)} captions.")
    return Validation(epochs_done, prompts, rewards, views, judges, pictures)


def _is_column(values, count):
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(x, (int, float, type(None))) for x in values)
    )
