"""Does MRC see what it should? The paper's sanity experiment, for any reconstructor (Carve3D, section 4.1).

    python -m tools.validate_mrc --config config/tiny.py [--config.KEY=VALUE ...]

--objects   how many objects (32)
--out       folder for the results (logs/validate_mrc)

Exact views of objects of the small world, at the reconstructor's cameras, and the same with one view distorted: rotated
about the object's vertical axis, in other hues, blurred, or of another object. In --out there are afterwards
    validate.json   MRC of every object for every distortion
    validate.png    mean MRC against the strength of the distortion, with standard errors
    validate.html   a page with both
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from absl import flags
from PIL import Image
from scipy.stats import sem

from config import cli
from config.validate import check_folder, validate_judge
from ddpo.progress import Progress
from ddpo.report import write_table
from mrc import MRC
from mrc.rewards import load_mrc
from recon.cameras import Cameras
from tiny.captions import split
from tiny.objects import build, render

STRENGTHS = {  # kind -> what is tried, from weak to strong, and its unit
    "rotation": ((2.0, 5.0, 10.0, 20.0, 40.0), "degrees"),
    "hue": ((15.0, 30.0, 60.0, 120.0), "degrees"),
    "blur": ((0.5, 1.0, 2.0, 4.0), "pixels of 64"),
    "another object": ((1.0,), ""),
}
TRIALS = [(kind, strength) for kind, (strengths, _) in STRENGTHS.items() for strength in strengths]
VIEW = 3  # the one that is distorted
BATCH = 8
DISTANCE, FOCAL = (
    2.7,
    0.5 / math.tan(math.radians(25)),
)  # with which the small world's objects fill a view as they should


def rotate_hue(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotate the colours of image (..., 3, H, W) about the gray axis, which leaves white white; in [0, 1]."""
    angle = math.radians(degrees)
    gray = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * (torch.eye(3) - gray) + gray + math.sin(angle) * cross  # Rodrigues' formula
    return torch.einsum("ij,...jhw->...ihw", turn, image).clamp(0, 1)


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of image (N, 3, H, W); sigma: standard deviation in pixels of an image of 64."""
    sigma = sigma * image.shape[-1] / 64
    offsets = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, 0).expand(3, 1, 1, -1)
    reach = len(offsets) // 2
    padded = F.pad(image, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(-1, -2), groups=3)


def with_distorted_view(
    views: torch.Tensor, kind: str, strength: float, rotated_view: Callable, other_views: torch.Tensor
) -> torch.Tensor:
    """views (N, V, 3, S, S) with view `VIEW` distorted.

    rotated_view: degrees -> that view of the objects rotated by so much, (N, 3, S, S); other_views: views of other
    objects.
    """
    view = views[:, VIEW]
    distorted = views.clone()
    distorted[:, VIEW] = {
        "rotation": lambda: rotated_view(strength),
        "hue": lambda: rotate_hue(view, strength),
        "blur": lambda: blur(view, strength),
        "another object": lambda: other_views[:, VIEW],
    }[kind]()
    return distorted


def fitted_cameras(cameras: Cameras) -> Cameras:
    """`cameras` (V,) at the distance from which the small world's objects fill them: reconstructors differ in scale."""
    c2w = cameras.c2w.clone()
    distance = DISTANCE * (cameras.fxfycxcy[:, :1] / FOCAL)
    c2w[:, :3, 3] *= distance / cameras.radius[:, None]
    return Cameras(c2w, cameras.fxfycxcy)


