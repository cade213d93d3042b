"""A coloured mesh of a radiance field, for programs that know nothing of radiance fields."""

import numpy as np
import torch
from skimage.measure import marching_cubes

DENSITY = 10.0  # per unit length: where the surface of a field is taken to be
POINTS = 65536  # evaluated at a time


@torch.no_grad()
def extract_mesh(field, resolution=128, density=DENSITY, device=None):
    """Marching cubes in the box [-1, 1]^3: vertices (N, 3), faces (M, 3) int, colours (N, 3) in [0, 1], numpy.

    field: points (1, P, 3) -> density (1, P) per unit length, colour (1, P, 3). Raises ValueError if nothing in the box
    is so dense."""
    axis = torch.linspace(-1, 1, resolution, device=device)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    grid = torch.cat([field(part[None])[0][0] for part in points.split(POINTS)]).reshape([resolution] * 3).cpu().numpy()
    # the border is empty, so that what touches it is closed there
    grid[[0, -1]] = grid[:, [0, -1]] = grid[:, :, [0, -1]] = 0
    if grid.max() <= density:
        raise ValueError(
            f"the densest point of the scene has {grid.max():.2f}, below the {density} of a surface: nothing was "
            f"reconstructed; look at the views."
        )
    spacing = [2 / (resolution - 1)] * 3
    vertices, faces, _, _ = marching_cubes(grid, density, spacing=spacing, gradient_direction="ascent")  # look outwards
    vertices = vertices.astype(np.float32) - 1
    corners = torch.from_numpy(vertices).to(device)
    colours = torch.cat([field(part[None])[1][0] for part in corners.split(POINTS)]).clamp(0, 1).cpu().numpy()
    return vertices, faces, colours


def save_mesh_ply(file, vertices, faces, colours):
    """Write a binary .ply with colours of the vertices in 8 bits; shapes as `extract_mesh` returns them."""
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
