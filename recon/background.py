"""Painters do not always paint on white, and everything behind them counts what is not white as part of the object.

What the sculptors assume, all of them: one object on white inside [-1, 1]^3, whose whole outline is in every view. LGM and
GRM were trained on objects that fill most of the view; OpenLRM on objects at distance 2 in a view of 67.4 degrees.
"""

import numpy as np
import torch
from PIL import Image

WHITE = 0.95  # as in mrc.bounding_box: a pixel is object if any channel is darker


def background_is_white(views):
    """Whether most of each sample's border pixels are white: views (B, V, 3, S, S) in [0, 1] -> (B,) bool."""
    return _coloured_border(views).mean(1) < 0.5


def object_is_cut(views):
    """Whether an object on white leaves one of its views, so that the sculptor cannot know its size: views
    (B, V, 3, S, S) in [0, 1] -> (B,) bool, True if a tenth of a view's border is not white."""
    return background_is_white(views) & (_coloured_border(views) > 0.1).any(1)


def _coloured_border(views):
    """The share of each view's border pixels that are not white: (B, V)."""
    coloured = (views < WHITE).any(2).float()
    border = torch.cat([coloured[..., 0, :], coloured[..., -1, :], coloured[..., :, 0], coloured[..., :, -1]], -1)
    return border.mean(-1)


def background_remover():
    """A function views (B, V, 3, S, S) in [0, 1] -> the same with their objects on white, by `rembg`.

    Raises ValueError if rembg is not installed."""
    try:
        import rembg
    except ImportError as error:
        raise ValueError("config.recon.remove_background is True, but rembg is not installed: `pip install rembg`, or set "
                         "it to False if the painter paints on white.") from error
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