def experiment(
    judge: MRC, count: int, size: int, trials: Iterable[tuple[str, float]] = TRIALS, seed: int = 0
) -> dict[str, dict[float, list[float]]]:
    """MRC of `count` objects: {"none": {0.0: [...]}, kind: {strength: [...]}} with `count` numbers in every list.

    size: side of the views in pixels; trials: pairs of kind and strength.
    """
    device = judge.reconstructor.cameras.c2w.device
    cameras = fitted_cameras(judge.reconstructor.cameras.to("cpu"))
    captions = split()["test"]
    objects = build([captions[i % len(captions)] for i in range(count)], torch.Generator().manual_seed(seed))
    views = render(objects, cameras, size)[0]

    def rotated_view(degrees):
        angle = torch.tensor(math.radians(degrees))
        rotation = torch.eye(4)
        rotation[0, 0] = rotation[1, 1] = angle.cos()
        rotation[1, 0], rotation[0, 1] = angle.sin(), -angle.sin()
        camera = Cameras((rotation @ cameras.c2w)[VIEW : VIEW + 1], cameras.fxfycxcy[VIEW : VIEW + 1])
        return render(objects, camera, size)[0][:, 0]

    def score(views):
        return torch.cat([judge(part.to(device)).lpips.nanmean(1) for part in views.split(BATCH)]).tolist()

    results = {"none": {0.0: score(views)}}
    for kind, strength in trials:
        results.setdefault(kind, {})[strength] = score(
            with_distorted_view(views, kind, strength, rotated_view, views.roll(1, 0))
        )
    return results


def table(results: dict) -> str:
    """Markdown: mean MRC, its standard error, and the paired difference from the undistorted views with its own."""
    base = torch.tensor(results["none"][0.0])
    lines = [
        "| distortion of one view | MRC | more than without |",
        "| --- | --- | --- |",
        f"| none | {base.mean():.4f} ± {sem(base):.4f} | |",
    ]
    for kind, (_, unit) in STRENGTHS.items():
        for strength, scores in results[kind].items():
            scores = torch.tensor(scores)
            difference = scores - base
            name = f"{kind} {strength:g} {unit}" if unit else kind
            lines.append(
                f"| {name} | {scores.mean():.4f} ± {sem(scores):.4f} | {difference.mean():+.4f} ± "
                f"{sem(difference):.4f} |"
            )
    return "\n".join(lines)


def draw(results: dict, file: Path) -> None:
    """One panel for each kind of distortion, from none to strong, all with the same MRC axis."""
    size = (3 * len(STRENGTHS), 3)
    figure, axes = plt.subplots(1, len(STRENGTHS), figsize=size, sharey=True, constrained_layout=True)
    for axis, (kind, (_, unit)) in zip(axes, STRENGTHS.items(), strict=True):
        points = {**results["none"], **results[kind]}
        scores = torch.tensor(list(points.values()))
        axis.errorbar(list(points), scores.mean(1), yerr=sem(scores, axis=1), marker="o", capsize=3)
        axis.set(title=f"one view: {kind}", xlabel=unit or "no / yes")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MRC (mean LPIPS, lower is better)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def define_flags() -> None:
    flags.DEFINE_integer("objects", 32, "How many objects.", lower_bound=2)
    flags.DEFINE_string("out", "logs/validate_mrc", "Folder for the results.")


def main(args) -> None:
    """args: the parsed flags."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, out = validate_judge(args.config, device), Path(args.out)
    check_folder("--out", out)
    judge = load_mrc(config, device)
    trials = Progress("validating", len(TRIALS), "distortions").over(TRIALS)
    results = experiment(judge, args.objects, config.recon.render_size, trials)
    out.mkdir(parents=True, exist_ok=True)
    (out / "validate.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out / "validate.png")
    chart, alt = Image.open(out / "validate.png"), "MRC against the strength of every distortion"
    about = f"{args.objects} objects, {config.recon.name}: mean LPIPS of given and re-rendered views ± standard error"
    write_table(out / "validate.html", "MRC against distortions of one view", about, table(results), {}, chart, alt)
    print(f"{table(results)}\n\nwrote {', '.join(str(file) for file in sorted(out.glob('validate.*')))}")


if __name__ == "__main__":
    cli.run("validate_mrc", main, "config/tiny.py", define_flags)
