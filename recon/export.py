"""Scenes of Gaussians as files for other programs."""

import math
from pathlib import Path

import numpy as np
import torch

from recon.gaussian_splatting import Gaussians

SH_0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic
PROPERTIES = (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
)  # of a vertex, in the order of the file


def save_gaussians_ply(gaussians: Gaussians, file: str | Path) -> None:
    """Write one scene (batch of 1) as a binary PLY in the layout of 3D Gaussian splatting (Kerbl et al. 2023).

    The file holds colours as (rgb - 0.5) / SH_0, opacities as logits, scales as logarithms, quaternions as (w, x, y, z)
    and zeros for normals. Opacities are kept 1e-6 away from 0 and 1, and scales above 1e-10, so that every number is
    finite. Raises ValueError if there is not exactly one scene."""
    if len(gaussians) != 1:
        raise ValueError(f"a PLY file holds one scene and there are {len(gaussians)}; choose one, as in gaussians[0]")
    means, opacities, scales, quaternions, colours = (value[0].detach().cpu().double() for value in gaussians.tensors())
    table = torch.cat(
        [
            means,
            torch.zeros_like(means),
            (colours - 0.5) / SH_0,
            opacities[:, None].clamp(1e-6, 1 - 1e-6).logit(),
            scales.clamp(min=1e-10).log(),
            quaternions,
        ],
        -1,
    )
    vertices = np.ascontiguousarray(table.numpy(), "<f4").view([(name, "<f4") for name in PROPERTIES])
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(table)}",
        *(f"property float {name}" for name in PROPERTIES),
        "end_header",
        "",
    ]
    with open(file, "wb") as handle:
        handle.write("\n".join(header).encode("ascii"))
        handle.write(vertices.tobytes())
