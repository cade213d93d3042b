"""Judges beside the reward: do the views agree by measures that training did not see?

What a reward counts, training finds ways to raise. These judges share as little as possible with it: the silhouettes
need no network at all, and a held-out view is compared with an object that was reconstructed without it. Diversity
judges something else: a painter that has collapsed paints one consistent object again and again.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F

from mrc.bounding_box import foreground_mask
from mrc.mrc import MRC, resize_views, view_distances
from recon.cameras import Cameras, project, rays
from recon.volume_rendering import box_interval, stratified_depths

HULL_CELLS = 64  # of the visual hull, per side of the box
HULL_DEPTHS = 128  # places along a ray through the box at which the hull is looked up
SILHOUETTE_SIZE = 64  # pixels per side of the silhouettes that are compared


def judge_views(judge: MRC, views: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: (B,), lower is better} of all judges here that apply to the reconstructor of `judge`; views as of MRC."""
    values = {"silhouettes": silhouette_disagreement(views, judge.reconstructor.cameras)}
    if judge.reconstructor.takes_fewer_views:
        values["held_out"] = held_out_distance(judge, views)
    return values


@torch.no_grad()
def silhouette_disagreement(views: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """Does an object exist that has these silhouettes? (B,) in [0, 1], 0 = yes; an empty view gives 1.

    views: (B, V, 3, S, S) in [0, 1] on white; cameras: V. The visual hull (Laurentini 1994), the largest object whose
    silhouettes lie inside all of the views', is projected back: the mean over views of 1 - intersection / union with
    the view's own. The cells and pixels leave some hundredths for exact views. Says nothing about colours, nor about
    the inside of a silhouette."""
    B, V = views.shape[:2]
    masks = foreground_mask(resize_views(views.float(), SILHOUETTE_SIZE)).float()
    hull = visual_hull(masks, cameras)
    origins, directions = (x.flatten(0, 1) for x in rays(cameras, SILHOUETTE_SIZE))
    near, far = box_interval(origins, directions)
    depths = stratified_depths(near, torch.maximum(near, far), HULL_DEPTHS, 0.5)
    points = (
        origins[:, None] + directions[:, None] * depths[..., None]
    )  # (rays, depths, 3), in the order of hull's axes
    found = F.grid_sample(hull[None], points[None, None], mode="nearest", align_corners=False)  # objects as channels
    hull_masks = (found.amax(-1) > 0).view(B, V, SILHOUETTE_SIZE, SILHOUETTE_SIZE)
    masks = masks > 0.5
    intersection, union = (hull_masks & masks).sum((-2, -1)), (hull_masks | masks).sum((-2, -1))
    agreement = torch.where(masks.any(-1).any(-1), intersection / union.clamp(min=1), 0.0)
    return 1 - agreement.mean(1)


def visual_hull(masks: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """The cells of the box that all silhouettes cover: masks (B, V, S, S), 1 where the object is, cameras: V.

    Returns (B, cells, cells, cells) of 0 and 1, indexed z, y, x."""
    B, V = masks.shape[:2]
    centre = (torch.arange(HULL_CELLS, device=masks.device) + 0.5) / HULL_CELLS * 2 - 1
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    places, depth = project(torch.stack([x, y, z], -1).view(-1, 3), cameras)
    covered = F.grid_sample(masks.transpose(0, 1), 2 * places[:, None] - 1, align_corners=False)  # objects as channels
    seen = (covered.view(V, B, -1) > 0.5) & (depth[:, None] > 0)
    return seen.all(0).float().view(B, *[HULL_CELLS] * 3)


@torch.no_grad()
def held_out_distance(judge: MRC, views: torch.Tensor) -> torch.Tensor:
    """How well each view is foretold by the others: (B,) LPIPS, mean over views; lower is better.

    views: (B, V, 3, S, S). Every view is left out once, and compared, as MRC compares them, with the render of what the
    other V - 1 show. Larger than MRC even for exact views: what only the missing view shows has to be guessed. The
    reconstructor must have `takes_fewer_views`."""
    model, size = judge.reconstructor, judge.render_size or views.shape[-1]
    inputs, targets = resize_views(views.float(), model.input_size), resize_views(views.float(), size)
    distances = []
    for left_out in range(views.shape[1]):
        others = [v for v in range(views.shape[1]) if v != left_out]
        scene = model.reconstruct(inputs[:, others], model.cameras[others])
        render, _ = model.render(scene, model.cameras[left_out], size)
        distances.append(view_distances(targets[:, left_out, None], render, judge.lpips, judge.bbox_lpips))
    return torch.cat(distances, 1).mean(1)


@torch.no_grad()
def diversity(views: torch.Tensor, prompts: Sequence[str], lpips: Callable) -> torch.Tensor:
    """How different the samples of a prompt are: (B,) mean LPIPS of a sample to the others of its prompt, view by view.

    views: (B, V, 3, S, S) in [0, 1]; prompts: B of them; lpips: callable (N, 3, S, S) x 2 -> (N,). NaN for a prompt
    that has one sample only."""
    total, count = torch.zeros(len(views), device=views.device), [0] * len(views)
    for a, b in combinations(range(len(views)), 2):
        if prompts[a] == prompts[b]:
            distance = lpips(views[a], views[b]).mean()
            for one in (a, b):
                total[one] += distance
                count[one] += 1
    return total / total.new_tensor(count)
