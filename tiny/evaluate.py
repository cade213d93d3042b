"""Judge a run in the small world by the truth: `python -m tiny.evaluate logs/<run>`.

Reads the first and the last of `logs/<run>/validation/epoch_XXXX.npz` (views uint8 (N, 4, 3, S, S), rewards (N,),
prompts (N,): the same captions and noise in every epoch), prints what reinforcement learning changed, and writes
`logs/<run>/judgement.json`. Apart from the reward itself nothing here uses a reconstruction: defects are found by
comparing colours and areas of the views, and captions are checked with a classifier that was trained on exact pictures.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import sem, ttest_1samp

from mrc.bounding_box import foreground_mask
from tiny.classifier import Classifier, caption_agreement
from tiny.defects import DEFECTS, SHIPPED, VIEW, colour_shares, is_defective
from tiny.objects import COLOURS, parse_caption

MIN_FOREGROUND = 0.005  # share of the view; the default of config.mrc.min_foreground


def judge(views, captions, defect=SHIPPED, classifier=None):
    """What the grids show, without reconstructing anything: a dict of tensors (N,).

    views: (N, 4, 3, 64, 64) in [0, 1]; captions: N strings; defect: a key of DEFECTS; classifier: None = the shipped.
    defective: 0 or 1; empty: 0 or 1, some view shows no object; foreground: mean share of the view that is foreground;
    colours: share of the caption's colours that are the dominant ones; classifier: share of the caption's coloured
    shapes that the classifier finds. The last three look at good views only: all four, or without the spoilt one."""
    views = views.float()
    defective = is_defective(defect, views)
    area = foreground_mask(views).float().mean((-2, -1))
    use = torch.ones_like(area, dtype=torch.bool)
    use[:, VIEW] = ~defective
    return {
        "defective": defective.float(),
        "empty": (area < MIN_FOREGROUND).any(1).float(),
        "foreground": (area * use).sum(1) / use.sum(1),
        "colours": colour_agreement(views, captions, use),
        "classifier": caption_agreement(classifier or Classifier.from_pretrained(), views, captions, use),
    }


def colour_agreement(views, captions, use):
    """Of the K colours in a caption, the share that is among the K most frequent of the sample: (N,) in [0, 1].

    views: (N, V, 3, S, S); use: (N, V) bool, the views to look at."""
    share = (colour_shares(views) * use[..., None]).sum(1)
    agreement = []
    for n, caption in enumerate(captions):
        wanted = {list(COLOURS).index(colour) for colour, _ in parse_caption(caption)[0]}
        seen = {k for k in share[n].topk(len(wanted)).indices.tolist() if share[n, k] > 0}
        agreement.append(len(wanted & seen) / len(wanted))
    return torch.tensor(agreement)


def compare(before, after):
    """Before and after, paired by sample: {quantity: {before, after, difference, their standard errors, p}} and counts.

    before, after: dicts of tensors (N,), N >= 2, as of `judge`, with "reward" added. "relative" is the difference in
    units of |before|, None if that is 0; p is that of the paired t-test, two-sided."""
    result = {}
    for name in before:
        a, b = before[name].double(), after[name].double()
        mean, error, p = paired_t_test(b - a)
        result[name] = {
            "before": float(a.mean()),
            "before_se": float(sem(a)),
            "after": float(b.mean()),
            "after_se": float(sem(b)),
            "difference": mean,
            "difference_se": error,
            "relative": mean / abs(float(a.mean())) if a.mean() != 0 else None,
            "p": p,
        }
    good = before["defective"] == 0
    result["good_grids_broken"] = _count(after["defective"][good] == 1)
    result["bad_grids_repaired"] = _count(after["defective"][~good] == 0)
    return result


def _count(happened):
    return {"count": int(happened.sum()), "of": len(happened), "share": int(happened.sum()) / max(1, len(happened))}


def paired_t_test(differences):
    """Mean, standard error and two-sided p value of paired differences (N,), N >= 2."""
    mean, error = float(differences.mean()), float(sem(differences))
    if error == 0:
        return mean, error, 1.0 if mean == 0 else 0.0
    return mean, error, float(ttest_1samp(differences.numpy(), 0).pvalue)


def table(result):
    """The comparison as text, one quantity per line."""
    lines = [f"{'':12s}{'before':>18s}{'after':>18s}{'difference':>20s}{'relative':>10s}{'p':>10s}"]
    for name, row in result.items():
        if "before" in row:
            before, after, change = (f"{row[k]:.4f} ± {row[k + '_se']:.4f}" for k in ("before", "after", "difference"))
            relative = "" if row["relative"] is None else f"{100 * row['relative']:+.1f} %"
            lines.append(f"{name:12s}{before:>18s}{after:>18s}{change:>20s}{relative:>10s}{row['p']:>10.2g}")
        else:
            lines.append(f"{name.replace('_', ' ')}: {row['count']} of {row['of']} ({100 * row['share']:.1f} %)")
    return "\n".join(lines)


def read_validation(file, defect=SHIPPED, classifier=None):
    """Prompts, and the judgement of one validation file with its rewards: (list of N strings, dict of tensors (N,))."""
    with np.load(file) as data:
        missing = {"views", "rewards", "prompts"} - set(data.files)
        if missing:
            raise ValueError(f"{file} lacks {', '.join(sorted(missing))}: give a folder that carve3d_train.py wrote.")
        views, rewards, prompts = data["views"], data["rewards"], [str(prompt) for prompt in data["prompts"]]
    views = torch.from_numpy(views).float() / 255
    return prompts, {"reward": torch.from_numpy(rewards).double(), **judge(views, prompts, defect, classifier)}


def evaluate_run(run, defect=SHIPPED, classifier=None):
    """Compare the first and the last validation of a run's folder; writes and returns its judgement.json."""
    files = sorted((Path(run) / "validation").glob("epoch_*.npz"))
    if len(files) < 2:
        raise FileNotFoundError(
            f"{Path(run) / 'validation'} holds {len(files)} files epoch_XXXX.npz, but two are "
            f"compared; give the folder of a run that validated before and after training."
        )
    classifier = classifier or Classifier.from_pretrained()
    (prompts, before), (others, after) = (read_validation(file, defect, classifier) for file in (files[0], files[-1]))
    if prompts != others:
        raise ValueError(
            f"{files[0].name} and {files[-1].name} have different prompts, so samples cannot be paired; "
            f"compare validations of one run."
        )
    names = [files[0].name, files[-1].name]
    result = {"files": names, "samples": len(prompts), "defect": defect, **compare(before, after)}
    (Path(run) / "judgement.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, logs/<run>")
    parser.add_argument("--defect", default=SHIPPED, choices=list(DEFECTS))
    args = parser.parse_args()
    result = evaluate_run(args.run, args.defect)
    print(f"{result['samples']} samples, {result['files'][0]} and {result['files'][1]}, defect: {result['defect']}")
    print(table({name: row for name, row in result.items() if isinstance(row, dict)}))


if __name__ == "__main__":
    main()
