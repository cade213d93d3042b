"""What a run reports: metrics.jsonl, curves.png, pictures, lines of text, and an experiment tracker if wanted."""

import json
import math
import os
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
from scipy.stats import sem, ttest_rel

from ddpo.pictures import load_views, sample_picture, save_views
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
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
            about = json.dumps(environment(accelerator.num_processes), indent=1)
            (self.folder / "environment.json").write_text(about + "\n")

    def say(self, text: str) -> None:
        """Print a line once, not once per process."""
        self.accelerator.print(text, flush=True)

    def resume(self, epochs_done: int) -> None:
        """Drop what is run again, the epochs from `epochs_done` on and the validation before them: their metrics and
        the validations' files, which would otherwise be compared with if the resumed run is shorter than before."""
        file = self.folder / "metrics.jsonl"
        if not self.accelerator.is_main_process or not file.exists():
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
        for validation in self._validations():
            if int(validation.name.removeprefix("epoch_")) >= epochs_done:
                shutil.rmtree(validation)

    # -- the three reports of a run -----------------------------------------------------------------------------------

    def epoch(
        self,
        epoch: int,
        samples: Samples,
        prompts: Sequence[str],
        scores: dict[str, np.ndarray],
        updates: list[dict],
        learning_rate: float,
        seconds: dict[str, float],
    ) -> None:
        """Metrics of an epoch and its updates, a picture and one line of text.

        samples, prompts: of this process; scores: over all processes, see `ddpo.sampling.gather_scores`."""
        reward = scores["reward"]
        counts, edges = np.histogram(reward, bins=10)
        line = {
            **summary(scores),
            "reward_std": float(reward.std()),
            "reward_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "learning_rate": learning_rate,
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
            skipped = sum(statistics["step_skipped"] for statistics in updates)
            learning += f"  ({skipped} of {len(updates)} steps skipped: overflow in float16)" if skipped else ""
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
        reward = scores["reward"]
        line = summary(scores) | {
            "reward_standard_error": standard_error(reward),
            **{f"{name}s": scores[name].tolist() for name in ("reward", "kl") if name in scores},
        }
        self._write("validation", epochs_done, line)
        if self.accelerator.is_main_process:
            content = {"prompts": list(prompts), "rewards": line["rewards"]}
            if "lpips" in scores:  # NaN, a view compared with nothing, is null in JSON
                content["lpips"] = [[x if x == x else None for x in row] for row in scores["lpips"].tolist()]
            (self._validation(epochs_done) / "scores.json").write_text(json.dumps(content) + "\n")
            images = self._first_validation_images(self._validation(epochs_done))
            self._picture("validation", epochs_done, labelled(images), _reward_notes(reward), prompts)
        self.say(
            f"validation after {epochs_done} epochs: reward {line['reward_mean']:+.4f} +- "
            f"{line['reward_standard_error']:.4f} (standard error over {len(reward)} prompts)"
            + (f", kl {line['kl_mean']:.2e}" if "kl_mean" in line else "")
        )

    def final(self, epochs_done: int) -> None:
        """Compare the last validation with the first: a picture and the closing lines of the run."""
        if not self.accelerator.is_main_process:
            return
        self.curves()
        rewards = [np.array(line["rewards"]) for line in self.lines if line["kind"] == "validation"]
        before, after = rewards[0], rewards[-1]
        gain = after - before
        self._before_and_after(epochs_done)
        p = ttest_rel(after, before).pvalue if gain.std() > 0 else float("nan")
        self.say(
            f"\nvalidation reward before {before.mean():+.4f} +- {standard_error(before):.4f}, after "
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
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
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
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        log_picture(self.accelerator.trackers, f"samples/{kind}", picture, epoch)

    def _before_and_after(self, epochs_done):
        """samples/before_after_<epochs>.png: validation prompts, painted and re-rendered, before and after."""
        validations = {"before": self._validations()[0], "after": self._validations()[-1]}
        rows = {
            f"{label}, {when}": images
            for when, folder in validations.items()
            for label, images in labelled(self._first_validation_images(folder)).items()
        }
        before, after = (json.loads((folder / "scores.json").read_text()) for folder in validations.values())
        rewards = zip(before["rewards"], after["rewards"], strict=True)
        notes = [f"reward {a:.3f} before, {b:.3f} after" for a, b in rewards]
        self._picture("before_after", epochs_done, rows, notes, before["prompts"])

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
    return line | ({"kl_mean": float(scores["kl"].mean())} if "kl" in scores else {})


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of values (N,); 0 for a single one, which has none."""
    return float(sem(values)) if len(values) > 1 else 0.0


def _reward_notes(rewards):
    return [f"reward {value:.3f}" for value in rewards.tolist()]
