"""What a run leaves to look at: metrics.jsonl, curves.png, pictures, and an external tracker if wanted."""

import json
import math
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

CURVES = {  # curves.png: title -> (kind of line, key)
    "reward of the samples": ("epoch", "reward_mean"),
    "reward on validation prompts": ("validation", "reward_mean"),
    "KL to the base model": ("epoch", "kl_mean"),
    "samples with an empty view": ("epoch", "reward/empty_views"),
    "foreground area": ("epoch", "reward/foreground"),
    "gradient norm": ("update", "grad_norm"),
}
SIDE = (96, 256)  # about the smallest and the largest side in pixels of a view in a picture


class RunLog:
    """Writes into `folder` on the main process and is silent on the others."""

    def __init__(self, folder, accelerator, config):
        self.folder, self.accelerator = Path(folder), accelerator
        self.main = accelerator.is_main_process
        self.lines = []
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")

    def resume(self, epochs_done):
        """Forget what is run again, the epochs from `epochs_done` on and the validation before them: their lines, and
        the validations' files, which a run of fewer epochs than before would else take for its own."""
        file = self.folder / "metrics.jsonl"
        if not self.main or not file.exists():
            return
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # a line cut short when the run was killed; its epoch is run again
            if line["epoch"] < epochs_done:
                self.lines.append(line)
        partial = self.folder / "metrics.tmp"
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(partial, file)
        for validation in (self.folder / "validation").glob("epoch_*.npz"):
            if int(validation.stem.removeprefix("epoch_")) >= epochs_done:
                validation.unlink()

    def write(self, kind, epoch, values):
        """One line of metrics; kind is "epoch", "update" or "validation"."""
        if not self.main:
            return
        # JSON has no infinity: a gradient that overflowed in float16 is null
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {"kind": kind, "epoch": epoch, **values}
        self.lines.append(line)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=epoch)

    def histogram(self, name, values, epoch):
        """A histogram in the external tracker, where it can show one."""
        if not self.main:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                import wandb

                tracker.log({name: wandb.Histogram(values)}, step=epoch)
            elif tracker.name == "tensorboard":
                tracker.writer.add_histogram(name, np.asarray(values), epoch)

    def picture(self, kind, epoch, picture):
        """Save a PIL picture as samples/<kind>_<epoch>.png and show it in the tracker."""
        file = self.folder / "samples" / f"{kind}_{epoch:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"samples/{kind}": np.asarray(picture)[None]}, step=epoch, **layout)

    def curves(self):
        """Draw curves.png from all lines so far."""
        if not self.main or not self.lines:
            return
        figure, axes = plt.subplots(2, 3, figsize=(13, 6), constrained_layout=True)
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
        figure.savefig(self.folder / "curves.tmp.png", dpi=100)
        plt.close(figure)
        os.replace(self.folder / "curves.tmp.png", self.folder / "curves.png")


def sample_picture(rows, notes, captions, columns=4):
    """Rows of views object by object, such as painted views over re-rendered views, under caption and note: a PIL
    image.

    rows: what a row shows, written into it -> its views (N, V, 3, S, S) in [0, 1]; notes, captions: N strings."""
    N, V, _, _, S = next(iter(rows.values())).shape
    side = min(S * max(1, round(SIDE[0] / S)), SIDE[1])
    width, height, text = V * side, len(rows) * side, 26
    columns = min(columns, N)
    canvas = Image.new("RGB", (columns * (width + 8), -(-N // columns) * (height + text + 8)), "white")
    draw = ImageDraw.Draw(canvas)
    for n in range(N):
        x, y = (n % columns) * (width + 8), (n // columns) * (height + text + 8)
        draw.text((x + 2, y), captions[n][: width // 6], fill="black")
        draw.text((x + 2, y + 12), notes[n], fill="black")
        for r, (label, row) in enumerate(rows.items()):
            canvas.paste(_strip(row[n], side), (x, y + text + r * side))
            draw.text((x + 2, y + text + r * side), label, fill="gray")
        draw.rectangle([x - 1, y + text - 1, x + width, y + text + height], outline="lightgray")
    return canvas


def _strip(views, side):
    """Views (V, 3, S, S) in [0, 1] side by side, each `side` pixels wide: a PIL image."""
    V, _, S, _ = views.shape
    pixels = (views.permute(2, 0, 3, 1).reshape(S, V * S, 3).float().clamp(0, 1) * 255).round().byte()
    sharp = Image.Resampling.NEAREST if side >= S else Image.Resampling.BOX
    return Image.fromarray(pixels.cpu().numpy()).resize((V * side, side), sharp)
