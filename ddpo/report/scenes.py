"""From the pictures of a validation back to objects that a page can turn: meshes as .glb, Gaussians as .splat.

Both are in the format's own axes and contain the cameras of the views as small pyramids."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpo.pictures import load_views
from mrc.mrc import resize_views
from recon.cameras import Cameras
from recon.export import gaussians_splat
from recon.gaussian_splatting import Gaussians
from recon.mesh import extract_mesh, mesh_glb
from recon.reconstructor import Reconstructor

RESOLUTION = 48  # points per side of the box in which a mesh is extracted
MOST_GAUSSIANS = 12_000  # of an object, the most visible ones
PYRAMID = 0.3  # height of a camera's pyramid


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
    lines = pyramids(reconstructor.cameras.to("cpu"))
    if isinstance(scene, Gaussians):
        return Scene("splat", gaussians_splat(scene, MOST_GAUSSIANS, lines))
    try:
        field, device = reconstructor.radiance_field(scene), reconstructor.device
        return Scene("glb", mesh_glb(*extract_mesh(field, RESOLUTION, device=device), lines))
    except ValueError as error:
        return Scene("glb", b"", str(error))


def pyramids(cameras: Cameras) -> np.ndarray:
    """The view frusta of `cameras` (V,) as pyramids of height PYRAMID, each one line through all its edges: (V, 11, 3).

    The pyramid's tip is the camera; its base is what the picture's edges see."""
    half = 0.5 / cameras.fxfycxcy[:, 0]
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])  # of the picture, from above left
    rays = torch.cat([corners * half[:, None, None], torch.ones(len(cameras), 4, 1)], -1)
    base = PYRAMID * rays @ cameras.c2w[:, :3, :3].transpose(1, 2) + cameras.c2w[:, None, :3, 3]
    points = torch.cat([cameras.c2w[:, None, :3, 3], base], 1)
    return points[:, [0, 1, 2, 0, 3, 2, 3, 4, 0, 4, 1]].numpy()
