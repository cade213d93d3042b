"""LGM (Tang et al. 2024, "LGM: Large Multi-View Gaussian Model for High-Resolution 3D Content Creation"): four posed
views in, one 3D Gaussian per output pixel out.

A U-Net whose attention layers look at all four views. Modules have the published names, so that the public checkpoint
loads as it is.
"""

import hashlib
from pathlib import Path
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F

from config.errors import UserError
from recon.cameras import Cameras, from_lgm_axes, lgm_pluecker, mvdream_cameras
from recon.gaussian_splatting import Gaussians, render_views
from recon.reconstructor import Reconstructor
from recon.weights import differences, find_file, read_weights

OPTIONS = {  # the presets of the public code, and a smaller one
    "big": dict(
        down_channels=(64, 128, 256, 512, 1024, 1024),
        down_attention=(False, False, False, True, True, True),
        up_channels=(1024, 1024, 512, 256, 128),
        up_attention=(True, True, True, False, False),
        splat_size=128,
    ),
    "small": dict(
        down_channels=(64, 128, 256, 512, 1024, 1024),
        down_attention=(False, False, False, True, True, True),
        up_channels=(1024, 1024, 512, 256),
        up_attention=(True, True, True, False),
        splat_size=64,
    ),
    "tiny": dict(
        down_channels=(32, 64, 128, 256, 512),
        down_attention=(False, False, False, False, True),
        up_channels=(512, 256, 128),
        up_attention=(True, False, False),
        splat_size=64,
    ),
    "rehearsal": dict(  # published by nobody: what `python -m tools.rehearse` writes
        input_size=32,
        down_channels=(32, 64),
        down_attention=(False, True),
        up_channels=(64, 32),
        up_attention=(True, False),
        splat_size=32,
    ),
}
PUBLISHED = "model_fp16_fixrot.safetensors"  # of the hub id ashawkey/LGM, option "big"
PUBLISHED_SHA256 = "744d6324656342c64f871308e73db97f0eb51858d94329b30090e986a6d050ab"
VIEWS = 4
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
RECONSTRUCT_BATCH = 4  # objects reconstructed at a time, which bounds the memory
RESIDUAL_SCALE = 0.5**0.5  # keeps the variance of a residual sum
HEADS = 16  # of every attention layer


