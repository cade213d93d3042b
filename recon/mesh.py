"""Coloured meshes of radiance fields, for programs that cannot render the fields themselves."""

from pathlib import Path

import numpy as np
import torch
from skimage.measure import marching_cubes

from config.errors import UserError
from recon.volume_rendering import RadianceField

DENSITY = 10.0  # per unit length, of the level set that is taken as the surface
POINTS = 65536  # evaluated at a time, which bounds the memory


@torch.no_grad()
def extract_mesh(
    field: RadianceField,
    resolution: int = 128,
    density: float = DENSITY,
    device: str | torch.device | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The level set of a radiance field in the box [-1, 1]^3, by marching cubes (Lorensen and Cline 1987).

    field: of one scene on `device`, such as a reconstructor's `radiance_field(scene)`. resolution: points per side of
    the box; density: of the level set.
    Returns vertices (N, 3), faces (M, 3) counter-clockwise seen from outside, and the vertices' colours (N, 3) in
    [0, 1]. Raises ValueError if nothing in the box is that dense."""
    axis = torch.linspace(-1, 1, resolution, device=device)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    grid = torch.cat([field(part[None])[0][0] for part in points.split(POINTS)]).reshape([resolution] * 3).cpu().numpy()
    # an empty border closes the surfaces that reach it
    grid[[0, -1]] = grid[:, [0, -1]] = grid[:, :, [0, -1]] = 0
    if grid.max() <= density:
        raise UserError(
            f"the scene's highest density is {grid.max():.2f}, below the {density} of a surface: nothing was "
            f"reconstructed; look at the views."
        )
    spacing = [2 / (resolution - 1)] * 3
    # "ascent" orients the faces outwards
    vertices, faces, _, _ = marching_cubes(grid, density, spacing=spacing, gradient_direction="ascent")
    vertices = vertices.astype(np.float32) - 1
    corners = torch.from_numpy(vertices).to(device)
    colours = torch.cat([field(part[None])[1][0] for part in corners.split(POINTS)]).clamp(0, 1).cpu().numpy()
    return vertices, faces, colours


def save_mesh_ply(file: str | Path, vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray) -> None:
    """Write a binary PLY file with 8-bit vertex colours; shapes and ranges as `extract_mesh` returns them."""
    vertex = np.empty(
        len(vertices), [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    )
    for i, name in enumerate("xyz"):
        vertex[name] = vertices[:, i]
    for i, name in enumerate(("red", "green", "blue")):
        vertex[name] = np.round(255 * colours[:, i])
    face = np.empty(len(faces), [("count", "u1"), ("indices", "<i4", 3)])
    face["count"], face["indices"] = 3, faces
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(vertex)}",
        *(f"property float {name}" for name in "xyz"),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
        f"element face {len(face)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ]
    with open(file, "wb") as handle:
        handle.write("\n".join(header).encode())
        handle.write(vertex.tobytes())
        handle.write(face.tobytes())
