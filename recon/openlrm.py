"""OpenLRM (He and Wang 2023, version 1.1), an open LRM (Hong et al. 2024): one posed view in, a triplane NeRF out.

Learned triplane tokens attend to the view's DINOv2 features and are conditioned on its camera by modulated
normalisation. Names and shapes are those of the published checkpoints, and the rendering settings those of their
training. The published weights are for research only (CC BY-NC 4.0).

OpenLRM sees one view at a time, which makes it a weak judge of multi-view consistency: `reconstruct` makes one scene of
each of the first K = `input_views` views, and `compare` measures how well every scene predicts the other views. Scene i
seen from the camera of view j, compared with view j, measures consistency for i != j only: at its own camera a scene is
nearly a copy of its view, whatever the other views show.

No scene has to satisfy two views at once, so this is weaker than what a reconstructor of all views measures. What view
i does not show is guessed from the training data, the opposite view almost entirely, and a consistent view that differs
from the guess is penalised. Objects whose hidden sides are easy to guess (symmetric, plain, common) are favoured. Use
it to compare samples of one prompt; it is not an absolute measure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from config.errors import UserError, first_line
from recon.cameras import (
    Cameras,
    instant3d_cameras,
    lrm_source_vectors,
    openlrm_canonical_cameras,
    openlrm_canonical_transform,
)
from recon.lrm import LRM, check_width
from recon.openlrm_checkpoint import convert_openlrm
from recon.volume_rendering import RadianceField, check_one_object, render_scenes
from recon.weights import find_file, read_json, read_weights

ENCODERS = {  # with patches of 14 x 14 pixels and positions for images of 518 x 518
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
INPUT_SIZES = {512: 224, 768: 336, 1024: 448}  # pixels, by transformer_dim: not in the published config.json
RECONSTRUCT_BATCH = 8  # views reconstructed at a time, which bounds the memory


class ModulatedNorm(nn.Module):
    """LayerNorm of (B, L, width) whose shift and scale depend on a condition (B, condition): the adaLN of DiT (Peebles
    and Xie 2023)."""

    def __init__(self, width, condition):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))

    def forward(self, tokens, condition):
        shift, scale = self.mlp(condition)[:, None].chunk(2, -1)
        return self.norm(tokens) * (1 + scale) + shift


@dataclass(frozen=True)
class SingleViewScenes:
    """The 3D scenes of K single views of each of B objects, one scene per view.

    planes: (B, K, 3, C, H, W), see `volume_rendering.Triplane`, each in the world of its own source camera, see
    `cameras.openlrm_canonical_transform`; sources: Cameras (B, K) of the views in the common world."""

    planes: torch.Tensor
    sources: Cameras

    def __len__(self) -> int:
        """B, the number of objects."""
        return len(self.planes)


class OpenLRM(LRM):
    """Arguments: those of a published config.json, see `OPTIONS`; its `encoder_freeze` only concerns training.
    input_size: side of the input views in pixels, None = the published one. encoder_overrides: entries of the encoder's
    Dinov2WithRegistersConfig that differ from those of `encoder_model_name`. Raises ValueError if they do not fit
    together.

    input_views: K, the number of views that scenes are made of, from the first on; config.recon.input_views."""

    num_views = 4
    input_views = 4

    def __init__(
        self,
        camera_embed_dim: int,
        transformer_dim: int,
        transformer_layers: int,
        transformer_heads: int,
        triplane_low_res: int,
        triplane_high_res: int,
        triplane_dim: int,
        encoder_feat_dim: int,
        encoder_model_name: str,
        rendering_samples_per_ray: int,
        encoder_type: str = "dinov2",
        encoder_freeze: bool = False,
        input_size: int | None = None,
        encoder_overrides: dict | None = None,
    ):
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
        check_width("OpenLRM", encoder, encoder_feat_dim)
        super().__init__(
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**encoder)),
            camera_width=camera_embed_dim,
            features=encoder_feat_dim,
            width=transformer_dim,
            layers=transformer_layers,
            heads=transformer_heads,
            norm=partial(ModulatedNorm, transformer_dim, camera_embed_dim),
            side=triplane_low_res,
            channels=triplane_dim,
            samples=rendering_samples_per_ray,
        )
        self.input_size = input_size or INPUT_SIZES[transformer_dim]
        self.encoder.embeddings.mask_token = None  # for pretraining only

    @staticmethod
    def input_cameras() -> Cameras:
        """Instant3D's four cameras. OpenLRM is conditioned on the camera of its view, which must look at the origin;
        the default of the published code is at distance 2 with a focal length of 0.75 (67.4 degrees)."""
        return instant3d_cameras()

    @classmethod
    def from_config(cls, config) -> Self:
        model = super().from_config(config)
        model.input_views = config.input_views
        return model

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Class token and patch features (B, 1 + H W / 14^2, features) of image (B, 3, H, W) in [0, 1], which is not
        normalised any further; H and W are multiples of 14."""
        tokens = self.encoder(image.to(self.pos_embed.dtype)).last_hidden_state
        return torch.cat([tokens[:, :1], tokens[:, 1 + self.encoder.config.num_register_tokens :]], 1)

    def tokens(self, image: torch.Tensor, source_camera: torch.Tensor) -> torch.Tensor:
        """Triplane tokens (B, 3 side^2, width), plane by plane, row by row; arguments as for `planes`."""
        condition = self.camera_embedder(source_camera.to(self.pos_embed.dtype))
        return self.transformer(self.pos_embed.expand(len(image), -1, -1), self.features(image), condition)

    def planes(self, image: torch.Tensor, source_camera: torch.Tensor) -> torch.Tensor:
        """Planes (B, 3, C, 2 side, 2 side) of image (B, 3, H, W) in [0, 1] on white.

        source_camera: (B, 16), see `lrm_source_vectors`."""
        return self.upsample(self.tokens(image, source_camera))

    def radiance_field(self, scene: SingleViewScenes) -> RadianceField:
        """The radiance field of the scene that `render` shows, in the common world; see `Reconstructor`.

        Raises ValueError if there is more than one object."""
        check_one_object(scene)
        to_source = openlrm_canonical_transform(scene.sources[0])[:, 0]
        field = self.field(scene.planes[:, 0])

        def evaluate(points):
            raw, colour = field(points @ to_source[:, :3, :3].transpose(1, 2) + to_source[:, None, :3, 3])
            return self.decoder.density(raw), colour

        return evaluate

    @torch.no_grad()
    def reconstruct(self, views: torch.Tensor, cameras: Cameras) -> SingleViewScenes:
        """The scenes of the first K = `input_views` views, one by one.

        views: (B, V, 3, S, S) in [0, 1] on white, of any size; cameras: V or (B, V) that look at the origin.
        Raises ValueError if there are fewer than K views."""
        B, V = views.shape[:2]
        K = self.input_views
        if not 1 <= K <= V:
            raise ValueError(f"recon.input_views = {K}, but there are {V} views: choose 1 to {V}.")
        cameras = cameras.expand(B)[:K].to(views.device)
        one_by_one = Cameras(cameras.c2w.flatten(0, 1)[:, None], cameras.fxfycxcy.flatten(0, 1)[:, None])
        vectors = lrm_source_vectors(openlrm_canonical_cameras(one_by_one, one_by_one))[:, 0]
        images = resize_input(views[:, :K].flatten(0, 1).float(), self.input_size)
        parts = zip(images.split(RECONSTRUCT_BATCH), vectors.split(RECONSTRUCT_BATCH), strict=True)
        planes = torch.cat([self.planes(*part).float() for part in parts])
        return SingleViewScenes(planes.unflatten(0, (B, K)), cameras)

    def render(self, scene: SingleViewScenes, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Reconstructor.render`, of the scenes that were made of the FIRST source view."""
        return self._render_source(scene, 0, cameras, size)

    def compare(
        self,
        scene: SingleViewScenes,
        cameras: Cameras,
        size: int,
        distance: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Reconstructor.compare`, where view j is compared with the scenes of the K source views i != j.

        Its distance is the mean over those scenes, NaN if there is none (view 0 if K = 1). Its render is that of the
        next source view's scene, (j + 1) mod K, which is the view's own only for view 0 if K = 1.

        The mean over views weighs views equally. For K = 4 and K = 1 that is also the mean over all pairs i != j; for
        K = 2 and K = 3 the views that no scene was made of have more pairs, but no more weight."""
        K, V = scene.planes.shape[1], len(cameras)
        distances, renders = [], [None] * V
        for i in range(K):
            images, _ = self._render_source(scene, i, cameras, size)
            distances.append(distance(images))
            for j in range(V):
                if (j + 1) % K == i:
                    renders[j] = images[:, j]
        distances = torch.stack(distances, 1)
        is_compared = ~torch.eye(K, V, dtype=torch.bool, device=distances.device)
        return distances.where(is_compared, 0).sum(1) / is_compared.sum(0), torch.stack(renders, 1)

    @torch.no_grad()
    def _render_source(self, scene, source, cameras, size):
        """Images (B, M, 3, size, size) and alpha (B, M, 1, size, size) of the scenes made of source view `source`."""
        cameras = cameras.expand(len(scene)).to(scene.planes.device)
        seen = openlrm_canonical_cameras(cameras, scene.sources[source])
        return render_scenes(self.ray_renderer, scene.planes[:, source], seen, size, self.chunk_size)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """A published model: a local folder with config.json and model.safetensors, the latter's path, or a hub id.

        Raises MissingFileError or UserError with one sentence."""
        folder = Path(checkpoint).parent if Path(checkpoint).suffix == ".safetensors" else checkpoint
        remedy = (
            "as recon.checkpoint the complete folder of an OpenLRM v1.1, for example zxhezexin/openlrm-mix-base-1.1"
        )
        config_file = find_file(folder, "config.json", remedy)
        weights_file = find_file(checkpoint, "model.safetensors", remedy)
        config = read_json(config_file, f"give {remedy}")
        try:
            with torch.device("meta"):
                model = cls(**config)
        except Exception as error:  # of many kinds, see recon/tiny_lrm.py
            raise UserError(
                f"{config_file} is not the configuration of an OpenLRM v1.1 ({first_line(error)}): give the one that "
                f"was published with the weights."
            ) from error
        model.load_state_dict(convert_openlrm(read_weights(weights_file), model), assign=True)
        return model.eval()


def resize_input(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images (N, 3, S, S) resized to (N, 3, size, size) as in OpenLRM's training: bicubic, with aligned corners."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)
