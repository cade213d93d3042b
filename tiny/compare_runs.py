"""Compare several runs: `python -m tiny.compare_runs logs/a logs/b ... --out curves.png`.

Evaluates every run as tiny/evaluate.py does, prints a table with one row for each, and plots their rewards: on the
training samples epoch by epoch, and on the validation captions with standard errors.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from config.cli import one_sentence
from config.errors import MissingFileError, UserError
from config.validate import check_file
from tiny.classifier import Classifier
from tiny.evaluate import evaluate_run, relative_change

HEADER = (
    "| run | reward before | after | change | p | defective before | after | good ones broken | foreground | colours "
    "| classifier |"
)


def row(name: str, result: dict) -> str:
    """A row of the Markdown table under HEADER, from a result of `evaluate_run`.

    Changes of reward and foreground are relative, those of colours and classifier in percentage points."""
    reward, defective = result["reward"], result["defective"]
    broken = result["good_grids_broken"]
    points = [
        f"{100 * result[key]['difference']:+.1f} ± {100 * result[key]['difference_se']:.1f}"
        for key in ("colours", "classifier")
    ]
    cells = [
        name,
        f"{reward['before']:.3f} ± {reward['before_se']:.3f}",
        f"{reward['after']:.3f} ± {reward['after_se']:.3f}",
        relative_change(reward),
        f"{reward['p']:.1g}",
        f"{100 * defective['before']:.0f} %",
        f"{100 * defective['after']:.0f} %",
        f"{broken['count']} of {broken['of']}",
        relative_change(result["foreground"]),
        *points,
    ]
    return f"| {' | '.join(cells)} |"


def read_metrics(run: Path) -> list[dict]:
    """The lines of `run`/metrics.jsonl. Raises FileNotFoundError, or ValueError for a line that is not JSON."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; give the folder of a run of carve3d_train.py.")
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise UserError(f"Line {number} of {file} is not JSON ({error}); resume the run to repair it.") from error
    return lines


def plot(runs: list[Path], file: str | Path) -> None:
    """Plot the rewards of all runs, on training samples (left) and validation captions (right), into `file`."""
    figure, (epochs, validations) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for run in runs:
        lines = read_metrics(run)
        sampled = [line for line in lines if line["kind"] == "epoch"]
        validated = [line for line in lines if line["kind"] == "validation"]
        epochs.plot([line["epoch"] for line in sampled], [line["reward_mean"] for line in sampled], label=run.name)
        validations.errorbar(
            [line["epoch"] for line in validated],
            [line["reward_mean"] for line in validated],
            yerr=[line["reward_standard_error"] for line in validated],
            capsize=3,
            label=run.name,
        )
    epochs.set(title="training samples", xlabel="epoch", ylabel="reward")
    validations.set(title="validation captions", xlabel="epochs done")
    figure.legend(*epochs.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command; arguments: None for those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, logs/<run>")
    parser.add_argument("--out", default="curves.png", help="file for the plot")
    args = parser.parse_args(arguments)
    check_file("--out", args.out)
    classifier = Classifier.from_pretrained()
    rows = [row(run.name, evaluate_run(run, classifier=classifier)) for run in args.runs]
    print("\n".join([HEADER, "|" + " --- |" * (HEADER.count("|") - 1), *rows]))
    plot(args.runs, args.out)


if __name__ == "__main__":
    with one_sentence("tiny.compare_runs"):
        main()
