"""OpenLRM (He and Wang 2023, version 1.1), the open LRM (Hong et al. 2024): one posed view in, a triplane NeRF out.

A fixed set of triplane tokens looks at the view's DINOv2 features through cross-attention, told the camera by
modulated normalisation. Names and shapes were read from the published checkpoints; the rendering settings are those
that they were trained with. The published weights are for research only (CC BY-NC 4.0).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from recon.weights import find_file, read_weights
from recon.cameras import Cameras, instant3d_cameras, openlrm_canonical_cameras, openlrm_source_vectors
from recon.openlrm_checkpoint import convert_openlrm
from recon.volume_rendering import (
    TriplaneDecoder,
    blurred_importance_depths,
    render_images,
    render_rays,
    triplane_field,
)

ENCODERS = {  # the patch size is 14, the positions are those of images of 518 x 518
    "dinov2_vits14_reg": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "dinov2_vitb14_reg": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
}
SHARED = dict(
    camera_embed_dim=1024, triplane_low_res=32, triplane_high_res=64, encoder_type="dinov2", encoder_freeze=False
)
OPTIONS = {  # the config.json of openlrm-obj-*-1.1 and openlrm-mix-*-1.1
    "small": dict(
        SHARED,
        transformer_layers=12,
        transformer_dim=512,
        transformer_heads=8,
        triplane_dim=32,
        encoder_model_name="dinov2_vits14_reg",
        encoder_feat_dim=384,
        rendering_samples_per_ray=96,
    ),
    "base": dict(
        SHARED,
        transformer_layers=12,
        transformer_dim=768,
        transformer_heads=12,
        triplane_dim=48,
        encoder_model_name="dinov2_vitb14_reg",
        encoder_feat_dim=768,
        rendering_samples_per_ray=96,
    ),
    "large": dict(
        SHARED,
        transformer_layers=16,
        transformer_dim=1024,
        transformer_heads=16,
        triplane_dim=80,
        encoder_model_name="dinov2_vitb14_reg",
        encoder_feat_dim=768,
        rendering_samples_per_ray=128,
    ),
}
INPUT_SIZES = {512: 224, 768: 336, 1024: 448}  # pixels, by transformer_dim: no published config.json says it
RECONSTRUCT_BATCH = 8  # views reconstructed at a time: bounds the memory
POINTS = 2**18  # points of a scene decoded at a time: bounds the memory
CAMERA_NUMBERS = 16


class ModulatedNorm(nn.Module):
    """LayerNorm with shift and scale from a condition: (B, L, width), (B, condition) -> (B, L, width). DiT's adaLN
    (Peebles and Xie 2023)."""

    def __init__(self, width, condition):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))

    def forward(self, tokens, condition):
        shift, scale = self.mlp(condition)[:, None].chunk(2, -1)
        return self.norm(tokens) * (1 + scale) + shift


class Block(nn.Module):
    """Triplane tokens (B, L, width) look at image features (B, N, features), then at each other."""

    def __init__(self, width, heads, features, condition):
        super().__init__()
        self.norm1 = ModulatedNorm(width, condition)
        self.cross_attn = nn.MultiheadAttention(
            width, heads, bias=False, kdim=features, vdim=features, batch_first=True
        )
        self.norm2 = ModulatedNorm(width, condition)
        self.self_attn = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.norm3 = ModulatedNorm(width, condition)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens, features, condition):
        tokens = tokens + self.cross_attn(self.norm1(tokens, condition), features, features, need_weights=False)[0]
        query = self.norm2(tokens, condition)
        tokens = tokens + self.self_attn(query, query, query, need_weights=False)[0]
        return tokens + self.mlp(self.norm3(tokens, condition))


class Transformer(nn.Module):
    def __init__(self, layers, width, heads, features, condition):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads, features, condition) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens, features, condition):
        for layer in self.layers:
            tokens = layer(tokens, features, condition)
        return self.norm(tokens)


@dataclass(frozen=True)
class SingleViewScenes:
    """What K views of each of B samples look like in 3D, one scene a view.

    planes: (B, K, 3, C, H, W), see `volume_rendering.Triplane`, each in the world of its own source camera
    (`cameras.openlrm_canonical_cameras`); sources: Cameras (B, K), in the common world."""

    planes: torch.Tensor
    sources: Cameras

    def __len__(self):
        return len(self.planes)


class OpenLRM(nn.Module):
    """Arguments: those of a published config.json, see `OPTIONS`; its `encoder_freeze` is about training and changes
    nothing here. input_size: side of the input view in pixels, None = the published one. encoder_overrides: entries of
    the encoder's Dinov2WithRegistersConfig that differ from the named one's.

    OpenLRM sees one view at a time: `reconstruct` makes one scene of each of the first `input_views` views, and
    `render` shows each scene from all cameras. The scene of view i, seen from the camera of view j, against view j
    measures whether j is what i leads one to expect. That speaks of consistency for i != j only; i = j is nearly a copy
    of the input, whatever the other views show. And no scene ever has to satisfy two views at once, so this is weaker
    than what a reconstructor of all views measures: what i does not show is guessed from training, of the opposite view
    nearly everything, and a consistent view that differs from the guess is blamed. Objects whose hidden sides are easy
    to guess (symmetric, plain, common) are favoured. Compare samples of one prompt by it; it is no absolute measure.

    Rendering is deterministic, so that the same views always get the same pictures: depths in the middle of their bins
    and evenly spaced inverse-CDF samples, where training drew both at random."""

    num_views = 4

    def __init__(
        self,
        camera_embed_dim,
        transformer_dim,
        transformer_layers,
        transformer_heads,
        triplane_low_res,
        triplane_high_res,
        triplane_dim,
        encoder_feat_dim,
        encoder_model_name,
        rendering_samples_per_ray,
        encoder_type="dinov2",
        encoder_freeze=False,
        input_size=None,
        encoder_overrides=None,
    ):
        super().__init__()
        if encoder_type != "dinov2" or encoder_model_name not in ENCODERS:
            raise ValueError(
                f"OpenLRM's encoder is {encoder_type!r} / {encoder_model_name!r}, but only 'dinov2' / "
                f"{', '.join(map(repr, ENCODERS))} are known: give a model of version 1.1."
            )
        if triplane_high_res != 2 * triplane_low_res:
            raise ValueError(
                f"OpenLRM's triplane_high_res = {triplane_high_res} must be twice triplane_low_res = "
                f"{triplane_low_res}."
            )
        if input_size is None and transformer_dim not in INPUT_SIZES:
            raise ValueError(
                f"OpenLRM's input_size is known for transformer_dim {list(INPUT_SIZES)} but not for "
                f"{transformer_dim}: give input_size."
            )
        encoder = {**ENCODERS[encoder_model_name], "image_size": 518, "patch_size": 14, **(encoder_overrides or {})}
        if encoder["hidden_size"] != encoder_feat_dim:
            raise ValueError(
                f"OpenLRM's encoder_feat_dim = {encoder_feat_dim} must be the width of its encoder, "
                f"{encoder['hidden_size']}."
            )
        self.input_size = input_size or INPUT_SIZES[transformer_dim]
        self.side, self.samples = triplane_low_res, rendering_samples_per_ray
        self.input_views, self.chunk_size = self.num_views, 65536
        self.encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**encoder))
        self.encoder.embeddings.mask_token = None  # of pretraining only
        self.camera_embedder = nn.Sequential(
            nn.Linear(CAMERA_NUMBERS, camera_embed_dim), nn.SiLU(), nn.Linear(camera_embed_dim, camera_embed_dim)
        )
        self.pos_embed = nn.Parameter(torch.randn(1, 3 * self.side**2, transformer_dim) / math.sqrt(transformer_dim))
        self.transformer = Transformer(
            transformer_layers, transformer_dim, transformer_heads, encoder_feat_dim, camera_embed_dim
        )
        self.upsampler = nn.ConvTranspose2d(transformer_dim, triplane_dim, 2, stride=2)
        self.decoder = TriplaneDecoder(3 * triplane_dim)

    @staticmethod
    def input_cameras():
        """Where the views stand: Instant3D's four cameras. OpenLRM is told its view's camera, which must look at the
        origin; its own default is at distance 2 with a focal length of 0.75 (67.4 degrees)."""
        return instant3d_cameras()

    @property
    def cameras(self):
        return self.input_cameras().to(self.pos_embed.device)

    def features(self, image):
        """image (B, 3, H, W) in [0, 1], not normalised further, sides multiples of 14 -> (B, 1 + H W / 14^2, features):
        class token and patches."""
        tokens = self.encoder(image.to(self.pos_embed.dtype)).last_hidden_state
        return torch.cat([tokens[:, :1], tokens[:, 1 + self.encoder.config.num_register_tokens :]], 1)

    def tokens(self, image, source_camera):
        """image (B, 3, H, W), source_camera (B, 16) -> triplane tokens (B, 3 side^2, width), plane by plane, row by
        row."""
        condition = self.camera_embedder(source_camera.to(self.pos_embed.dtype))
        return self.transformer(self.pos_embed.expand(len(image), -1, -1), self.features(image), condition)

    def planes(self, image, source_camera):
        """image (B, 3, H, W) in [0, 1] on white, source_camera (B, 16), see `openlrm_source_vectors` ->
        (B, 3, C, 2 side, 2 side)."""
        tokens = self.tokens(image, source_camera).unflatten(1, (3, self.side, self.side))
        planes = self.upsampler(tokens.flatten(0, 1).permute(0, 3, 1, 2))
        return planes.unflatten(0, (len(image), 3))

    def field(self, planes):
        """The radiance field of planes (B, 3, C, H, W): points (B, P, 3) -> raw density (B, P), -inf outside the box,
        and colour (B, P, 3)."""
        everywhere = triplane_field(planes, self.decoder.raw, POINTS)

        def evaluate(points):
            density, colour = everywhere(points)
            return density.masked_fill((points.abs() > 1).any(-1), -math.inf), colour

        return evaluate

    def render_rays(self, planes, origins, directions, fine=True, jitter=0.5, u=None, background=1.0):
        """Colour (B, R, 3) and alpha (B, R) of the rays origins, directions (B, R, 3) through planes (B, 3, C, H, W).

        fine: spend the second half of the samples where the first half found matter; jitter, u: as for
        `volume_rendering.render_rays`, with u from 0 to 1 where None."""
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

    def set_dtype(self, dtype):
        """Arithmetic of encoder and transformer; decoder, geometry and compositing stay in float32."""
        for network in (self.encoder, self.camera_embedder, self.transformer, self.upsampler):
            network.to(dtype)
        self.pos_embed.data = self.pos_embed.data.to(dtype)
        return self

    @torch.no_grad()
    def reconstruct(self, views, cameras):
        """views (B, V, 3, S, S) in [0, 1] on white, cameras of V (or (B, V)) views that look at the origin ->
        SingleViewScenes of the first `input_views`.

        Raises ValueError if there are fewer views than that."""
        B, V = views.shape[:2]
        K = self.input_views
        if not 1 <= K <= V:
            raise ValueError(f"recon.input_views = {K}, but there are {V} views: choose 1 to {V}.")
        cameras = (cameras.expand(B) if cameras.c2w.ndim == 3 else cameras)[:K].to(views.device)
        one_by_one = Cameras(cameras.c2w.flatten(0, 1)[:, None], cameras.fxfycxcy.flatten(0, 1)[:, None])
        vectors = openlrm_source_vectors(openlrm_canonical_cameras(one_by_one, one_by_one))[:, 0]
        images = resize_input(views[:, :K].flatten(0, 1).float(), self.input_size)
        parts = zip(images.split(RECONSTRUCT_BATCH), vectors.split(RECONSTRUCT_BATCH), strict=True)
        planes = torch.cat([self.planes(*part).float() for part in parts])
        return SingleViewScenes(planes.unflatten(0, (B, K)), cameras)

    @torch.no_grad()
    def render(self, scene, cameras, size):
        """Pictures of every scene from M cameras in the common world: images (B, K, M, 3, size, size) in [0, 1] on
        white, alpha (B, K, M, 1, size, size), K being the view that the scene was made of."""
        B, K = scene.planes.shape[:2]
        cameras = (cameras.expand(B) if cameras.c2w.ndim == 3 else cameras).to(scene.planes.device)
        seen = openlrm_canonical_cameras(
            Cameras(cameras.c2w[:, None], cameras.fxfycxcy[:, None]),
            Cameras(scene.sources.c2w[:, :, None], scene.sources.fxfycxcy[:, :, None]),
        )
        pictures = [
            self._pictures(planes, Cameras(c2w, fxfycxcy), size)
            for planes, c2w, fxfycxcy in zip(
                scene.planes.flatten(0, 1), seen.c2w.flatten(0, 1), seen.fxfycxcy.flatten(0, 1), strict=True
            )
        ]
        return tuple(torch.stack(values).unflatten(0, (B, K)) for values in zip(*pictures, strict=True))

    def _pictures(self, planes, cameras, size):
        def render(origins, directions):
            colour, alpha = self.render_rays(planes[None], origins[None], directions[None])
            return colour[0], alpha[0]

        return render_images(render, cameras, size, self.chunk_size)

    @classmethod
    def from_pretrained(cls, path):
        """A published model: a local folder with config.json and model.safetensors, the latter's path, or a hub id.

        Raises FileNotFoundError or ValueError with one sentence."""
        folder = Path(path).parent if Path(path).suffix == ".safetensors" else path
        remedy = (
            "as recon.checkpoint the complete folder of an OpenLRM v1.1, for example zxhezexin/openlrm-mix-base-1.1"
        )
        config_file, weights = find_file(folder, "config.json", remedy), find_file(path, "model.safetensors", remedy)
        try:
            config = json.loads(config_file.read_text())
            with torch.device("meta"):
                model = cls(**config)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{config_file} is not the configuration of an OpenLRM v1.1 ({error}): give "
                f"the one that was published with the weights."
            ) from error
        model.load_state_dict(convert_openlrm(read_weights(weights), model), assign=True)
        return model.eval()


def resize_input(images, size):
    """Images (N, 3, S, S) -> (N, 3, size, size) the way OpenLRM's inputs were made: bicubic with aligned corners."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)
