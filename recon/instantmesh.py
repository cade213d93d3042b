"""InstantMesh (Xu et al. 2024), NeRF stage: four to six posed views in, a triplane NeRF out.

A vision transformer sees every view and is told its camera by modulated normalisation; learned triplane tokens then
attend to the features of all views at once. The cameras are free, within what it was trained on (`TRAINED_NEAR`), so
that it can judge painters whose views stand in different places.

The published weights are under Apache-2.0, and were trained on from OpenLRM 1.0's, which are under CC BY-NC 4.0.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from config.errors import UnwritableError, UserError, about, first_line
from recon.cameras import RIGS, Cameras, instant3d_cameras, lrm_source_vectors
from recon.instantmesh_checkpoint import REMEDY, configuration, convert_instantmesh, published_weights
from recon.lrm import LRM, check_width
from recon.volume_rendering import RadianceField, Triplane, check_one_object, render_scenes
from recon.weights import find_file, read_weights

PUBLISHED = "instant_nerf_large.ckpt"  # what a folder or a hub id is searched for
ENCODERS = {
    "facebook/dino-vitb16": dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-12,
    )
}
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINO's, which are ImageNet's
RECONSTRUCT_BATCH = 4  # objects reconstructed at a time, which bounds the memory
VIEWS = range(4, 7)  # numbers of views that it is made for; it was trained on six

# Field of view in degrees -> nearest and farthest camera, of an object in [-1, 1]^3: the authors' renderings at 50
# degrees, 2.0 to 3.5 away, and Zero123++'s views at 30, 4.0 away, both brought nearer and farther by 0.7 to 1.1.
TRAINED_NEAR = {50.0: (1.4, 3.85), 30.0: (2.8, 4.4)}
FOV_TOLERANCE = 5.0  # degrees


class CameraViT(nn.Module):
    """transformers' ViT, with normalisations that a condition shifts and scales, and with positions that are resized as
    in DINO (Caron et al. 2021)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vit = ViTModel(config, add_pooling_layer=False)
        width = config.hidden_size
        self.modulations = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(config.num_hidden_layers))

    def forward(self, images: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Class token and patch features (N, 1 + H W / patch^2, width) of normalised images (N, 3, H, W); condition:
        (N, width)."""
        tokens = self.embed(images)
        for i in range(len(self.modulations)):
            tokens = self.layer(i, tokens, condition)
        return self.vit.layernorm(tokens)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Class token and patches with their positions, (N, 1 + H W / patch^2, width)."""
        embeddings = self.vit.embeddings
        patches = embeddings.patch_embeddings(images)
        tokens = torch.cat([embeddings.cls_token.expand(len(images), -1, -1), patches], 1)
        return tokens + self.positions(*images.shape[-2:])

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Positions (1, 1 + H W / patch^2, width) of the tokens of an image of `height` x `width` pixels.

        DINO scales by (h + 0.1) / side, to be safe from rounding, so that they stand a little nearer to each other than
        the patches do."""
        known, patch = self.vit.embeddings.position_embeddings, self.vit.config.patch_size
        h, w = height // patch, width // patch
        side = self.vit.config.image_size // patch
        if h == w == side:
            return known
        grid = known[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([known[:, :1], grid.flatten(2).transpose(1, 2).to(known.dtype)], 1)

    def layer(self, index: int, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L, width) after layer `index`."""
        layer, modulation = self.vit.layers[index], self.modulations[index](F.silu(condition))[:, None]
        shift_attention, scale_attention, shift_mlp, scale_mlp = modulation.chunk(4, -1)
        tokens = tokens + layer.attention(layer.layernorm_before(tokens) * (1 + scale_attention) + shift_attention)[0]
        return tokens + layer.mlp(layer.layernorm_after(tokens) * (1 + scale_mlp) + shift_mlp)


class InstantMesh(LRM):
    """Arguments up to `encoder_freeze`, which only concerns training: those of the published configurations, see
    `instantmesh_checkpoint.OPTIONS`. input_size: side of the input views in pixels; colour_mean, colour_std: what views
    are normalised by; encoder_overrides: entries of the encoder's ViTConfig that differ from those of
    `encoder_model_name`. Raises ValueError if they do not fit together.

    rig: gives the 4 to 6 cameras that views are taken for; config.recon.cameras.

    Unlike the published renderer, this one does not show what lies behind a camera, which only matters inside the box.
    """

    rig: Callable[[], Cameras] = staticmethod(instant3d_cameras)

    def __init__(
        self,
        encoder_feat_dim: int,
        transformer_dim: int,
        transformer_layers: int,
        transformer_heads: int,
        triplane_low_res: int,
        triplane_high_res: int,
        triplane_dim: int,
        rendering_samples_per_ray: int,
        encoder_model_name: str = "facebook/dino-vitb16",
        encoder_freeze: bool = False,
        input_size: int = 320,
        colour_mean: tuple[float, float, float] = COLOUR_MEAN,
        colour_std: tuple[float, float, float] = COLOUR_STD,
        encoder_overrides: dict | None = None,
    ):
        if encoder_model_name not in ENCODERS:
            raise ValueError(
                f"InstantMesh's encoder is {encoder_model_name!r}, but only {', '.join(map(repr, ENCODERS))} is known."
            )
        encoder = ENCODERS[encoder_model_name] | (encoder_overrides or {})
        check_width("InstantMesh", encoder, encoder_feat_dim)
        if input_size % encoder["patch_size"]:
            raise ValueError(
                f"InstantMesh's input_size = {input_size} must be a multiple of its encoder's patch_size = "
                f"{encoder['patch_size']}."
            )
        super().__init__(
            CameraViT(ViTConfig(**encoder)),
            camera_width=encoder_feat_dim,
            features=encoder_feat_dim,
            width=transformer_dim,
            layers=transformer_layers,
            heads=transformer_heads,
            norm=partial(nn.LayerNorm, transformer_dim),
            side=triplane_low_res,
            channels=triplane_dim,
            samples=rendering_samples_per_ray,
        )
        self.input_size, self.patch_size = input_size, encoder["patch_size"]
        self.colour_mean, self.colour_std = colour_mean, colour_std
        self._warned = False

    @property
    def num_views(self) -> int:
        return len(self.rig())

    @staticmethod
    def input_cameras() -> Cameras:
        """Instant3D's four, unless a configuration names others."""
        return instant3d_cameras()

    @classmethod
    def cameras_of_config(cls, config) -> Cameras:
        return RIGS[config.cameras](config.elevation)

    @property
    def cameras(self) -> Cameras:
        return self.rig().to(self.device)

    @classmethod
    def from_config(cls, config) -> Self:
        model = super().from_config(config)
        model.rig = partial(RIGS[config.cameras], config.elevation)
        return model

    def network_input(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1], normalised."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.colour_mean, self.colour_std))
        return (images - mean) / std

    def features(self, images: torch.Tensor, source_cameras: torch.Tensor) -> torch.Tensor:
        """Class token and patch features (N, 1 + H W / patch^2, features) of images (N, 3, H, W) in [0, 1] on white.

        source_cameras: (N, 16), see `lrm_source_vectors`. Raises ValueError if the patches do not divide the images."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"InstantMesh was given views of {height} x {width} pixels, which its patches of {self.patch_size} x "
                f"{self.patch_size} do not divide: resize the views to its input_size, {self.input_size}."
            )
        dtype = self.pos_embed.dtype
        return self.encoder(self.network_input(images).to(dtype), self.camera_embedder(source_cameras.to(dtype)))

    def tokens(self, views: torch.Tensor, source_cameras: torch.Tensor) -> torch.Tensor:
        """Triplane tokens (B, 3 side^2, width), plane by plane, row by row; arguments as for `planes`."""
        features = self.features(views.flatten(0, 1), source_cameras.flatten(0, 1))
        features = features.unflatten(0, views.shape[:2]).flatten(1, 2)
        return self.transformer(self.pos_embed.expand(len(views), -1, -1), features)

    def planes(self, views: torch.Tensor, source_cameras: torch.Tensor) -> torch.Tensor:
        """Planes (B, 3, C, 2 side, 2 side) of views (B, V, 3, H, W) in [0, 1] on white.

        source_cameras: (B, V, 16), see `lrm_source_vectors`."""
        return self.upsample(self.tokens(views, source_cameras))

    def radiance_field(self, scene: Triplane) -> RadianceField:
        """The radiance field of a scene, see `Reconstructor`. Raises ValueError if there is more than one object."""
        check_one_object(scene)
        field = self.field(scene.planes)

        def evaluate(points):
            raw, colour = field(points)
            return self.decoder.density(raw), colour

        return evaluate

    @torch.no_grad()
    def reconstruct(self, views: torch.Tensor, cameras: Cameras) -> Triplane:
        """views: (B, V, 3, S, S) in [0, 1] on white, S = input_size, V from 4 to 6; cameras: V or (B, V).

        Warns once if cameras are far from those of the training. Raises ValueError for views of another shape, or of
        another number than the cameras."""
        V, S = len(cameras), self.input_size
        if V not in VIEWS:
            raise ValueError(f"InstantMesh was given {V} cameras: give {VIEWS[0]} to {VIEWS[-1]}, and a view for each.")
        if views.shape[1:] != (V, 3, S, S):
            raise ValueError(
                f"InstantMesh was given views of shape {tuple(views.shape)} for {V} cameras, but takes (B, {V}, 3, "
                f"{S}, {S}): give one view for each camera, resized to its input_size."
            )
        self._warn_of_cameras(cameras)
        vectors = lrm_source_vectors(cameras.expand(len(views)))
        parts = zip(views.float().split(RECONSTRUCT_BATCH), vectors.split(RECONSTRUCT_BATCH), strict=True)
        return Triplane(torch.cat([self.planes(*part).float() for part in parts]))

    @torch.no_grad()
    def render(self, scene: Triplane, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return render_scenes(self.ray_renderer, scene.planes, cameras, size, self.chunk_size)

    def _warn_of_cameras(self, cameras):
        far = far_from_training(cameras)
        if not self._warned and far.any():
            self._warned = True
            radius, fov = (values[far][0].item() for values in (cameras.radius, cameras.fov))
            ranges = " or ".join(f"{fov:g} and {low:g} to {high:g}" for fov, (low, high) in TRAINED_NEAR.items())
            warnings.warn(
                f"InstantMesh was given a camera with a field of view of {fov:.0f} degrees, {radius:.2f} from the "
                f"object, but was trained near {ranges}: its reconstructions may be poor; choose another rig.",
                stacklevel=3,
            )

    def save_pretrained(self, file: str | Path) -> None:
        """Write the weights as a .safetensors file, in float32 under their published names. It is written elsewhere
        first, so that an error leaves `file` as it was.

        Raises UserError for another kind of file, UnwritableError if it cannot be written."""
        file = Path(file)
        if file.suffix != ".safetensors":
            raise UserError(f"{file} is to be written, but must end in .safetensors: give another name.")
        file.parent.mkdir(parents=True, exist_ok=True)
        weights = {key: value.float().contiguous() for key, value in published_weights(self).items()}
        try:
            with TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.") as unfinished:
                save_file(weights, Path(unfinished) / file.name)
                (Path(unfinished) / file.name).replace(file)
        except SafetensorError as error:  # how a full disk is reported
            raise UnwritableError(f"{file} could not be written ({error}).") from error

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """A published .ckpt file, or what tools.convert_instantmesh made of it; or a folder or hub id with
        `PUBLISHED`. Which size it is follows from the shapes.

        Raises MissingFileError or UserError with one sentence."""
        file = find_file(checkpoint, PUBLISHED, f"as recon.checkpoint {REMEDY}, or the converted file")
        weights = read_weights(file)
        with about("recon.checkpoint", str(checkpoint)):
            arguments = configuration(weights)
            try:
                with torch.device("meta"):
                    model = cls(**arguments)
            except Exception as error:  # of many kinds: sizes that do not fit together
                raise UserError(f"no InstantMesh has these sizes ({first_line(error)}): give {REMEDY}") from error
            model.load_state_dict(convert_instantmesh(weights, model), assign=True)
        return model.eval()


def far_from_training(cameras: Cameras) -> torch.Tensor:
    """Which cameras (..., V) are not as those of `TRAINED_NEAR`: (..., V) bool."""
    near = [
        ((cameras.fov - fov).abs() <= FOV_TOLERANCE) & (cameras.radius >= low) & (cameras.radius <= high)
        for fov, (low, high) in TRAINED_NEAR.items()
    ]
    return ~torch.stack(near).any(0)
