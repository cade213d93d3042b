"""What the commands of a run leave behind, in a few words; what should be there and is not raises ValueError."""

import csv
import json
import math
from pathlib import Path

from config.batches import updates_per_epoch
from config.validate import flatten
from ddpo.checkpoint import find_checkpoint
from ddpo.evaluation import BASE
from diffusers_patch.checks import LORA_FILE


def folder(path: Path) -> str:
    """A converted checkpoint: the files in its top folder and the megabytes of all."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{', '.join(sorted(entry.name for entry in path.iterdir()))}: {size / 1e6:.1f} MB"


def experiment(file: Path) -> str:
    """The results of tools.validate_mrc."""
    results = json.loads(file.read_text())
    exact = results.pop("none")["0.0"]
    distorted = [value for strengths in results.values() for values in strengths.values() for value in values]
    _require_finite("MRC of exact views", exact)
    _require_finite("MRC of distorted views", distorted)
    return f"MRC {_mean(exact):.3f} of exact views, {_mean(distorted):.3f} of distorted ones"


def curation(out: Path, keep: int, candidates: int) -> str:
    """The ranking and the kept prompts of tools.curate_prompts."""
    kept = (out / "kept.txt").read_text().splitlines()
    with (out / "ranking.csv").open(encoding="utf-8", newline="") as file:
        ranking = list(csv.DictReader(file))
    if (len(kept), len(ranking)) != (keep, candidates):
        raise ValueError(f"{out} has {len(kept)} kept of {len(ranking)} prompts instead of {keep} of {candidates}")
    rewards = [float(row["mean_reward"]) for row in ranking]
    return f"{keep} of {candidates} prompts kept, mean rewards {rewards[0]:.3f} to {rewards[-1]:.3f}"


def batches(log: Path) -> str:
    """What tools.check_config printed of an epoch."""
    (line,) = [line for line in log.read_text().splitlines() if "samples per epoch" in line]
    return " ".join(line.split())


def training(run: Path, config, epochs: int) -> str:
    """A training run after `epochs` epochs: its metrics, its checkpoint and its final weights. config: resolved."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in ("epoch", "update", "validation")}
    updates = (epochs - 1) * updates_per_epoch(config)
    if [line["epoch"] for line in kinds["epoch"]] != list(range(epochs)) or len(kinds["update"]) != updates:
        found = f"{len(kinds['epoch'])} epochs and {len(kinds['update'])} updates"
        raise ValueError(f"{run / 'metrics.jsonl'} has {found} instead of {epochs} and {updates}")
    if [kinds["validation"][i]["epoch"] for i in (0, -1)] != [0, epochs]:
        raise ValueError(f"{run / 'metrics.jsonl'} lacks the validation before epoch 0 or after the last")
    for kind, key in (("epoch", "reward_mean"), ("update", "loss"), ("update", "grad_norm")):
        _require_finite(f"{key} of the {kind}s", [line[key] for line in kinds[kind]])
    if not all(line["grad_norm"] > 0 for line in kinds["update"]):
        raise ValueError(f"{run / 'metrics.jsonl'} has an update whose gradient is zero")
    if config.use_lora and not (run / "final" / LORA_FILE).is_file():
        raise ValueError(f"{run / 'final'} has no {LORA_FILE}")
    rewards = [line["reward_mean"] for line in kinds["validation"]]
    return (
        f"{epochs} epochs, {updates} updates, validation {rewards[0]:.4f} to {rewards[-1]:.4f}, "
        f"{find_checkpoint(run).name}, final"
    )


def evaluation(out: Path, lora: str) -> str:
    """The results of tools.evaluate for one LoRA, which must paint something else than the base."""
    models = json.loads((out / "results.json").read_text())["models"]
    mrc = [models[model]["mrc"]["mean"] for model in (BASE, lora)]
    _require_finite("MRC", mrc)
    kl = models[lora]["kl"]["mean"]
    if not (math.isfinite(kl) and kl):
        raise ValueError(f"{out / 'results.json'}: the KL of the trained LoRA to the base is {kl}")
    for name in ("table.md", "pictures.png"):
        if not (out / name).is_file():
            raise ValueError(f"{out} has no {name}")
    return f"MRC {mrc[0]:.4f} (base), {mrc[1]:.4f} (trained), KL {kl:.1e}, table.md, pictures.png"


def differences(old, new) -> list[str]:
    """The keys in which two configurations differ, as lines "KEY: OLD -> NEW"."""
    old, new = flatten(old), flatten(new)
    return [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]


def _require_finite(what, values):
    if not values or not all(value is not None and math.isfinite(value) for value in values):
        raise ValueError(f"{what}: {values} are not all finite numbers")


def _mean(values):
    return sum(values) / len(values)
