"""From the pictures of a validation back to objects that a page can turn: meshes as .glb, Gaussians as .splat.

Both are in the format's own axes and contain the cameras of the views as small pyramids."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh

from ddpo.pictures import load_views
from mrc.mrc import resize_views
from recon.cameras import Cameras
from recon.gaussian_splatting import Gaussians
from recon.mesh import extract_mesh
from recon.reconstructor import Reconstructor

RESOLUTION = 48  # points per side of the box in which a mesh is extracted
GRID = 2048  # positions are rounded to 1/GRID, which nobody sees and a compressor likes
MOST_GAUSSIANS = 12_000  # of an object, the most visible ones
PYRAMID = 0.3  # height of a camera's pyramid
LINE = (0.30, 0.45, 0.75)  # its colour, RGB in [0, 1]
LINE_WIDTH = 0.006  # standard deviation of the Gaussians that draw it


@dataclass
class Scene:
    """One object. kind: "glb" or "splat"; data: the file's bytes; problem: why there is none, else ""."""

    kind: str
    data: bytes
    problem: str = ""


def scenes_of_pictures(
    reconstructor: Reconstructor, files: Sequence[Path], on_white: Callable | None = None
) -> Iterator[Scene]:
    """The objects that `reconstructor` makes of the painted views in pictures that a validation wrote, one by one.

    on_white: of `recon.background_remover`, where the reward removes the views' backgrounds too."""
    for file in files:
        try:
            views = load_views(file)["views"][None].float() / 255
        except ValueError as error:
            yield Scene("", b"", str(error))
            continue
        views = on_white(views) if on_white else views
        yield scene_of_views(reconstructor, views.to(reconstructor.device))


@torch.no_grad()
def scene_of_views(reconstructor: Reconstructor, views: torch.Tensor) -> Scene:
    """The object that `reconstructor` makes of views (1, V, 3, S, S) in [0, 1] at its cameras."""
    if views.shape[1] != reconstructor.num_views:
        return Scene("", b"", f"{views.shape[1]} views, but the reconstructor takes {reconstructor.num_views}")
    cameras = reconstructor.cameras
    return encode(reconstructor, reconstructor.reconstruct(resize_views(views, reconstructor.input_size), cameras))


def encode(reconstructor: Reconstructor, scene) -> Scene:
    """A scene (batch of 1) that `reconstructor` made: Gaussians as they are, a radiance field as a mesh."""
    cameras = reconstructor.cameras.to("cpu")
    if isinstance(scene, Gaussians):
        return Scene("splat", splat(scene, cameras))
    try:
        field, device = reconstructor.radiance_field(scene), reconstructor.device
        return Scene("glb", glb(*extract_mesh(field, RESOLUTION, device=device), cameras))
    except ValueError as error:
        return Scene("glb", b"", str(error))


# -- meshes ------------------------------------------------------------------------------------------------------------


def glb(vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, cameras: Cameras) -> bytes:
    """A mesh as `extract_mesh` returns it, with the pyramids of `cameras` (V,), as binary glTF (y up), unlit."""
    scene = trimesh.Scene()
    mesh = trimesh.Trimesh(_y_up(vertices), faces, vertex_colors=_linear_bytes(colours), process=False)
    scene.add_geometry(mesh, "object")
    strips = _y_up(pyramids(cameras))
    for i, strip in enumerate(strips):
        line = trimesh.path.entities.Line(np.arange(len(strip)), color=_linear_bytes(np.array(LINE)))
        scene.add_geometry(trimesh.path.Path3D([line], strip, process=False), f"camera {i + 1}")
    return scene.export(file_type="glb", tree_postprocessor=_unlit)


def _unlit(tree):
    """The colours of a radiance field are seen colours already; a light would shade them twice."""
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


def pyramids(cameras: Cameras) -> np.ndarray:
    """The view frusta of `cameras` (V,) as pyramids of height PYRAMID, each one line through all its edges: (V, 11, 3).

    The pyramid's tip is the camera; its base is what the picture's edges see."""
    half = 0.5 / cameras.fxfycxcy[:, 0]
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])  # of the picture, from above left
    rays = torch.cat([corners * half[:, None, None], torch.ones(len(cameras), 4, 1)], -1)
    base = PYRAMID * rays @ cameras.c2w[:, :3, :3].transpose(1, 2) + cameras.c2w[:, None, :3, 3]
    points = torch.cat([cameras.c2w[:, None, :3, 3], base], 1)
    return points[:, [0, 1, 2, 0, 3, 2, 3, 4, 0, 4, 1]].numpy()


# -- Gaussians ---------------------------------------------------------------------------------------------------------

RECORD = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("colour", "u1", 4), ("quaternion", "u1", 4)])


def splat(gaussians: Gaussians, cameras: Cameras) -> bytes:
    """One scene (batch of 1) and the pyramids of `cameras` in the 32 bytes per Gaussian of antimatter15's .splat.

    Of an object the MOST_GAUSSIANS with the largest opacity times area are kept."""
    means, opacities, scales, quaternions, colours = (value[0].detach().cpu().float() for value in gaussians.tensors())
    area = scales.sort(-1, descending=True).values[:, :2].prod(-1)
    keep = (opacities * area).argsort(descending=True)[:MOST_GAUSSIANS]
    rows = np.zeros(len(keep), RECORD)
    rows["mean"] = torch.round(means[keep] * GRID) / GRID
    rows["scale"] = scales[keep].half().float()
    rows["colour"] = _bytes(torch.cat([colours, opacities[:, None]], -1)[keep])
    unit = torch.nn.functional.normalize(quaternions[keep], dim=-1)
    rows["quaternion"] = (128 * unit + 128).round().clamp(0, 255).byte()
    return rows.tobytes() + _line_gaussians(torch.from_numpy(pyramids(cameras))).tobytes()


def _line_gaussians(strips):
    """Lines (V, P, 3) as round Gaussians, close enough together to look like one."""
    start, step = strips[:, :-1], strips.diff(dim=1)
    count = int(np.ceil(step.norm(dim=-1).max().item() / (2 * LINE_WIDTH)))
    share = (torch.arange(count) / count)[:, None]
    rows = np.zeros(start.shape[0] * start.shape[1] * count, RECORD)
    rows["mean"] = (start[:, :, None] + share * step[:, :, None]).flatten(0, 2)
    rows["scale"] = LINE_WIDTH
    rows["colour"] = _bytes(torch.tensor([*LINE, 1.0]))
    rows["quaternion"] = (255, 128, 128, 128)  # no rotation
    return rows


def _bytes(values):
    return (255 * values.clamp(0, 1)).round().byte()
