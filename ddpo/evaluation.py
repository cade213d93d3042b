"""What an evaluation keeps and reports: the numbers of every sample, from which it can resume, and their statistics.

Samples are counted through, first all of the first prompt: sample i is the (i % samples)-th of prompt i // samples.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from scipy.stats import sem, ttest_rel

from config.errors import UserError
from config.validate import flatten
from ddpo.files import write_whole

BASE = "base"  # the model without a LoRA, with which the others are compared
SWEPT = {  # the keys that the paper's sweeps change, in words
    "prompts.num_train": "training prompts",
    "train.total_batch_size": "samples per update",
    "kl_normalized_coeff": "weight of the KL",
}
JUDGES = {"silhouettes": "silhouettes ↓", "held_out": "held-out view ↓", "judge": "judge ↓", "met3r": "MEt3R ↓"}
PRICES = {"diversity": "diversity ↑", "clip": "CLIP ↑"}  # what consistency may be paid for with, which no judge minds
FURTHER = {**JUDGES, **PRICES}  # columns of the table that there may be
PAID = 0.01  # p value below which a fall of one of PRICES is told
# The keys, and beginnings of keys, that samples and their rewards depend on, and those among them that change nothing,
# so that they may be lowered if memory is short.
RELEVANT = ("painter.", "pretrained.", "sample.", "recon.", "mrc.", "mixed_precision", "allow_tf32")
IRRELEVANT = (
    "sample.total_batch_size",
    "sample.batch_size",
    "sample.num_batches_per_epoch",
    "sample.decode_batch_size",
    "sample.save_images",
    "recon.chunk_size",
    "recon.device",
)


def relevant_keys(config: ConfigDict, *further: str) -> dict[str, object]:
    """{"config.KEY": value} of all keys that samples and their rewards depend on; further: others, or beginnings."""
    keys = {key: value for key, value in flatten(config).items() if key.startswith((*RELEVANT, *further))}
    return {f"config.{key}": value for key, value in keys.items() if key not in IRRELEVANT}


class Parts:
    """The samples' numbers in a folder to which every process adds, and from which a killed evaluation resumes.

    settings: what the numbers depend on (JSON values). Raises ValueError if the folder was made with other ones."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings, self.file = folder, json.loads(json.dumps(settings)), None
        self.settings_file = folder / "settings.json"
        found = json.loads(self.settings_file.read_text()) if self.settings_file.exists() else self.settings
        differing = sorted(key for key in {*found, *self.settings} if found.get(key) != self.settings.get(key))
        if differing:
            raise UserError(
                f"{folder} belongs to an evaluation with other settings ({', '.join(differing)}): give another --out, "
                f"or remove that folder to start again"
            )

    def rows(self) -> dict[tuple[str, int], dict[str, float]]:
        """{(model, sample): its numbers} of all processes. A line that was being written when its process was killed
        does not count."""
        rows = {}
        for file in sorted(self.folder.glob("process_*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                rows[row.pop("model"), row.pop("sample")] = row
        return rows

    def open(self, process: int) -> None:
        """Begin to add, as the process of that number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if process == 0:
            write_whole(self.settings_file, json.dumps(self.settings, indent=1))
        self.file = (self.folder / f"process_{process:04d}.jsonl").open("a")
        self.file.write("\n")  # ends a line that was not finished when an earlier process was killed

    def add(self, model: str, samples: Sequence[int], values: dict[str, torch.Tensor]) -> None:
        """The numbers of B samples, values {name: (B,)}; they are on disk when this returns.

        Raises ValueError for a number that is not finite."""
        columns = {"sample": samples, **{name: value.tolist() for name, value in values.items()}}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        try:
            text = "".join(json.dumps({"model": model, **row}, allow_nan=False) + "\n" for row in rows)
        except ValueError:
            raise UserError(
                f"a number of {model!r} is not finite ({rows}): check its LoRA, the reconstructor and mixed_precision"
            ) from None
        self.file.write(text)
        self.file.flush()

    def picture(self, model: int, sample: int) -> Path:
        """File of the images of a sample by the model of that number."""
        return self.folder / f"model_{model:03d}_sample_{sample:06d}.png"


def batches(prompts: int, samples: int, size: int) -> list[list[int]]:
    """All samples in batches of at most `size`, about equally large, those of a prompt together if they fit.

    They do not depend on the number of processes, and so neither does the rounding of the networks."""
    order = np.arange(prompts * samples).reshape(-1, samples if samples <= size else 1)  # rows that stay together
    parts = np.array_split(order, -(-len(order) // (size // order.shape[1])))
    return [part.flatten().tolist() for part in parts]


def statistics(values: np.ndarray, base: np.ndarray | None = None) -> dict[str, float | None]:
    """Mean of values (prompts, samples) and its standard error over prompts; None if there is only one prompt.

    base: the same of the base model, painted with the same noise. Then also the difference to it, its standard error,
    the relative difference (None if the base's mean is 0) and the p value of a paired t-test over prompts."""
    values = values.mean(1)  # first, because the samples of a prompt are not independent
    several = len(values) > 1
    result = {"mean": float(values.mean()), "se": float(sem(values)) if several else None}
    if base is not None:
        base = base.mean(1)
        difference = values - base
        result |= {
            "difference": float(difference.mean()),
            "difference_se": float(sem(difference)) if several else None,
            "relative": float(difference.mean() / abs(base.mean())) if base.mean() else None,
            "p": paired_p_value(values, base) if several else None,
        }
    return result


def paired_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p value of the paired t-test of (N,) and (N,), N >= 2.

    1 if they are equal and 0 if they differ by a constant, where scipy would divide by zero."""
    a, b = np.asarray(a), np.asarray(b)
    if np.ptp(a - b) == 0:
        return float(a[0] == b[0])
    return float(ttest_rel(a, b).pvalue)


def summarise(
    rows: dict[tuple[str, int], dict], models: dict[str, dict], num_prompts: int, samples: int
) -> dict[str, dict]:
    """{model: what `models` says of it, {quantity: its `statistics`}, and all numbers (prompts, samples) in "samples"}.

    rows: see `Parts.rows`; models: BASE is the first of them. A quantity that not all rows have, because batches were
    made smaller between them, is left out."""
    quantities = [name for name in rows[BASE, 0] if all(name in row for row in rows.values())]
    summary, base = {}, {}
    for model, about in models.items():
        in_order = [rows[model, i] for i in range(num_prompts * samples)]
        values = {name: np.array([row[name] for row in in_order]).reshape(num_prompts, samples) for name in quantities}
        numbers = {name: statistics(value, base.get(name)) for name, value in values.items()}
        summary[model] = {**about, **numbers, "samples": {name: value.tolist() for name, value in values.items()}}
        base = base or values
    return summary


def improved(summary: dict[str, dict]) -> dict[str, dict]:
    """The models that MRC calls better than the base model, and their results. summary: see `summarise`."""
    others = ((model, result) for model, result in summary.items() if model != BASE)
    return {model: result for model, result in others if result["mrc"]["difference"] < 0}


def doubtful(summary: dict[str, dict]) -> dict[str, list[str]]:
    """{model: the judges by which it is no better than the base model}, where MRC calls it better and two judges do
    not: a reward that rises alone was probably deceived. summary: see `summarise`."""
    found = {}
    for model, result in improved(summary).items():
        against = [name for name in JUDGES if name in result and result[name]["difference"] >= 0]
        if len(against) >= 2:
            found[model] = against
    return found


def paid(summary: dict[str, dict]) -> dict[str, list[str]]:
    """{model: the PRICES that it paid, "name (change)"}, where MRC calls it better and one of them is worse than of the
    base model with p < PAID: pictures that have grown alike, or vague, are consistent. summary: see `summarise`."""
    found = {}
    for model, result in improved(summary).items():
        worse = [name for name in PRICES if name in result and result[name]["difference"] < 0]
        seen = [name for name in worse if result[name]["p"] is not None and result[name]["p"] < PAID]
        if seen:
            found[model] = [f"{name} ({_change(result[name])})" for name in seen]
    return found


def table(summary: dict[str, dict]) -> str:
    """Markdown: one row for each model in what `summarise` returned."""
    further = [name for name in FURTHER if name in summary[BASE]]
    header = ["painter", "MRC ↓", "difference", "p", "KL", "foreground", "empty", *(FURTHER[name] for name in further)]
    lines = [header, ["---"] * len(header)]
    for model, result in summary.items():
        mrc, empty = result["mrc"], f"{100 * result['empty']['mean']:.1f} %"
        cells = [_mean(result[name]) for name in further]
        if model == BASE:
            lines.append([model, _mean(mrc), "", "", "", "", empty, *cells])
            continue
        p = "" if mrc["p"] is None else f"{mrc['p']:.1g}"
        relative = result["foreground"]["relative"]
        foreground = "" if relative is None else f"{100 * relative:+.1f} %"
        cells = [f"{cell} ({_change(result[name])})" for cell, name in zip(cells, further, strict=True)]
        kl = f"{result['kl']['mean']:.1e}"
        lines.append([model, _mean(mrc), _change(mrc), p, kl, foreground, empty, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(numbers):
    return f"{numbers['mean']:.3f}" + ("" if numbers["se"] is None else f" ± {numbers['se']:.3f}")


def _change(numbers):
    error = numbers["difference_se"]
    return f"{numbers['difference']:+.3f}" + ("" if error is None else f" ± {error:.3f}")
