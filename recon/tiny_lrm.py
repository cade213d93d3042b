"""A small sparse-view large-reconstruction-model: posed views in, triplane NeRF out, in the style of LRM and Instant3D.

Where the big models let a transformer find out which pixels speak of which triplane cell, this one is told: the image
features are lifted into a coarse volume through the cameras, and the volume is folded into the three planes. That keeps
the model small enough to be trained on one CPU core; everything after the planes (decoder, renderer) is LRM's.
"""

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from recon.cameras import Cameras, instant3d_cameras, project
from recon.volume_rendering import (
    Triplane,
    TriplaneDecoder,
    occupancy_grid,
    render_images,
    render_occupied,
    triplane_field,
)

RECONSTRUCT_BATCH = 8  # scenes reconstructed at a time: bounds the memory
SAMPLES = 48  # depths of a ray inside the box around the object
POINTS = 4096  # points of an object decoded at a time: their activations stay in the processor cache
OCCUPANCY = 24  # cells per side of the grid that tells where there is anything to render


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


class TinyLRM(nn.Module):
    """width: channels of the image features; volume: cells per side that they are lifted to, with `voxel_channels`
    each; plane_width: channels while the planes are refined; plane_channels: of the finished planes, which have 2 *
    volume cells per side; hidden, layers: of the decoder's MLP."""

    num_views = 4
    input_size = 64

    def __init__(self, width=32, volume=24, voxel_channels=16, plane_width=64, plane_channels=16, hidden=32, layers=3):
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
        self.chunk_size = 65536

    @staticmethod
    def input_cameras():
        """Where the views stand: Instant3D's four cameras."""
        return instant3d_cameras()

    @property
    def cameras(self):
        return self.input_cameras().to(self.stem[0].weight.device)

    def planes(self, views, cameras):
        """views (B, V, 3, S, S) in [0, 1] on white, cameras of V (or (B, V)) views -> (B, 3, C, 2 volume, 2 volume)."""
        B, V = views.shape[:2]
        G = self.config["volume"]
        cameras = cameras.expand(B) if cameras.c2w.ndim == 3 else cameras
        fine = self.stem((2 * views.flatten(0, 1) - 1).to(self.stem[0].weight.dtype))
        features = fine + F.interpolate(self.deep(fine), scale_factor=2, mode="bilinear")
        # the bare colours go along: without them the planes learn shape at once but colour only very slowly
        features = torch.cat([features.float(), F.avg_pool2d(views.flatten(0, 1), 2) - 0.5], 1)

        centre = (torch.arange(G, device=views.device) + 0.5) / G * 2 - 1
        z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
        voxels = torch.stack([x, y, z], -1).reshape(1, -1, 3).expand(B, -1, 3)
        image_points = project(voxels, cameras)[0].flatten(0, 1) * 2 - 1
        lifted = F.grid_sample(features, image_points[:, :, None], align_corners=False)
        lifted = lifted.reshape(B, V, -1, G**3)
        mean = lifted.mean(1)
        variance = (lifted - mean[:, None]).square().mean(1)
        mean, variance = mean.transpose(1, 2), variance.transpose(1, 2)
        spread = variance.mean(-1, keepdim=True)  # photo-consistency, the classic cue of space carving
        volume = self.voxel(torch.cat([mean, variance, spread], -1).to(fine.dtype)).reshape(
            B, G, G, G, -1
        )  # z, y, x, channel
        folded = (
            volume.permute(0, 4, 1, 2, 3).flatten(1, 2),  # plane (x, y): z joins the channels
            volume.permute(0, 4, 2, 1, 3).flatten(1, 2),  # plane (x, z): rows are z, y joins
            volume.permute(0, 4, 3, 2, 1).flatten(1, 2),  # plane (z, y): rows are y, columns z, x joins
        )
        planes = torch.stack([fold(part) for fold, part in zip(self.fold, folded, strict=True)], 1)
        return self.refine(planes.flatten(0, 1)).unflatten(0, (B, 3))

    def field(self, planes):
        """The radiance field of planes (B, 3, C, H, W): points (B, P, 3) -> density (B, P), colour (B, P, 3)."""
        return triplane_field(planes, self.decoder, POINTS)

    def set_dtype(self, dtype):
        """Arithmetic of the networks; geometry and compositing stay in float32."""
        return self.to(dtype)

    @torch.no_grad()
    def reconstruct(self, views, cameras):
        """views (B, V, 3, 64, 64) in [0, 1] on white -> Triplane of B scenes."""
        return Triplane(
            torch.cat([self.planes(part, cameras).float() for part in views.float().split(RECONSTRUCT_BATCH)])
        )

    @torch.no_grad()
    def render(self, scene, cameras, size):
        """Deterministic pictures of B scenes from M cameras: images (B, M, 3, size, size), alpha (B, M, 1, size,
        size)."""
        B = len(scene)
        cameras = cameras.expand(B) if cameras.c2w.ndim == 3 else cameras
        images, alpha = [], []
        for b in range(B):
            field = self.field(scene.planes[b : b + 1])
            occupied = occupancy_grid(field, 1, OCCUPANCY, 0.01, scene.planes.device)[0]
            render = partial(render_occupied, field, occupied, samples=SAMPLES)
            pictures = render_images(render, Cameras(cameras.c2w[b], cameras.fxfycxcy[b]), size, self.chunk_size)
            images.append(pictures[0])
            alpha.append(pictures[1])
        return torch.stack(images), torch.stack(alpha)

    def save_pretrained(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        """Load config.json and model.safetensors of a folder that `save_pretrained` wrote."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"recon.checkpoint = {str(folder)!r} has no {name}; remake it with "
                    f"`python -m tiny.train_lrm` or correct the path."
                )
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return model.eval()
