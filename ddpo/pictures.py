"""Samples as pictures: views object by object, such as painted views over re-rendered views."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from config.errors import UserError
from ddpo.files import whole

SIDE = (96, 256)  # about the smallest and the largest side in pixels of a view in a picture
CAPTION = 26  # height in pixels of the two lines of text above an object
GAP = 8  # pixels between objects


def sample_picture(
    rows: dict[str, torch.Tensor], notes: Sequence[str], captions: Sequence[str], columns: int = 4
) -> Image.Image:
    """N objects, each with a caption, a note, and one row of views for each entry of `rows`.

    rows: label -> views (N, V, 3, S, S) in [0, 1]; notes, captions: N strings.
    """
    N, V, _, _, S = next(iter(rows.values())).shape
    side = min(S * max(1, round(SIDE[0] / S)), SIDE[1])
    width, height = V * side, len(rows) * side
    columns = min(columns, N)
    canvas = Image.new("RGB", (columns * (width + GAP), -(-N // columns) * (height + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for n in range(N):
        x, y = (n % columns) * (width + GAP), (n // columns) * (height + CAPTION + GAP)
        draw.text((x + 2, y), captions[n][: width // 6], fill="black")
        draw.text((x + 2, y + CAPTION // 2 - 1), notes[n], fill="black")
        for r, (label, row) in enumerate(rows.items()):
            canvas.paste(_strip(row[n], side), (x, y + CAPTION + r * side))
            draw.text((x + 2, y + CAPTION + r * side), label, fill="gray")
        draw.rectangle([x - 1, y + CAPTION - 1, x + width, y + CAPTION + height], outline="lightgray")
    return canvas


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] on any device -> uint8 in host memory."""
    return (images * 255).round().byte().cpu()


def save_views(rows: dict[str, torch.Tensor], file: Path) -> None:
    """Write a sample's rows of views, label -> (V, 3, S, S) uint8, as a PNG: one strip above the other, all pixels.

    The file is never seen half-written."""
    pixels = torch.cat([_pixels(views) for views in rows.values()])
    text = PngInfo()
    text.add_text("rows", json.dumps({label: len(views) for label, views in rows.items()}))
    with whole(file) as partial:
        Image.fromarray(pixels.cpu().numpy()).save(partial, pnginfo=text)


def load_views(file: Path) -> dict[str, torch.Tensor]:
    """What `save_views` wrote: label -> (V, 3, S, S) uint8. Raises UserError for another file."""
    try:
        with Image.open(file) as picture:
            rows = json.loads(picture.text["rows"])
            pixels = torch.from_numpy(np.array(picture))
        return {
            label: strip.unflatten(1, (count, -1)).permute(1, 3, 0, 2)
            for (label, count), strip in zip(rows.items(), pixels.chunk(len(rows)), strict=True)
        }
    except Exception as error:  # of many kinds: no file, no picture, no text in it, or one that does not fit its pixels
        raise UserError(
            f"{file} is missing or not a picture of views that a run wrote: give the run's own file"
        ) from error


def _pixels(views):
    """Views (V, 3, S, S) side by side: (S, V * S, 3)."""
    V, _, S, _ = views.shape
    return views.permute(2, 0, 3, 1).reshape(S, V * S, 3)


def _strip(views, side):
    """Views (V, 3, S, S) in [0, 1] side by side, each `side` pixels wide: a PIL image."""
    V, _, S, _ = views.shape
    pixels = (_pixels(views).float().clamp(0, 1) * 255).round().byte()
    resampling = Image.Resampling.NEAREST if side >= S else Image.Resampling.BOX
    return Image.fromarray(pixels.cpu().numpy()).resize((V * side, side), resampling)