class ResBlock(nn.Module):
    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x):
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        return (branch + self.shortcut(x)) * RESIDUAL_SCALE


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):
        q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViewAttention(nn.Module):
    """Self-attention over the pixels of all views of an object: (B V, C, H, W) -> the same."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.attn = Attention(width)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).unflatten(0, (-1, VIEWS)).transpose(2, 3)  # B, V, H W, C
        tokens = self.attn(tokens.flatten(1, 2)).unflatten(1, (VIEWS, -1))
        return (tokens.transpose(2, 3).reshape(x.shape) + x) * RESIDUAL_SCALE


def attentions(width, count, enabled):
    return nn.ModuleList(ViewAttention(width) if enabled else None for _ in range(count))


class DownBlock(nn.Module):
    def __init__(self, channels_in, channels_out, attention, downsample):
        super().__init__()
        self.nets = nn.ModuleList([ResBlock(channels_in, channels_out), ResBlock(channels_out, channels_out)])
        self.attns = attentions(channels_out, 2, attention)
        self.downsample = nn.Conv2d(channels_out, channels_out, 3, stride=2, padding=1) if downsample else None

    def forward(self, x):
        outputs = []
        for net, attn in zip(self.nets, self.attns, strict=True):
            x = net(x) if attn is None else attn(net(x))
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(self.downsample(x))
        return outputs


class MidBlock(nn.Module):
    def __init__(self, width, attention):
        super().__init__()
        self.nets = nn.ModuleList([ResBlock(width, width), ResBlock(width, width)])
        self.attns = attentions(width, 1, attention)

    def forward(self, x):
        first, second = self.nets
        x = first(x)
        return second(x if self.attns[0] is None else self.attns[0](x))


class UpBlock(nn.Module):
    def __init__(self, channels_in, channels_skip, channels_out, attention, upsample):
        super().__init__()
        self.nets = nn.ModuleList(
            [
                ResBlock(channels_in + channels_out, channels_out),
                ResBlock(2 * channels_out, channels_out),
                ResBlock(channels_out + channels_skip, channels_out),
            ]
        )
        self.attns = attentions(channels_out, 3, attention)
        self.upsample = nn.Conv2d(channels_out, channels_out, 3, padding=1) if upsample else None

    def forward(self, x, skips):
        for net, attn in zip(self.nets, self.attns, strict=True):
            x = net(torch.cat([x, skips.pop()], 1))
            x = x if attn is None else attn(x)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """(B V, 9, H, W) -> (B V, 14, h, w) with h = H / 2^(len(down_channels) - len(up_channels)), and w alike."""

    def __init__(self, down_channels, down_attention, mid_attention, up_channels, up_attention):
        super().__init__()
        self.conv_in = nn.Conv2d(9, down_channels[0], 3, padding=1)
        widths = (down_channels[0], *down_channels)
        last = len(down_channels) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[i], widths[i + 1], down_attention[i], i < last) for i in range(last + 1)
        )
        self.mid_block = MidBlock(down_channels[-1], mid_attention)
        below = (down_channels[-1], *up_channels)
        skips = [
            *reversed(down_channels[:-1]),
            down_channels[0],
        ]  # channels that the level above left for its last block
        self.up_blocks = nn.ModuleList(
            UpBlock(below[i], skips[i], width, up_attention[i], i < len(up_channels) - 1)
            for i, width in enumerate(up_channels)
        )
        self.norm_out = nn.GroupNorm(32, up_channels[-1])
        self.conv_out = nn.Conv2d(up_channels[-1], 14, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1])
        x = self.mid_block(skips[-1])
        for block in self.up_blocks:
            x = block(x, skips)
        return self.conv_out(F.silu(self.norm_out(x)))


class LGM(Reconstructor):
    """input_size: side of the input views in pixels; splat_size: of the output, one Gaussian per pixel and view;
    mid_attention, down_channels, ...: of the U-Net, one of `OPTIONS`, by default "big", whose public file is
    `PUBLISHED`."""

    num_views = VIEWS

    def __init__(
        self,
        input_size: int = 256,
        mid_attention: bool = True,
        splat_size: int = 128,
        down_channels: tuple[int, ...] = OPTIONS["big"]["down_channels"],
        down_attention: tuple[bool, ...] = OPTIONS["big"]["down_attention"],
        up_channels: tuple[int, ...] = OPTIONS["big"]["up_channels"],
        up_attention: tuple[bool, ...] = OPTIONS["big"]["up_attention"],
    ):
        super().__init__()
        self.input_size, self.splat_size = input_size, splat_size
        self.unet = UNet(down_channels, down_attention, mid_attention, up_channels, up_attention)
        self.conv = nn.Conv2d(14, 14, 1)

    @staticmethod
    def input_cameras() -> Cameras:
        """Azimuths 0, 90, 180 and 270 degrees (MVDream's 90, 180, 270 and 0), elevation 0, radius 1.5, field of view
        49.1 degrees."""
        return mvdream_cameras(elevation=0.0, azimuth_start=90.0)

    def gaussians(self, x: torch.Tensor) -> torch.Tensor:
        """Activated Gaussians (B, N, 14) in LGM's axes, N = 4 splat_size^2, view by view, row by row: position 3,
        opacity 1, scale 3, unit quaternion 4 (w, x, y, z), colour 3.

        x: (B, 4, 9, H, W), see `network_input`."""
        raw = self.conv(self.unet(x.flatten(0, 1)))
        raw = raw.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2).flatten(1, 3).float()
        return torch.cat(
            [
                raw[..., :3].clamp(-1, 1),
                raw[..., 3:4].sigmoid(),
                0.1 * F.softplus(raw[..., 4:7]),
                F.normalize(raw[..., 7:11], dim=-1),
                0.5 * raw[..., 11:].tanh() + 0.5,
            ],
            -1,
        )

    def network_input(self, views: torch.Tensor, cameras: Cameras) -> torch.Tensor:
        """Colours, normalised by ImageNet's statistics, and Pluecker coordinates of every pixel: (B, 4, 9, S, S).

        views: (B, 4, 3, S, S) in [0, 1] on white, S = input_size; cameras: 4 or (B, 4). Raises ValueError for views of
        another shape."""
        if views.shape[1:] != (VIEWS, 3, self.input_size, self.input_size):
            raise ValueError(
                f"LGM was given views of shape {tuple(views.shape)} but takes (B, {VIEWS}, 3, {self.input_size}, "
                f"{self.input_size}): resize the views to its input_size and give all four."
            )
        mean, std = (views.new_tensor(values)[:, None, None] for values in (COLOUR_MEAN, COLOUR_STD))
        pluecker = lgm_pluecker(cameras, views.shape[-1])
        return torch.cat([(views - mean) / std, pluecker.expand(len(views), -1, -1, -1, -1)], 2)

    @torch.no_grad()
    def reconstruct(self, views: torch.Tensor, cameras: Cameras) -> Gaussians:
        """views: (B, 4, 3, S, S) in [0, 1] on white, S = input_size; cameras: 4 or (B, 4).

        Raises ValueError for views of another shape."""
        x = self.network_input(views.float(), cameras).to(self.conv.weight.dtype)
        packed = torch.cat([self.gaussians(part) for part in x.split(RECONSTRUCT_BATCH)])
        positions, quaternions = from_lgm_axes(packed[..., :3], packed[..., 7:11])
        return Gaussians.from_packed(torch.cat([positions, packed[..., 3:7], quaternions, packed[..., 11:]], -1))

    def render(self, scene: Gaussians, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return render_views(scene, cameras, size)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """A file with the weights of one of `OPTIONS`, a folder that holds `PUBLISHED`, or a hub id such as
        "ashawkey/LGM".

        Raises MissingFileError or UserError with one sentence if it is none of these, incomplete or damaged."""
        file = find_file(checkpoint, PUBLISHED, "as recon.checkpoint the file, its folder, or the hub id ashawkey/LGM")
        if file.name == PUBLISHED:
            with open(file, "rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
            if found != PUBLISHED_SHA256:
                raise UserError(
                    f"recon.checkpoint = {str(checkpoint)!r}: {PUBLISHED} has the sha256 {found}, but the published "
                    f"file has {PUBLISHED_SHA256}; download it again, or rename the file if it is your own."
                )
        weights = read_weights(file)
        problems = {}
        for name, options in OPTIONS.items():
            with torch.device("meta"):
                model = cls(**options)
            problems[name] = differences(weights, {key: value.shape for key, value in model.state_dict().items()})
            if not problems[name]:
                model.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
                return model.eval()
        raise UserError(
            f"recon.checkpoint = {str(checkpoint)!r} holds none of LGM's models {', '.join(OPTIONS)} (for 'big': "
            f"{problems['big']}): give the public {PUBLISHED}."
        )
