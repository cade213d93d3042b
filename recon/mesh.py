"""Coloured meshes of radiance fields, for programs that cannot render the fields themselves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import trimesh
from skimage.measure import marching_cubes

from config.errors import UserError
from recon.volume_rendering import RadianceField

DENSITY = 10.0  # per unit length, of the level set that is taken as the surface
POINTS = 65536  # evaluated at a time, which bounds the memory
GRID = 2048  # positions in .glb files are rounded to 1/GRID, which nobody sees and compressors like
LINE = (0.30, 0.45, 0.75)  # colour of lines, RGB in [0, 1]


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


def mesh_glb(vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, lines: Sequence[np.ndarray] = ()) -> bytes:
    """The bytes of a binary glTF file (y up) with 8-bit vertex colours, shown as they are: colours of a radiance field
    are seen colours already, and a light would shade them twice.

    Shapes and ranges as `extract_mesh` returns them; lines: more to show, each through the points (P, 3)."""
    scene = trimesh.Scene()
    mesh = trimesh.Trimesh(_y_up(vertices), faces, vertex_colors=_linear_bytes(colours), process=False)
    scene.add_geometry(mesh, geom_name="object")
    for i, points in enumerate(lines, 1):
        line = trimesh.path.entities.Line(np.arange(len(points)), color=_linear_bytes(np.array(LINE)))
        scene.add_geometry(trimesh.path.Path3D([line], _y_up(points), process=False), geom_name=f"line {i}")
    return scene.export(file_type="glb", tree_postprocessor=_unlit)


def _unlit(tree):
    tree["extensionsUsed"] = ["KHR_materials_unlit"]
    tree["materials"] = [{"extensions": {"KHR_materials_unlit": {}}, "doubleSided": True}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


def _y_up(points):
    """World points (..., 3), z up -> glTF's, y up."""
    points = np.round(np.asarray(points, dtype=np.float32) * GRID) / GRID
    return np.stack([points[..., 0], points[..., 2], -points[..., 1]], -1)


def _linear_bytes(colours):
    """sRGB (..., 3) in [0, 1] -> linear RGBA bytes, as glTF wants the colours of vertices (IEC 61966-2-1)."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    opaque = np.ones((*linear.shape[:-1], 1))
    return np.round(255 * np.concatenate([linear, opaque], -1)).astype(np.uint8)
