"""Rewards that need no 3D: DDPO's JPEG size. A trainer that cannot raise these within a few epochs is broken."""

import io
import math

import torch
from PIL import Image

JPEG_QUALITY = 95


def jpeg_incompressibility(views: torch.Tensor) -> torch.Tensor:
    """Size in kB (1000 bytes) of each sample's JPEG at quality 95; more detail is rewarded.

    views: (B, V, 3, S, S) in [0, 1], tiled into one picture per sample. Returns (B,) float32 on the device of `views`.
    """
    pictures = (tile_views(views) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = [_jpeg_bytes(picture) / 1000 for picture in pictures]
    return torch.tensor(sizes, dtype=torch.float32, device=views.device)


def jpeg_compressibility(views: torch.Tensor) -> torch.Tensor:
    """The negative of `jpeg_incompressibility`; smooth pictures are rewarded."""
    return -jpeg_incompressibility(views)


def tile_views(views: torch.Tensor) -> torch.Tensor:
    """(B, V, 3, H, W) -> (B, 3, rows * H, columns * W), row by row; a square if V allows it, else one row."""
    rows = math.isqrt(views.shape[1])
    rows = rows if rows**2 == views.shape[1] else 1
    grid = views.unflatten(1, (rows, -1))  # (B, rows, columns, 3, H, W)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _jpeg_bytes(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell()
