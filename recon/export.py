"""Scenes of Gaussians as files for other programs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from recon.gaussian_splatting import Gaussians

SH_0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic
PROPERTIES = (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
)  # of a vertex, in the order of the file

SPLAT = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("colour", "u1", 4), ("quaternion", "u1", 4)])
GRID = 2048  # positions in .splat files are rounded to 1/GRID, which nobody sees and compressors like
LINE = (0.30, 0.45, 0.75, 1.0)  # colour of lines, RGBA in [0, 1]
LINE_WIDTH = 0.006  # standard deviation of the Gaussians that draw them


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


def gaussians_splat(gaussians: Gaussians, most: int, lines: Sequence[np.ndarray] = ()) -> bytes:
    """One scene (batch of 1) in the layout of antimatter15's .splat files, 32 bytes for each Gaussian: position and
    scales as float32, RGBA and quaternion (w, x, y, z) as bytes.

    most: how many Gaussians are kept, those with the largest opacity times area. lines: more to show, each through the
    points (P, 3). Raises ValueError if there is not exactly one scene."""
    if len(gaussians) != 1:
        raise ValueError(f"a .splat file holds one scene, but there are {len(gaussians)}; choose one of them")
    means, opacities, scales, quaternions, colours = (value[0].detach().cpu().float() for value in gaussians.tensors())
    area = scales.sort(-1, descending=True).values[:, :2].prod(-1)
    keep = (opacities * area).argsort(descending=True)[:most]
    rows = np.zeros(len(keep), SPLAT)
    rows["mean"] = torch.round(means[keep] * GRID) / GRID
    rows["scale"] = scales[keep].half().float()
    rows["colour"] = _bytes(torch.cat([colours, opacities[:, None]], -1)[keep])
    rows["quaternion"] = (128 * F.normalize(quaternions[keep], dim=-1) + 128).round().clamp(0, 255).byte()
    return rows.tobytes() + b"".join(_line_of_gaussians(points).tobytes() for points in lines)


def _line_of_gaussians(points):
    """A line through points (P, 3): round Gaussians two standard deviations apart."""
    parts = []
    for start, end in zip(points[:-1], points[1:], strict=True):
        count = max(1, math.ceil(np.linalg.norm(end - start) / (2 * LINE_WIDTH)))
        parts.append(start + np.arange(count)[:, None] / count * (end - start))
    means = np.concatenate(parts)
    rows = np.zeros(len(means), SPLAT)
    rows["mean"], rows["scale"] = means, LINE_WIDTH
    rows["colour"] = _bytes(torch.tensor(LINE))
    rows["quaternion"] = (255, 128, 128, 128)  # no rotation
    return rows


def _bytes(values):
    return (255 * values.clamp(0, 1)).round().byte()
