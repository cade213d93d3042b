"""Known multi-view defects of one fixed view of the grid, and detectors that find them without the reward.

A defect stands for what imperfect finetuning leaves in a multi-view painter: now and then one view contradicts the
others. Here it is always the last one, so that the shares of good and of spoilt grids can be counted exactly."""

import torch
import torch.nn.functional as F

from mrc.bounding_box import foreground_mask
from recon.cameras import Cameras, instant3d_cameras
from tiny.objects import COLOURS, Primitives, build, parse_caption, random_caption, render

VIEW = 3
SHIPPED = "size"  # the defect of tiny/weights/painter_defect
SMALL = 0.55  # size of the object in a view spoilt by "size", relative to the other views
CONTRASTING = 3  # so many colours a spoilt view can choose from, as many as an object has parts
PALETTE = torch.tensor(list(COLOURS.values()))


def spoil(kind, objects, captions, views, generator):
    """The grids with view 3 spoilt, every one of them; the other three views are untouched.

    kind: a key of DEFECTS; objects: the N `Primitives` in the pictures, built from `captions` (N);
    views: (N, 4, 3, S, S) in [0, 1], returned as a new tensor. Raises ValueError for an unknown kind."""
    _require_known(kind)
    spoilt = views.clone()
    spoilt[:, VIEW] = DEFECTS[kind](objects, captions, views.shape[-1], generator)
    return spoilt


def _colour(objects, captions, size, generator):
    """The same object in colours far from those that the caption names."""
    colour = objects.colour.clone()
    for n, caption in enumerate(captions):
        order = torch.randperm(CONTRASTING, generator=generator)
        colour[n] = PALETTE[contrasting_colours(caption)[order]]
    return _last_view(Primitives(objects.shape, colour, objects.centre, objects.size, objects.yaw), size)


def _size(objects, captions, size, generator):
    """The same object at 0.55 times its size about the view's centre."""
    return _last_view(objects, size, zoom=SMALL)


def _other(objects, captions, size, generator):
    """An object of another caption, in colours far from those of this one."""
    return _last_view(build([_unrelated_caption(caption, generator) for caption in captions], generator), size)


def _missing_part(objects, captions, size, generator):
    """The same object without its second primitive."""
    kept = objects.size.clone()
    kept[:, 1] = 0
    return _last_view(Primitives(objects.shape, objects.colour, objects.centre, kept, objects.yaw), size)


DEFECTS = {"colour": _colour, "size": _size, "other": _other, "missing_part": _missing_part}


def _last_view(objects, size, zoom=1.0):
    camera = instant3d_cameras()[VIEW]
    camera = Cameras(camera.c2w, camera.fxfycxcy * torch.tensor([zoom, zoom, 1.0, 1.0]))
    return render(objects, camera, size)[0][:, 0]


def contrasting_colours(caption):
    """Indices into COLOURS of the three that are farthest in hue (not brightness) from every colour in the caption."""
    direction = F.normalize(PALETTE, dim=-1)
    used = [list(COLOURS).index(colour) for colour, _ in parse_caption(caption)[0]]
    return (direction @ direction[used].T).amax(1).argsort()[:CONTRASTING]


def _unrelated_caption(caption, generator):
    names = [list(COLOURS)[k] for k in contrasting_colours(caption).tolist()]
    while True:
        other = random_caption(generator)
        things = parse_caption(other)[0]
        if len(things) == 2 and all(colour in names for colour, _ in things):
            return other


def is_defective(kind, views):
    """Whether view 3 contradicts views 0 to 2 in the way of `kind`: views (N, 4, 3, S, S) in [0, 1] -> (N,) bool.

    Colours and areas are compared, nothing is reconstructed. An empty view 3 counts as defective."""
    _require_known(kind)
    return DETECTORS[kind](views)


def _small(views):
    """The foreground of view 3 is less than half the median of the other three: in one of them a part may hide the
    other."""
    area = foreground_mask(views).float().mean((-2, -1))
    return area[:, VIEW] < 0.5 * area[:, :VIEW].median(1).values


def _strange_colours(views):
    """The colours of view 3 have little in common with what views 0 to 2 show (a colour may be hidden in some of
    them)."""
    share = colour_shares(views)
    return torch.minimum(share[:, VIEW], share[:, :VIEW].amax(1)).sum(-1) < 0.4


def _colour_missing(views):
    """A colour that two of the views 0 to 2 show is absent in view 3. The least certain of the detectors, because one
    part can also be hidden behind another."""
    share = colour_shares(views)
    return (((share[:, :VIEW] > 0.1).sum(1) >= 2) & (share[:, VIEW] < 0.03)).any(-1)


DETECTORS = {"colour": _strange_colours, "size": _small, "other": _strange_colours, "missing_part": _colour_missing}


def colour_shares(views):
    """How much of the object has which colour: views (..., 3, S, S) in [0, 1] -> (..., 8) in the order of COLOURS.

    Pixels inside the silhouette go to the colour of nearest direction in RGB space, because shading changes only the
    length. The shares add up to 1, or to 0 in a view without an object."""
    inside = core(views)
    direction = F.normalize(views, dim=-3).movedim(-3, -1) @ F.normalize(PALETTE, dim=-1).T
    nearest = F.one_hot(direction.argmax(-1), len(PALETTE)) * inside[..., None]
    return nearest.sum((-3, -2)) / inside.sum((-2, -1), keepdim=True)[..., 0].clamp(min=1)


def core(views):
    """The foreground without its outermost pixels, which mix with white: (..., 3, S, S) -> (..., S, S) bool."""
    background = (~foreground_mask(views)).float().flatten(0, -3)[:, None]
    return F.max_pool2d(background, 3, stride=1, padding=1).reshape(*views.shape[:-3], *views.shape[-2:]) == 0


def _require_known(kind):
    if kind not in DEFECTS:
        raise ValueError(f"Defect {kind!r} is unknown; choose one of {', '.join(DEFECTS)}.")
