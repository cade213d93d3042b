"""MEt3R (Asim et al., CVPR 2025, arXiv:2501.06336), the public measure of consistency that needs no cameras.

MASt3R places two views in space, and DINO's features of one are compared with those of the other where both see the
object. The package and its weights are not among this repository's, and it needs a GPU:

    pip install git+https://github.com/mohammadasim98/met3r

What it is weak at: views that face each other, or stand at right angles as those of Carve3D do, overlap little, and
MASt3R was trained on photographs of scenes. White background agrees with white background, so that small objects look
consistent. A number of its own means little; compare painters on the same prompts, and believe other judges first.
"""

import torch

from config.errors import UserError, first_line
from mrc.mrc import resize_views

SIZE = 256  # pixels per side of the views that it compares, as published
REMEDY = "install it with `pip install git+https://github.com/mohammadasim98/met3r`, or leave --met3r out"


class MEt3RDistance:
    """`MEt3RDistance(device)(views) -> (B,)`: mean over neighbouring views of 1 - cosine of their features, 0 to 2.

    Raises UserError if the package, or a weight that it downloads, cannot be loaded."""

    def __init__(self, device: torch.device | str):
        try:
            from met3r import MEt3R

            self.metric = MEt3R(
                img_size=SIZE,
                use_norm=True,
                backbone="mast3r",
                feature_backbone="dino16",
                feature_backbone_weights="mhamilton723/FeatUp",
                upsampler="featup",
                distance="cosine",
                freeze=True,
            ).to(device)
        except Exception as error:  # of many kinds: not installed, not downloaded, built for another torch
            raise UserError(f"the package met3r could not be loaded ({first_line(error)}): {REMEDY}") from error
        self.device = device

    @torch.no_grad()
    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """views: (B, V, 3, S, S) in [0, 1], each beside the next and the last beside the first. Returns (B,).

        A pair in which nothing overlaps counts 1, as features that have nothing in common; the package says 0 then,
        which would be perfect."""
        views = 2 * resize_views(views.float().to(self.device), SIZE) - 1
        pairs = torch.stack([views, views.roll(-1, 1)], 2).flatten(0, 1)  # (B * V, 2, 3, SIZE, SIZE)
        distances, overlap = self.metric(images=pairs, return_overlap_mask=True)
        distances = torch.where(overlap.flatten(1).any(1), distances, 1.0)
        return distances.unflatten(0, views.shape[:2]).mean(1)
