"""Draw a sweep as the paper does: MRC against the data size, the batch size or the weight of the KL.

    python -m tools.plot_sweep logs/evaluate [FOLDER ...] --out logs/sweep.png

Each FOLDER is an --out of tools.evaluate, with one or more LoRAs; all must be made with the same painter, prompts and
samples. The horizontal axis is the key in which the LoRAs' runs differ: config.prompts.num_train,
config.train.total_batch_size or config.kl_normalized_coeff, as their runs' config.json say. Points with the same value,
such as runs with other seeds, are drawn beside the line through their mean. The error bars are standard errors over
prompts, and the gray band is the base painter.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from config.cli import one_sentence
from config.errors import MissingFileError, UserError
from config.validate import check_file
from ddpo.evaluation import SWEPT


def read_results(folders: Sequence[str | Path]) -> tuple[dict, list[dict]]:
    """(the MRC of the base painter, the entries of all LoRAs in the results.json of these folders).

    Raises FileNotFoundError, or ValueError if they cannot be compared."""
    results = []
    for folder in folders:
        file = Path(folder) / "results.json"
        if not file.is_file():
            raise MissingFileError(f"{file} does not exist: give an --out of tools.evaluate that has finished")
        try:
            found = json.loads(file.read_text())
            settings = {key: value for key, value in found["settings"].items() if key != "--lora"}
            results.append((folder, settings, found["models"].pop("base")["mrc"], found["models"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a result of tools.evaluate ({error!r}): give another folder") from error
    first, expected, base, _ = results[0]
    for folder, settings, _, _ in results[1:]:
        differing = [key for key in expected.keys() | settings.keys() if expected.get(key) != settings.get(key)]
        if differing:
            raise UserError(
                f"{first} and {folder} were made with different settings ({', '.join(sorted(differing))}): repeat "
                f"tools.evaluate with the same ones"
            )
    loras = {lora["sha256"]: {"name": name, **lora} for *_, models in results for name, lora in models.items()}
    return base, list(loras.values())


def swept_key(loras: Sequence[dict]) -> str:
    """The only key of SWEPT in which the LoRAs' runs differ. Raises ValueError if none or several do."""
    for lora in loras:
        if lora["run"] is None:
            raise UserError(
                f"{lora['name']!r} was evaluated away from the config.json of its run, so what was swept is unknown: "
                f"evaluate it where the run wrote it, logs/RUN/final"
            )
    values = {key: sorted({lora["run"][key] for lora in loras}) for key in SWEPT}
    differing = [key for key in SWEPT if len(values[key]) > 1]
    if len(differing) != 1:
        found = "; ".join(f"config.{key}: {', '.join(map(str, values[key]))}" for key in differing)
        raise UserError(
            f"the {len(loras)} LoRAs differ in {found or 'none of ' + ', '.join(f'config.{key}' for key in SWEPT)}: "
            f"give runs that differ in exactly one of these keys"
        )
    return differing[0]


def plot(base: dict, loras: Sequence[dict], file: str | Path) -> None:
    """Draw MRC against the key in which the LoRAs' runs differ; base, loras: of `read_results`."""
    key = swept_key(loras)
    points = defaultdict(list)
    for lora in loras:
        points[lora["run"][key]].append((lora["mrc"]["mean"], lora["mrc"]["se"] or 0))
    x = sorted(points)
    figure, axis = plt.subplots(figsize=(5, 3.5), constrained_layout=True)
    axis.plot(x, [np.mean([mean for mean, _ in points[value]]) for value in x], color="C0", label="finetuned")
    for value in x:
        for mean, error in points[value]:
            axis.errorbar(value, mean, yerr=error, color="C0", marker="o", capsize=3)
    error = base["se"] or 0
    axis.axhspan(base["mean"] - error, base["mean"] + error, color="gray", alpha=0.3, label="base")
    axis.axhline(base["mean"], color="gray")
    if min(x) > 0 and max(x) / min(x) > 4:  # sizes that double
        axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
    axis.set(xlabel=f"{SWEPT[key]} (config.{key})", ylabel="MRC (lower is better)")
    axis.grid(alpha=0.3)
    axis.legend()
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command; arguments: None for those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders that tools.evaluate wrote")
    parser.add_argument("--out", default="logs/sweep.png", help="picture to write")
    args = parser.parse_args(arguments)
    check_file("--out", args.out)
    plot(*read_results(args.folders), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with one_sentence("plot_sweep"):
        main()
