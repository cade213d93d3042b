"""Scenes as files that other programs open."""

import math

import numpy as np
import torch

SH_0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic
PROPERTIES = (
    "x",
    "y",
    "z",
    "nx",
    "ny",
    "nz",
    "f_dc_0",
    "f_dc_1",
    "f_dc_2",
    "opacity",
    "scale_0",
    "scale_1",
    "scale_2",
    "rot_0",
    "rot_1",
    "rot_2",
    "rot_3",
)


def save_gaussians_ply(gaussians, path):
    """Write one scene (`recon.gaussian_splatting.Gaussians` of batch size 1, ValueError otherwise) as a binary PLY in
    the layout of 3D Gaussian splatting: colour as (rgb - 0.5) / SH_0, opacity as logit, scale as logarithm, quaternion
    (w, x, y, z), normals zero.

    Opacities are kept 1e-6 away from 0 and 1 and scales above 1e-10, so that every number is finite."""
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
    with open(path, "wb") as file:
        file.write("\n".join(header).encode("ascii"))
        file.write(vertices.tobytes())
