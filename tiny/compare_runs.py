"""Several runs side by side: `python -m tiny.compare_runs logs/a logs/b ... --out curves.png`.

Judges every run as tiny/evaluate.py does, prints one row for each, and draws their rewards: epoch by epoch, and on the
validation captions with standard errors. For seeds beside their controls.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tiny.classifier import Classifier
from tiny.evaluate import evaluate_run

HEADER = (
    "| run | reward before | after | change | p | defective before | after | good ones broken | foreground | colours "
    "| classifier |"
)


def row(name, result):
    """A line of a markdown table; percentages of the reward and foreground are relative, of the rest are points."""
    reward, defective = result["reward"], result["defective"]
    broken = result["good_grids_broken"]
    points = [
        f"{100 * result[key]['difference']:+.1f} ± {100 * result[key]['difference_se']:.1f}"
        for key in ("colours", "classifier")
    ]
    return (
        " | ".join(
            [
                f"| {name}",
                f"{reward['before']:.3f} ± {reward['before_se']:.3f}",
                f"{reward['after']:.3f} ± {reward['after_se']:.3f}",
                f"{100 * reward['relative']:+.1f} %",
                f"{reward['p']:.1g}",
                f"{100 * defective['before']:.0f} %",
                f"{100 * defective['after']:.0f} %",
                f"{broken['count']} of {broken['of']}",
                f"{100 * result['foreground']['relative']:+.1f} %",
                *points,
            ]
        )
        + " |"
    )


def draw(runs, file):
    figure, (epochs, validations) = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
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
    validations.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, logs/<run>")
    parser.add_argument("--out", default="curves.png", help="picture to write")
    args = parser.parse_args()
    classifier = Classifier.from_pretrained()
    print(HEADER + "\n|" + " --- |" * (HEADER.count("|") - 1))
    for run in args.runs:
        print(row(run.name, evaluate_run(run, classifier=classifier)), flush=True)
    draw(args.runs, args.out)


if __name__ == "__main__":
    main()
