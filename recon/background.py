"""Removing backgrounds: the reconstructors and the reward count whatever is not white as part of the object."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from config.errors import UserError


def background_remover() -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that cuts the objects out of views (B, V, 3, S, S) in [0, 1] with `rembg` and puts them on white.

    Raises UserError if rembg is not installed."""
    try:
        import rembg
    except ImportError as error:
        raise UserError(
            "config.recon.remove_background is True, but rembg is not installed: `pip install rembg`, or set it to "
            "False if the painter paints on white."
        ) from error
    session = rembg.new_session()

    def remove(views: torch.Tensor) -> torch.Tensor:
        on_white = [_put_on_white(view, rembg, session) for view in views.flatten(0, 1)]
        return torch.stack(on_white).to(views).view_as(views)

    return remove


def _put_on_white(view, rembg, session):
    """View (3, S, S) on any device -> the same on the CPU, its object on white."""
    image = Image.fromarray((view * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    cutout = rembg.remove(image, session=session).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", cutout.size, "white"), cutout).convert("RGB")
    return torch.from_numpy(np.array(on_white)).permute(2, 0, 1) / 255
