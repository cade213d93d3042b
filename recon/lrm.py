"""What the open LRMs share (Hong et al. 2024, "LRM: Large Reconstruction Model for Single Image to 3D"): learned tokens
attend to image features and become a triplane, a small MLP decodes it, and rays are rendered coarse to fine.

OpenLRM and InstantMesh differ in their encoders, in how they are told of cameras, and in what their scenes are.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn as nn

from recon.reconstructor import Reconstructor
from recon.volume_rendering import (
    RadianceField,
    TriplaneDecoder,
    blurred_importance_depths,
    render_rays,
    triplane_field,
)

POINTS = 2**18  # points of a scene decoded at a time, which bounds the memory
CAMERA_NUMBERS = 16  # see `cameras.lrm_source_vectors`


def check_width(model: str, encoder: dict, features: int) -> None:
    """Raise ValueError unless the configuration `encoder` of the encoder of `model` gives `features` channels."""
    if encoder["hidden_size"] != features:
        raise ValueError(
            f"{model}'s encoder_feat_dim = {features} must be the width of its encoder, {encoder['hidden_size']}."
        )


class Block(nn.Module):
    """Triplane tokens (B, L, width) attend to image features (B, N, features), then to each other.

    norm: makes a normalisation, which is called with tokens and, where there is one, a condition."""

    def __init__(self, width: int, heads: int, features: int, norm: Callable[[], nn.Module]):
        super().__init__()
        self.norm1 = norm()
        self.cross_attn = nn.MultiheadAttention(
            width, heads, bias=False, kdim=features, vdim=features, batch_first=True
        )
        self.norm2 = norm()
        self.self_attn = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.norm3 = norm()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens, features, *condition):
        tokens = tokens + self.cross_attn(self.norm1(tokens, *condition), features, features, need_weights=False)[0]
        query = self.norm2(tokens, *condition)
        tokens = tokens + self.self_attn(query, query, query, need_weights=False)[0]
        return tokens + self.mlp(self.norm3(tokens, *condition))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, features: int, norm: Callable[[], nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads, features, norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens, features, *condition):
        for layer in self.layers:
            tokens = layer(tokens, features, *condition)
        return self.norm(tokens)


class LRM(Reconstructor):
    """encoder: of the images; camera_width: of the embedding of a camera's `CAMERA_NUMBERS` numbers; features: width of
    the image features; width, layers, heads: of the transformer; norm: as for `Block`; side: tokens per side of a
    plane, which has twice as many cells; channels: of a plane; samples: of a ray, half of them in either pass.

    Rendering is deterministic, so that equal views always get equal renders: depths in the middle of their bins and
    evenly spaced inverse-CDF samples, where training drew both at random."""

    def __init__(
        self,
        encoder: nn.Module,
        camera_width: int,
        features: int,
        width: int,
        layers: int,
        heads: int,
        norm: Callable[[], nn.Module],
        side: int,
        channels: int,
        samples: int,
    ):
        super().__init__()
        self.side, self.samples = side, samples
        self.encoder = encoder
        self.camera_embedder = nn.Sequential(
            nn.Linear(CAMERA_NUMBERS, camera_width), nn.SiLU(), nn.Linear(camera_width, camera_width)
        )
        self.pos_embed = nn.Parameter(torch.randn(1, 3 * side**2, width) / math.sqrt(width))
        self.transformer = Transformer(layers, width, heads, features, norm)
        self.upsampler = nn.ConvTranspose2d(width, channels, 2, stride=2)
        self.decoder = TriplaneDecoder(3 * channels)

    def upsample(self, tokens: torch.Tensor) -> torch.Tensor:
        """Planes (B, 3, channels, 2 side, 2 side) of tokens (B, 3 side^2, width), plane by plane, row by row."""
        tokens = tokens.unflatten(1, (3, self.side, self.side))
        return self.upsampler(tokens.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, (-1, 3))

    def field(self, planes: torch.Tensor) -> RadianceField:
        """The radiance field of planes (B, 3, C, H, W), in their own world, with raw densities, to be activated after
        interpolation (see `volume_rendering.composite`); -inf outside the box."""
        everywhere = triplane_field(planes, self.decoder.raw, POINTS)

        def evaluate(points):
            density, colour = everywhere(points)
            return density.masked_fill((points.abs() > 1).any(-1), -math.inf), colour

        return evaluate

    def render_rays(
        self,
        planes: torch.Tensor,
        origins: torch.Tensor,
        directions: torch.Tensor,
        fine: bool = True,
        jitter: torch.Tensor | float = 0.5,
        u: torch.Tensor | None = None,
        background: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Colour (B, R, 3) and alpha (B, R) of rays through planes (B, 3, C, H, W), in the planes' own world.

        origins, directions: (B, R, 3).
        fine: spend the second half of the samples where the first half found matter; jitter, u: as for
        `volume_rendering.render_rays`, but u is evenly spaced from 0 to 1 inclusive if None."""
        half = self.samples // 2
        return render_rays(
            self.field(planes),
            origins,
            directions,
            half,
            half if fine else 0,
            jitter,
            torch.linspace(0, 1, half, device=planes.device) if u is None else u,
            bins=half - 1,
            resample=blurred_importance_depths,
            activation=self.decoder.density,
            background=background,
        )

    def ray_renderer(self, planes: torch.Tensor) -> Callable:
        """`render_rays` of one scene's planes (1, 3, C, H, W), as `volume_rendering.render_scenes` wants it."""

        def render(origins, directions):
            colour, alpha = self.render_rays(planes, origins[None], directions[None])
            return colour[0], alpha[0]

        return render

    def set_dtype(self, dtype: torch.dtype) -> Self:
        """Set the precision of encoder and transformer. Decoder, geometry and compositing stay in float32."""
        for network in (self.encoder, self.camera_embedder, self.transformer, self.upsampler):
            network.to(dtype)
        self.pos_embed.data = self.pos_embed.data.to(dtype)
        return self
