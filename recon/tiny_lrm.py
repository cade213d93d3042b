"""TinyLRM, a small reconstructor in the style of LRM and Instant3D: four posed views in, a triplane NeRF out.

In the large models a transformer learns which pixels belong to which triplane cell. Here the cameras say so: image
features are lifted into a coarse volume by projection, and the volume is folded into the three planes. That keeps the
model small enough to be trained on one CPU core. Everything after the planes (decoder, renderer) is LRM's.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from config.errors import MissingFileError, UserError, first_line
from recon.cameras import Cameras, instant3d_cameras, project
from recon.reconstructor import Reconstructor
from recon.volume_rendering import (
    RadianceField,
    Triplane,
    TriplaneDecoder,
    check_one_object,
    mlp_of_columns,
    occupancy_grid,
    render_occupied,
    render_scenes,
    triplane_field,
)
from recon.weights import check_weights, read_json, read_weights

RECONSTRUCT_BATCH = 4  # objects reconstructed at a time, which bounds the memory; more are slower on CPUs
SAMPLES = 48  # depths per ray inside the object's bounding box
CPU_POINTS = 4096  # points of an object decoded at a time, so that their activations stay in the processor cache
GPU_POINTS = 2**18  # and on a GPU, which wants few large pieces of work
OCCUPANCY = 24  # cells per side of the occupancy grid
OCCUPIED = 0.01  # optical thickness above which a cell is rendered


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return x + self.net(x)


class TinyLRM(Reconstructor):
    """width: channels of the image features; volume: cells per side of the volume that they are lifted to;
    voxel_channels: of a cell; plane_width: channels of the planes before refinement; plane_channels: of the finished
    planes, which have 2 * volume cells per side; hidden, layers: width and depth of the decoder's MLP."""

    num_views = 4
    input_size = 64
    takes_fewer_views = True  # the features of the views are averaged

    def __init__(
        self,
        width: int = 32,
        volume: int = 24,
        voxel_channels: int = 16,
        plane_width: int = 64,
        plane_channels: int = 16,
        hidden: int = 32,
        layers: int = 3,
    ):
        super().__init__()
        self.config = dict(
            width=width,
            volume=volume,
            voxel_channels=voxel_channels,
            plane_width=plane_width,
            plane_channels=plane_channels,
            hidden=hidden,
            layers=layers,
        )
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=2, padding=1), ResBlock(width))
        self.deep = nn.Sequential(
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            ResBlock(2 * width),
            ResBlock(2 * width),
            nn.Conv2d(2 * width, width, 1),
        )
        self.voxel = nn.Sequential(
            nn.Linear(2 * (width + 3) + 1, 2 * width), nn.SiLU(), nn.Linear(2 * width, voxel_channels), nn.SiLU()
        )
        self.fold = nn.ModuleList(nn.Conv2d(voxel_channels * volume, plane_width, 1) for _ in range(3))
        fine = plane_width * 3 // 4
        self.refine = nn.Sequential(
            ResBlock(plane_width),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(plane_width, fine, 3, padding=1),
            ResBlock(fine),
            nn.GroupNorm(8, fine),
            nn.SiLU(),
            nn.Conv2d(fine, plane_channels, 3, padding=1),
        )
        self.decoder = TriplaneDecoder(3 * plane_channels, hidden, layers)

    @staticmethod
    def input_cameras() -> Cameras:
        """Instant3D's four cameras."""
        return instant3d_cameras()

    def planes(self, views: torch.Tensor, cameras: Cameras) -> torch.Tensor:
        """Planes (B, 3, plane_channels, 2 * volume, 2 * volume) of views (B, V, 3, S, S) in [0, 1] on white, taken by
        `cameras`, V or (B, V)."""
        B, V = views.shape[:2]
        fine = self.stem((2 * views.flatten(0, 1) - 1).to(self.stem[0].weight.dtype))
        features = fine + F.interpolate(self.deep(fine), scale_factor=2, mode="bilinear")
        # raw colours are features too: without them the planes learn shape at once but colour only very slowly
        features = torch.cat([features.float(), F.avg_pool2d(views.flatten(0, 1), 2) - 0.5], 1)
        lifted = self._lift(features.unflatten(0, (B, V)), cameras)
        mean = lifted.mean(1)
        variance = sum((view - mean).square() for view in lifted.unbind(1)) / V
        spread = variance.mean(1, keepdim=True)  # photo-consistency, the cue of space carving
        volume = mlp_of_columns(self.voxel, torch.cat([mean, variance, spread], 1).to(fine.dtype))
        volume = volume.unflatten(2, [self.config["volume"]] * 3)  # batch, channel, z, y, x
        folded = (
            volume.flatten(1, 2),  # plane (x, y): z joins the channels
            volume.transpose(2, 3).flatten(1, 2),  # plane (x, z): rows are z, y joins the channels
            volume.transpose(2, 4).flatten(1, 2),  # plane (z, y): columns are z, x joins the channels
        )
        planes = torch.stack([fold(part) for fold, part in zip(self.fold, folded, strict=True)], 1).flatten(0, 1)
        # channels last: a quarter faster on CPUs
        return self.refine(planes.contiguous(memory_format=torch.channels_last)).unflatten(0, (B, 3))

    def _lift(self, features, cameras):
        """What the views' features (B, V, C, S, S) are where each cell of the volume is seen: (B, V, C, cells)."""
        G = self.config["volume"]
        centre = (torch.arange(G, device=features.device) + 0.5) / G * 2 - 1
        z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
        cells = torch.stack([x, y, z], -1).reshape(-1, 3)
        places = (project(cells, cameras)[0] * 2 - 1).expand(*features.shape[:2], -1, -1)
        lifted = F.grid_sample(features.flatten(0, 1), places.flatten(0, 1)[:, None], align_corners=False)
        return lifted[:, :, 0].unflatten(0, features.shape[:2])

    def set_dtype(self, dtype: torch.dtype) -> Self:
        """Set the precision of what makes the planes. Decoder, geometry and rendering stay in float32."""
        for network in (self.stem, self.deep, self.voxel, self.fold, self.refine):
            network.to(dtype)
        return self

    def field(self, planes: torch.Tensor) -> RadianceField:
        """The radiance field of planes (B, 3, C, H, W)."""
        return triplane_field(planes, self.decoder, GPU_POINTS if planes.is_cuda else CPU_POINTS)

    def radiance_field(self, scene: Triplane) -> RadianceField:
        """The radiance field of a scene, see `Reconstructor`. Raises ValueError if there is more than one object."""
        check_one_object(scene)
        return self.field(scene.planes)

    @torch.no_grad()
    def reconstruct(self, views: torch.Tensor, cameras: Cameras) -> Triplane:
        """views: (B, V, 3, 64, 64) in [0, 1] on white; cameras: V or (B, V)."""
        parts = zip(
            views.float().split(RECONSTRUCT_BATCH), cameras.expand(len(views)).split(RECONSTRUCT_BATCH), strict=True
        )
        return Triplane(torch.cat([self.planes(*part).float() for part in parts]))

    def ray_renderer(self, planes: torch.Tensor) -> Callable:
        """The renderer of one scene's planes (1, 3, C, H, W), as `volume_rendering.render_scenes` wants it."""
        field = self.field(planes)
        occupied = occupancy_grid(field, 1, OCCUPANCY, OCCUPIED, planes.device)[0]
        return partial(render_occupied, field, occupied, samples=SAMPLES)

    @torch.no_grad()
    def render(self, scene: Triplane, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return render_scenes(self.ray_renderer, scene.planes, cameras, size, self.chunk_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, the weights in float16."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """The model of a folder that `save_pretrained` wrote.

        Raises MissingFileError or UserError with one sentence."""
        folder, remedy = Path(checkpoint), "make it with `python -m tiny.train_lrm` or correct the path"
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise MissingFileError(f"recon.checkpoint = {str(folder)!r} has no {name}; {remedy}.")
        config = read_json(folder / "config.json", remedy)
        try:
            model = cls(**config)
        except Exception as error:  # of many kinds: unknown keys, words for numbers, sizes that do not fit together
            raise UserError(
                f"{folder / 'config.json'} is not a configuration of TinyLRM ({first_line(error)}); {remedy}."
            ) from error
        weights = read_weights(folder / "model.safetensors")
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        check_weights(weights, shapes, f"the TinyLRM that {folder / 'config.json'} describes", "files of one model")
        model.load_state_dict({key: value.float() for key, value in weights.items()})
        return model.eval()
