"""Where the object is in a view. Boxes are (..., 4) int64: x_min, y_min, x_max, y_max in pixels, inclusive."""

import torch

BACKGROUND = 0.95  # a pixel is foreground if any channel is darker
PADDING = 5  # pixels around the square box


def foreground_mask(images: torch.Tensor) -> torch.Tensor:
    """images (..., 3, H, W) in [0, 1] on white -> (..., H, W) bool, True where any channel is below 0.95."""
    return (images < BACKGROUND).any(dim=-3)


def is_empty(foreground: torch.Tensor, min_foreground: float) -> torch.Tensor:
    """Which views show nothing: foreground, any shape, the share of a view that is foreground -> bool of that shape.

    min_foreground: a smaller share counts as none, in [0, 1)."""
    return (foreground == 0) | (foreground < min_foreground)


def compute_bounding_box(images: torch.Tensor) -> torch.Tensor:
    """The tight box of the foreground: images (..., 3, H, W) in [0, 1] -> (..., 4) int64.

    An image without foreground gets [0, 0, 0, 0], as published (which is why `mrc.mrc` checks for empty views).
    """
    mask = foreground_mask(images)
    bounds = [_first_and_last(mask.any(dim=d)) for d in (-2, -1)]  # over columns (x), over rows (y)
    (x_min, x_max), (y_min, y_max) = bounds
    return torch.stack([x_min, y_min, x_max, y_max], dim=-1)


def make_square_bbox(box: torch.Tensor) -> torch.Tensor:
    """Grow the shorter side on both ends by ceil(difference / 2): (..., 4) -> (..., 4) int64.

    For an odd difference the result is therefore one pixel longer in the grown direction, not quite a square. That is
    what the published reward computes, kept so that rewards are comparable. The result may leave the image: see
    `crop_box`.
    """
    x_min, y_min, x_max, y_max = torch.as_tensor(box).unbind(dim=-1)
    excess = (x_max - x_min) - (y_max - y_min)  # > 0: wider than high
    grow_x = ((-excess).clamp(min=0) + 1) // 2
    grow_y = (excess.clamp(min=0) + 1) // 2
    return torch.stack([x_min - grow_x, y_min - grow_y, x_max + grow_x, y_max + grow_y], dim=-1)


def crop_box(box: torch.Tensor, height: int, width: int, padding: int = PADDING) -> torch.Tensor:
    """The box padded by `padding` pixels on every side and clamped to a height x width image: (..., 4) -> (..., 4)."""
    box = torch.as_tensor(box)
    box = box + box.new_tensor([-padding, -padding, padding, padding])
    largest = box.new_tensor([width - 1, height - 1, width - 1, height - 1])
    return torch.minimum(box.clamp(min=0), largest)


def _first_and_last(occupied):
    """Indices of the first and the last True of (..., N); 0 and 0 if there is none."""
    n = occupied.shape[-1]
    index = torch.arange(n, device=occupied.device)
    last = torch.where(occupied, index, 0).amax(dim=-1)
    first = torch.where(occupied, index, n).amin(dim=-1)
    return torch.where(occupied.any(dim=-1), first, 0), last


def background_is_white(views: torch.Tensor) -> torch.Tensor:
    """Whether most of each sample's border pixels are white: views (B, V, 3, S, S) in [0, 1] -> (B,) bool."""
    return _border_foreground(views).mean(1) < 0.5


def object_is_cut(views: torch.Tensor) -> torch.Tensor:
    """Whether an object on white leaves one of its views, so that its size is unknown to a reconstructor.

    views: (B, V, 3, S, S) in [0, 1]. Returns (B,) bool, True if a tenth of a view's border is not white."""
    return background_is_white(views) & (_border_foreground(views) > 0.1).any(1)


def _border_foreground(views):
    """The share of each view's border pixels that are foreground: (B, V)."""
    mask = foreground_mask(views).float()
    return torch.cat([mask[..., 0, :], mask[..., -1, :], mask[..., :, 0], mask[..., :, -1]], -1).mean(-1)
