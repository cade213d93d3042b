"""Painters do not always paint on white, and everything behind them counts what is not white as part of the object.

What the sculptors assume, all of them: one object on white inside [-1, 1]^3, whose whole outline is in every view. LGM
and GRM were trained on objects that fill most of the view; OpenLRM on objects at distance 2 in a view of 67.4 degrees.
"""

import numpy as np
import torch
from PIL import Image


def background_remover():
    """A function views (B, V, 3, S, S) in [0, 1] -> the same with their objects on white, by `rembg`.

    Raises ValueError if rembg is not installed."""
    try:
        import rembg
    except ImportError as error:
        raise ValueError(
            "config.recon.remove_background is True, but rembg is not installed: `pip install rembg`, or set "
            "it to False if the painter paints on white."
        ) from error
    session = rembg.new_session()

    def remove(views):
        cut = [_on_white(view, rembg, session) for view in views.flatten(0, 1)]
        return torch.stack(cut).to(views).view_as(views)

    return remove


def _on_white(view, rembg, session):
    picture = Image.fromarray((view * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    cut = rembg.remove(picture, session=session).convert("RGBA")
    cut = Image.alpha_composite(Image.new("RGBA", cut.size, "white"), cut).convert("RGB")
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
