"""Evaluate a run in the small world without a reconstruction: `python -m tiny.evaluate logs/<run>`.

Reads the first and the last of `logs/<run>/validation/epoch_XXXX/` (prompts, rewards, what the judges of mrc/judges.py
said, and the views of each prompt, with the same captions and noise in every epoch), prints what reinforcement learning
changed, and writes `logs/<run>/evaluation.json`. Of these numbers only the rewards and the held-out views come from a
reconstruction, and are read from the files: defects are detected by comparing the colours and areas of the views, and
captions are checked by a classifier that was trained on exact renders. Exits with status 2 and one sentence if a file
is missing or damaged.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn as nn
from scipy.stats import sem

from config import base
from config.cli import one_sentence
from config.errors import MissingFileError, UserError
from config.validate import check_file
from ddpo.evaluation import JUDGES, paired_p_value
from ddpo.pictures import load_views
from mrc.bounding_box import foreground_mask
from tiny.classifier import Classifier, caption_agreement
from tiny.defects import DEFECTS, SHIPPED, VIEW, colour_shares, is_defective
from tiny.objects import COLOUR_NAMES, parse_caption

SHAPE = (4, 3, 64, 64)  # of the views of a sample
SEEN = 0.1  # of an object's pixels have a colour that is seen
MIN_FOREGROUND = base.get_config().mrc.min_foreground  # share of the view; below it a view counts as empty


def evaluate_views(
    views: torch.Tensor, captions: list[str], defect: str = SHIPPED, classifier: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Measure N samples without reconstructing anything: {quantity: (N,)}.

    views: (N, 4, 3, S, S) in [0, 1]; defect: a key of DEFECTS; classifier: None for the shipped one. The quantities are
        defective: 0 or 1, whether view 3 has the defect
        empty: 0 or 1, whether some view shows no object
        foreground: mean share of a view that is foreground
        colours: share of the caption's colours that are dominant, see `colour_agreement`
        seen: share of the views that show every colour of the caption, see `every_colour_seen`
        classifier: share of the caption's coloured shapes that the classifier finds
    The last four are averages over the good views: all four, or the first three of a defective sample. Raises
    ValueError for an unknown defect and for captions from outside the small world."""
    views = views.float()
    defective = is_defective(defect, views)
    shares = colour_shares(views)
    area = foreground_mask(views).float().mean((-2, -1))
    use = torch.ones_like(area, dtype=torch.bool)
    use[:, VIEW] = ~defective
    return {
        "defective": defective.float(),
        "empty": (area < MIN_FOREGROUND).any(1).float(),
        "foreground": (area * use).sum(1) / use.sum(1),
        "colours": colour_agreement(shares, captions, use),
        "seen": every_colour_seen(shares, captions, use),
        "classifier": caption_agreement(classifier or Classifier.from_pretrained(), views, captions, use),
    }


def caption_colours(caption: str) -> list[int]:
    """The colours of a caption, each once, as their places in COLOURS."""
    return sorted({COLOUR_NAMES.index(colour) for colour, _ in parse_caption(caption)[0]})


def colour_agreement(shares: torch.Tensor, captions: list[str], use: torch.Tensor) -> torch.Tensor:
    """Share of the K colours in a caption that are among the K most frequent of its sample: (N,) in [0, 1].

    shares: (N, V, 8) as of `colour_shares`; use: (N, V) bool, the views to include."""
    share = (shares * use[..., None]).sum(1)
    agreement = []
    for n, caption in enumerate(captions):
        wanted = caption_colours(caption)
        seen = {k for k in share[n].topk(len(wanted)).indices.tolist() if share[n, k] > 0}
        agreement.append(len(seen.intersection(wanted)) / len(wanted))
    return torch.tensor(agreement)


