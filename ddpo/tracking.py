"""Experiment trackers, wandb or tensorboard: the numbers, pictures and the report of a run.

What belongs to an epoch is drawn over epochs, and what belongs to an update over the updates of the run. wandb's own
step can only grow, in a resumed run too, so it is left to wandb, and each number comes with its place on its axis.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from ml_collections import ConfigDict
from PIL import Image

AXES = {
    "epoch": ("epoch/*", "validation/*", "samples/*", "reward"),
    "updates": ("update/*",),
}  # axis -> what is over it


def start_tracker(accelerator: Accelerator, config: ConfigDict, folder: Path) -> None:
    """Start the tracker that `config.tracker` names, with its files in the run's folder; wandb goes on with the run
    that an earlier start in this folder began."""
    if config.tracker == "none":
        return
    accelerator.project_configuration.logging_dir = str(folder)
    flat = {}
    for key, value in config.to_dict().items():
        section = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".strip("."): "none" if one is None else one for name, one in section.items()}
    wandb_run = {"name": folder.name, "dir": str(folder), "resume": "allow"}
    if config.tracker == "wandb" and accelerator.is_main_process:
        wandb_run["id"] = wandb_id(folder)
    accelerator.init_trackers("carve3d", flat, {"wandb": wandb_run})
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if tracker.name == "wandb":
            for axis, names in AXES.items():
                for name in names:
                    tracker.run.define_metric(name, step_metric=axis)


def wandb_id(folder: Path) -> str:
    """The id of the wandb run that belongs to a run's folder, made once."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex + "\n")
    return file.read_text().strip()


def log_numbers(trackers: Sequence[GeneralTracker], numbers: dict[str, float], axis: str, place: int) -> None:
    """Numbers at `place` of an axis, see AXES."""
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.log({**numbers, axis: place})
        else:
            tracker.log(numbers, step=place)


def log_histogram(trackers: Sequence[GeneralTracker], name: str, values: np.ndarray, epoch: int) -> None:
    """A histogram, where the tracker can show one."""
    for tracker in trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Histogram(values), "epoch": epoch})
        elif tracker.name == "tensorboard":
            tracker.writer.add_histogram(name, np.asarray(values), epoch)


def log_picture(trackers: Sequence[GeneralTracker], name: str, picture: Image.Image, epoch: int) -> None:
    """A picture of an epoch."""
    for tracker in trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(picture), "epoch": epoch})
        else:
            tracker.log_images({name: np.asarray(picture)[None]}, step=epoch, dataformats="NHWC")


def log_report(trackers: Sequence[GeneralTracker], file: Path) -> None:
    """The report of a run: the page itself in wandb, the name of its file in tensorboard, which shows no pages."""
    for tracker in trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({"report": wandb.Html(file.read_text(), inject=False)})
        else:
            tracker.writer.add_text("report", str(file))
