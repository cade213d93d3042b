"""Multi-view Reconstruction Consistency: do the painted views show one 3D object? (Carve3D, Xie et al. 2024, section 3)

A feed-forward reconstructor turns the views into a 3D scene, which is rendered at the same cameras. Views that agree
with each other survive this unchanged; views that contradict each other cannot all be reproduced. MRC is the mean LPIPS
between each view and its render inside the object's bounding box, and the reward is -MRC.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from config.errors import UserError
from mrc.bounding_box import (
    background_is_white,
    compute_bounding_box,
    crop_box,
    foreground_mask,
    is_empty,
    make_square_bbox,
    object_is_cut,
)
from recon import Reconstructor


@dataclass
class MRCResult:
    """The scores of B samples of V views."""

    reward: torch.Tensor  # (B,) -mean LPIPS, or empty_view_reward for a sample with an empty view; higher is better
    # (B, V) distance between view and render, of empty views too (where it means nothing); NaN for a view that the
    # reconstructor did not compare
    lpips: torch.Tensor
    renders: torch.Tensor  # (B, V, 3, S, S) in [0, 1], the reconstruction seen from the views' cameras
    empty: torch.Tensor  # (B, V) bool, the view shows no object, or too little of it
    foreground: torch.Tensor  # (B, V) share of the view that is foreground, in [0, 1]; watch it for shrinking objects
    judges: dict[str, torch.Tensor] = field(default_factory=dict)  # (B,) of each judge that was asked, see `mrc.judges`


class MRC:
    """`MRC(reconstructor, lpips)(views) -> MRCResult`, the reward that Carve3D learns from.

    reconstructor: see `recon.Reconstructor`; its `compare` decides which renders a view is compared with. Any object
        with `num_views`, `input_size`, `cameras`, `reconstruct` and `render` will do; it then gets the usual `compare`.
    lpips: callable (N, 3, H, W) x 2 -> (N,), see `mrc.lpips.LPIPS`.
    render_size: side of the renders in pixels; None renders at the views' size. Views of another size are resized to
        it. bbox_lpips, min_foreground, empty_view_reward: see `score_views`.
    """

    def __init__(
        self,
        reconstructor: Reconstructor,
        lpips: Callable,
        bbox_lpips: bool = True,
        min_foreground: float = 0.005,
        empty_view_reward: float | None = -1.0,
        render_size: int | None = None,
    ):
        self.reconstructor = reconstructor
        self.lpips = lpips
        self.bbox_lpips = bbox_lpips
        self.min_foreground = min_foreground
        self.empty_view_reward = empty_view_reward
        self.render_size = render_size
        self._warned = set()

    def __call__(self, views: torch.Tensor) -> MRCResult:
        """Reconstruct and score views (B, V, 3, S, S) in [0, 1], one object on white, seen by `reconstructor.cameras`.

        Raises ValueError if the number of views is not the reconstructor's, or a pixel is not finite.
        """
        return self.score(views, self.reconstruct(views))

    @torch.no_grad()
    def reconstruct(self, views: torch.Tensor):
        """The scene that the reconstructor makes of `views`; arguments and errors as of a call."""
        if views.ndim != 5 or views.shape[1:3] != (self.reconstructor.num_views, 3):
            raise ValueError(
                f"MRC got views of shape {tuple(views.shape)}: the reconstructor wants (B, "
                f"{self.reconstructor.num_views}, 3, S, S)"
            )
        _require_finite("painted views", views)
        self._warn_of_framing(views)
        inputs = resize_views(views.float(), self.reconstructor.input_size)
        return self.reconstructor.reconstruct(inputs, self.reconstructor.cameras)

    @torch.no_grad()
    def score(self, views: torch.Tensor, scene) -> MRCResult:
        """How well `scene`, made by `reconstruct`, reproduces `views`."""
        size = self.render_size or views.shape[-1]
        views = resize_views(views.float(), size)
        distance = partial(view_distances, views, lpips=self.lpips, bbox_lpips=self.bbox_lpips)
        compare = getattr(self.reconstructor, "compare", partial(Reconstructor.compare, self.reconstructor))
        distances, renders = compare(scene, self.reconstructor.cameras, size, distance)
        return _result(views, renders, distances, self.min_foreground, self.empty_view_reward)

    def _warn_of_framing(self, views):
        """Warn once of each kind of view that no reconstructor was trained on."""
        problems = {
            "are not on white, so that MRC takes their background for a part of the object: set "
            "config.recon.remove_background to True, or prompt for a white background": ~background_is_white(views),
            "show an object that leaves its view, so that its size is unknown: prompt for the whole object, or "
            "paint it smaller": object_is_cut(views),
        }
        for words, found in problems.items():
            if found.any() and words not in self._warned:
                self._warned.add(words)
                warnings.warn(f"{int(found.sum())} of {len(views)} samples {words}.", stacklevel=3)


@torch.no_grad()
def score_views(
    views: torch.Tensor,
    renders: torch.Tensor,
    lpips: Callable,
    bbox_lpips: bool = True,
    min_foreground: float = 0.005,
    empty_view_reward: float | None = -1.0,
) -> MRCResult:
    """MRC of views and their renders, both (B, V, 3, S, S) in [0, 1].

    lpips: callable (N, 3, S, S) x 2 -> (N,).
    bbox_lpips: compare inside the box of the VIEW's foreground (as published), or whole views.
    min_foreground: a view with a smaller share of foreground, in [0, 1], counts as empty, as does one without any.
    empty_view_reward: the reward of a sample with an empty view. It closes a loophole of the published reward, in which
        a view without foreground is compared in a 6 x 6 white corner, so that painting nothing scores best. None leaves
        the loophole open, to reproduce published numbers.

    Raises ValueError if the shapes differ or a pixel is not finite.
    """
    distances = view_distances(views, renders, lpips, bbox_lpips)
    return _result(views, renders, distances, min_foreground, empty_view_reward)


def view_distances(
    views: torch.Tensor, renders: torch.Tensor, lpips: Callable, bbox_lpips: bool = True
) -> torch.Tensor:
    """LPIPS between each view and its render, both (B, V, 3, S, S): (B, V). See `score_views`."""
    if renders.shape != views.shape:
        raise ValueError(
            f"views have shape {tuple(views.shape)} but their renders {tuple(renders.shape)}: render at the views' "
            f"cameras and size"
        )
    _require_finite("painted views", views)
    _require_finite("renders of the reconstruction", renders)
    pairs = views.float().flatten(0, 1), renders.float().flatten(0, 1)
    if bbox_lpips:
        pairs = crop_pairs(*pairs, view_boxes(pairs[0]))
    return lpips(*pairs).view(views.shape[:2])


def _result(views, renders, distances, min_foreground, empty_view_reward):
    foreground = foreground_mask(views.float()).float().mean(dim=(-2, -1))
    empty = is_empty(foreground, min_foreground)
    reward = -distances.nanmean(dim=1)
    if empty_view_reward is not None:
        reward = reward.masked_fill(empty.any(dim=1), empty_view_reward)
    return MRCResult(reward, distances, renders.float(), empty, foreground)


def view_boxes(views: torch.Tensor) -> torch.Tensor:
    """The box in which each view is compared, its foreground's made square, padded and clamped.

    views: (..., 3, H, W) in [0, 1]. Returns (..., 4) int64."""
    return crop_box(make_square_bbox(compute_bounding_box(views)), *views.shape[-2:])


def crop_pairs(views: torch.Tensor, renders: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the same box out of view and render and resize both to the full size, bicubic and antialiased, in [0, 1].

    views, renders: (N, 3, H, W); boxes: (N, 4) inclusive, inside the image. Returns two tensors (N, 3, H, W).
    """
    both = torch.cat([views, renders], dim=1)  # six channels: one resize for the two of them
    crops = [
        _resize(image[None, :, y_min : y_max + 1, x_min : x_max + 1], both.shape[-2:])
        for image, (x_min, y_min, x_max, y_max) in zip(both, boxes.tolist(), strict=True)
    ]
    return torch.cat(crops).chunk(2, dim=1)


def _resize(images, size):
    resized = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def resize_views(views: torch.Tensor, size: int) -> torch.Tensor:
    """views (B, V, 3, S, S) in [0, 1] -> (B, V, 3, size, size), bicubic and antialiased, in [0, 1]."""
    if views.shape[-1] == size:
        return views
    return _resize(views.flatten(0, 1), (size, size)).unflatten(0, views.shape[:2])


def _require_finite(name, images):
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        raise UserError(
            f"{int((~finite).sum())} of {len(images)} samples have NaN or infinite pixels in the {name}: the "
            f"model that makes them has diverged, or overflows in float16 (use mixed_precision = 'bf16' or a "
            f"VAE made for float16)"
        )
