"""Known multi-view defects in one fixed view of a sample, and detectors that find them without the reward.

A defect stands for what imperfect finetuning leaves behind in a multi-view painter: in some samples one view
contradicts the others. Here it is always the last view, so that defective samples can be counted exactly.
"""

import torch
import torch.nn.functional as F

from config.errors import UserError
from mrc.bounding_box import foreground_mask
from recon.cameras import Cameras, instant3d_cameras
from tiny.objects import COLOUR_NAMES, PALETTE, Primitives, build, parse_caption, random_caption, render

VIEW = 3
SHIPPED = "size"  # the defect of tiny/weights/painter_defect
SMALL = 0.55  # the object's size in view 3, relative to the other views, for the defect "size"
CONTRASTING = 3  # number of colours to choose from for a defective view: the largest number of primitives


def add_defect(
    kind: str, objects: Primitives, captions: list[str], views: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Samples in which view 3 has the defect `kind`, as a new tensor; the other three views are unchanged.

    kind: a key of DEFECTS; objects: the N rendered `Primitives`, built from the N `captions`; views: (N, 4, 3, S, S) in
    [0, 1]. Raises ValueError for an unknown kind."""
    _require_known(kind)
    defective = views.clone()
    defective[:, VIEW] = DEFECTS[kind](objects, captions, views.shape[-1], generator)
    return defective


def _colour(objects, captions, size, generator):
    """The same object in colours that are far from those in the caption."""
    colour = objects.colour.clone()
    for n, caption in enumerate(captions):
        order = torch.randperm(CONTRASTING, generator=generator)
        colour[n] = PALETTE[contrasting_colours(caption)[order]]
    return _last_view(Primitives(objects.shape, colour, objects.centre, objects.size, objects.yaw), size)


def _size(objects, _captions, size, _generator):
    """The same object, scaled about the centre of the view."""
    return _last_view(objects, size, zoom=SMALL)


def _other(_objects, captions, size, generator):
    """An object of another caption, in colours that are far from those in this one."""
    return _last_view(build([_unrelated_caption(caption, generator) for caption in captions], generator), size)


def _missing_part(objects, _captions, size, _generator):
    """The same object without its second primitive."""
    kept = objects.size.clone()
    kept[:, 1] = 0
    return _last_view(Primitives(objects.shape, objects.colour, objects.centre, kept, objects.yaw), size)


DEFECTS = {"colour": _colour, "size": _size, "other": _other, "missing_part": _missing_part}


def _last_view(objects, size, zoom=1.0):
    camera = instant3d_cameras()[VIEW]
    camera = Cameras(camera.c2w, camera.fxfycxcy * torch.tensor([zoom, zoom, 1.0, 1.0]))
    return render(objects, camera, size)[0][:, 0]


def contrasting_colours(caption: str) -> torch.Tensor:
    """Indices into COLOURS (3,) of the colours farthest in hue, whatever their brightness, from all in the caption."""
    direction = F.normalize(PALETTE, dim=-1)
    used = [COLOUR_NAMES.index(colour) for colour, _ in parse_caption(caption)[0]]
    return (direction @ direction[used].T).amax(1).argsort()[:CONTRASTING]


def _unrelated_caption(caption, generator):
    allowed = [COLOUR_NAMES[k] for k in contrasting_colours(caption).tolist()]
    while True:
        other = random_caption(generator)
        named = parse_caption(other)[0]
        if len(named) == 2 and all(colour in allowed for colour, _ in named):
            return other


def is_defective(kind: str, views: torch.Tensor) -> torch.Tensor:
    """Whether view 3 contradicts views 0 to 2 in the way of `kind`: views (N, 4, 3, S, S) in [0, 1] -> (N,) bool.

    Compares colours and areas without reconstructing anything. An empty view 3 counts as defective. Raises ValueError
    for an unknown kind."""
    _require_known(kind)
    return DETECTORS[kind](views)


def _is_small(views):
    """View 3 has less than half the median foreground of the other three views.

    The median rather than the minimum, because in one of those views one primitive may occlude the other."""
    area = foreground_mask(views).float().mean((-2, -1))
    return area[:, VIEW] < 0.5 * area[:, :VIEW].median(1).values


def _has_other_colours(views):
    """View 3 shares few colours with views 0 to 2 taken together: in one of them a colour may be occluded."""
    share = colour_shares(views)
    return torch.minimum(share[:, VIEW], share[:, :VIEW].amax(1)).sum(-1) < 0.4


def _lacks_a_colour(views):
    """A colour that at least two of views 0 to 2 show is absent from view 3.

    The least certain detector, because in view 3 one primitive may occlude the other."""
    share = colour_shares(views)
    return (((share[:, :VIEW] > 0.1).sum(1) >= 2) & (share[:, VIEW] < 0.03)).any(-1)


DETECTORS = {
    "colour": _has_other_colours,
    "size": _is_small,
    "other": _has_other_colours,
    "missing_part": _lacks_a_colour,
}


def colour_shares(views: torch.Tensor) -> torch.Tensor:
    """Share of the object's pixels in each colour: views (..., 3, S, S) in [0, 1] -> (..., 8) in the order of COLOURS.

    Each pixel inside the silhouette is assigned the colour nearest in direction in RGB space, because shading changes
    only the length. The shares add up to 1, or to 0 in a view without an object."""
    inside = interior(views)
    direction = F.normalize(views, dim=-3).movedim(-3, -1) @ F.normalize(PALETTE, dim=-1).T
    nearest = F.one_hot(direction.argmax(-1), len(PALETTE)) * inside[..., None]
    return nearest.sum((-3, -2)) / inside.sum((-2, -1), keepdim=True)[..., 0].clamp(min=1)


def interior(views: torch.Tensor) -> torch.Tensor:
    """The foreground without its outermost pixels, which are partly white.

    views: (..., 3, S, S) in [0, 1]. Returns (..., S, S) bool."""
    background = (~foreground_mask(views)).float().flatten(0, -3)[:, None]
    return F.max_pool2d(background, 3, stride=1, padding=1).reshape(*views.shape[:-3], *views.shape[-2:]) == 0


def _require_known(kind):
    if kind not in DEFECTS:
        raise UserError(f"Defect {kind!r} is unknown; choose one of {', '.join(DEFECTS)}.")