def every_colour_seen(shares: torch.Tensor, captions: list[str], use: torch.Tensor) -> torch.Tensor:
    """Share of a sample's views in which each colour of its caption has at least SEEN of the object: (N,) in [0, 1].

    It falls where two objects become one of a single colour, which consistency alone does not mind. Arguments as of
    `colour_agreement`."""
    found = []
    for n, caption in enumerate(captions):
        every = (shares[n][:, caption_colours(caption)] >= SEEN).all(1)
        found.append((every & use[n]).sum() / use[n].sum())
    return torch.stack(found)


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Compare N samples before and after, paired by caption and noise.

    before, after: the quantities (N,) of `evaluate_views` and the scores of `read_validation`, N >= 2. Returns, for
    every quantity, its means, their standard errors ("before_se", "after_se"), the mean difference and its standard
    error ("difference_se"), the difference in units of |before| ("relative", None if that is 0) and the two-sided p
    value of the paired t-test; and the counts "good_grids_broken" and "bad_grids_repaired"."""
    result = {}
    for name in before:
        a, b = before[name].double(), after[name].double()
        difference = float((b - a).mean())
        result[name] = {
            "before": float(a.mean()),
            "before_se": float(sem(a)),
            "after": float(b.mean()),
            "after_se": float(sem(b)),
            "difference": difference,
            "difference_se": float(sem(b - a)),
            "relative": difference / abs(float(a.mean())) if a.mean() != 0 else None,
            "p": paired_p_value(b, a),
        }
    good = before["defective"] == 0
    result["good_grids_broken"] = _count(after["defective"][good] == 1)
    result["bad_grids_repaired"] = _count(after["defective"][~good] == 0)
    return result


def _count(happened):
    return {"count": int(happened.sum()), "of": len(happened), "share": int(happened.sum()) / max(1, len(happened))}


def relative_change(row: dict) -> str:
    """The relative change of one quantity in a result of `compare`, "+1.0 %"; empty if it was 0 before."""
    return "" if row["relative"] is None else f"{100 * row['relative']:+.1f} %"


def table(result: dict[str, dict]) -> str:
    """The result of `compare` as text, one quantity per line."""
    lines = [f"{'':12s}{'before':>18s}{'after':>18s}{'difference':>20s}{'relative':>10s}{'p':>10s}"]
    for name, row in result.items():
        if "before" in row:
            before, after, change = (f"{row[k]:.4f} ± {row[k + '_se']:.4f}" for k in ("before", "after", "difference"))
            relative = relative_change(row)
            lines.append(f"{name:12s}{before:>18s}{after:>18s}{change:>20s}{relative:>10s}{row['p']:>10.2g}")
        else:
            lines.append(f"{name.replace('_', ' ')}: {row['count']} of {row['of']} ({100 * row['share']:.1f} %)")
    return "\n".join(lines)


def read_validation(folder: str | Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[str]]:
    """Read a validation of a run: views (N, 4, 3, S, S) in [0, 1], scores, and N prompts.

    The scores are "reward" and those of the judges of JUDGES that there were, all (N,) in float64.

    Raises UserError if a file is missing or damaged, or holds something else."""
    folder = Path(folder)
    try:
        scores = json.loads((folder / "scores.json").read_text())
        prompts, columns = scores["prompts"], {"reward": scores["rewards"]}
        columns |= {name: scores[name] for name in JUDGES if name in scores}
        values = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("prompts are a list of texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'scores.json'} is missing or damaged ({type(error).__name__}); give the folder of a complete "
            f"run of carve3d_train.py, or repeat the run."
        ) from error
    for name, column in values.items():
        if column.shape != (len(prompts),) or len(prompts) < 2 or not column.isfinite().all():
            raise UserError(
                f"{folder / 'scores.json'} has {len(prompts)} prompts and {column.numel()} numbers of {name!r}; one "
                f"finite number for each of two or more prompts is expected."
            )
    files = [folder / f"{index:04d}.png" for index in range(len(prompts))]
    views = [load_views(file).get("views", torch.empty(0)) for file in files]
    for file, view in zip(files, views, strict=True):
        if view.shape != SHAPE:
            raise UserError(f"{file} has views of shape {tuple(view.shape)}; those of the small world have {SHAPE}.")
    return torch.stack(views).float() / 255, values, prompts


def evaluate_run(run: str | Path, defect: str = SHIPPED, classifier: nn.Module | None = None) -> dict:
    """Compare the first and the last validation of a run; writes and returns what is in `run`/evaluation.json.

    defect: a key of DEFECTS; classifier: None for the shipped one. Raises MissingFileError if there are not two
    validations, and UserError if they cannot be read or compared."""
    folder = Path(run) / "validation"
    validations = sorted(folder.glob("epoch_*"))
    if len(validations) < 2:
        raise MissingFileError(
            f"{folder} has {len(validations)} folders epoch_XXXX, but two are needed; "
            f"give the folder of a run that validated before and after training."
        )
    first, last = validations[0], validations[-1]
    (views, scores, prompts), (views_after, scores_after, prompts_after) = map(read_validation, (first, last))
    if prompts != prompts_after:
        raise UserError(
            f"{first} and {last.name} have different prompts, so their samples cannot be paired; "
            f"give the folder of a single run."
        )
    check_file("the result", Path(run) / "evaluation.json", [".json"])
    classifier = classifier or Classifier.from_pretrained()
    try:
        before = scores | evaluate_views(views, prompts, defect, classifier)
    except UserError as error:
        raise UserError(f"{first} cannot be evaluated: {error}") from error
    after = scores_after | evaluate_views(views_after, prompts, defect, classifier)
    names = [first.name, last.name]
    result = {"validations": names, "samples": len(prompts), "defect": defect, **compare(before, after)}
    (Path(run) / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command; arguments: None for those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, logs/<run>")
    parser.add_argument("--defect", default=SHIPPED, choices=list(DEFECTS), help="the defect to detect")
    args = parser.parse_args(arguments)
    result = evaluate_run(args.run, args.defect)
    print(f"{result['samples']} samples, {' and '.join(result['validations'])}, defect: {result['defect']}")
    print(table({name: row for name, row in result.items() if isinstance(row, dict)}))


if __name__ == "__main__":
    with one_sentence("tiny.evaluate"):
        main()
