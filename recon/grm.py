"""GRM (Xu et al. 2024, "GRM: Large Gaussian Reconstruction Model for Efficient 3D Reconstruction and Generation"): four
posed views in, one 3D Gaussian per input pixel out.

A transformer over the patches of all views, an upsampler that doubles their resolution `decoder_ratio` times, and a 1x1
convolution per attribute. Modules have the published names. The oddities of the public code are kept, and commented,
since the published weights were trained with them. `recon.grm_checkpoint` converts the published files.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from config.errors import MissingFileError, UserError, first_line
from recon.cameras import Cameras, grid_directions, instant3d_cameras
from recon.gaussian_splatting import Gaussians, render_views
from recon.reconstructor import Reconstructor
from recon.weights import differences, read_json, read_weights

VIEWS = 4
HEAD_WIDTH = 64  # channels of an attention head, and the minimum of an upsampler stage
RECONSTRUCT_BATCH = 4  # objects reconstructed at a time, which bounds the memory
HEADS = {"depth": 1, "feature": 3, "opacity": 1, "scaling": 3, "rotation": 4}  # channels of each attribute
SCALES = {  # raw scales -> world units, with the constants of `RenderParams`
    "exp": lambda raw, render: raw.exp(),
    "softplus": lambda raw, render: render.scale_multi_act * F.softplus(raw),
    "sigmoid": lambda raw, render: render.scale_min_act + (render.scale_max_act - render.scale_min_act) * raw.sigmoid(),
}
CONVERTER = "python -m tools.convert_grm"


def _require(condition, name, value, allowed):
    if not condition:
        raise UserError(f"GRM's {name} is {value!r}: it must {allowed}; correct it in the model's configuration.")


@dataclass(frozen=True)
class VisualParams:
    """The network: `visual.params` of a published configuration, without the parameters of training.

    in_channels, input_res: channels and side of the images; patch_size: pixels per side of a token; layers, width: of
    the encoder; bwindow_size, window_size: tokens that attend to each other in the encoder and in the upsampler, None =
    all; decoder_ratio: doublings of the resolution; half_res_input: the encoder sees the images at half their size;
    scaling_activation_type, scale_offset, scale_max: how raw scales are shifted and clipped before their activation;
    depth_std: standard deviation of the depth head's initial weights.
    Raises ValueError if the values do not fit together."""

    in_channels: int
    input_res: int
    patch_size: int
    layers: int
    width: int
    window_size: int | None = None
    bwindow_size: int | None = None
    decoder_ratio: int = 0
    scaling_activation_type: str = "sigmoid"
    half_res_input: bool = False
    scale_offset: float = 0.0
    scale_max: float = 0.0
    depth_std: float = 0.015
    num_input_views: int = VIEWS

    def __post_init__(self):
        for name in ("in_channels", "input_res", "patch_size", "layers"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        _require(self.num_input_views == VIEWS, "num_input_views", self.num_input_views, f"be {VIEWS}")
        _require(self.width > 0 and self.width % HEAD_WIDTH == 0, "width", self.width, f"be a multiple of {HEAD_WIDTH}")
        _require(
            self.patch_size % 2**self.decoder_ratio == 0,
            "decoder_ratio",
            self.decoder_ratio,
            f"halve patch_size = {self.patch_size} to a whole number",
        )
        _require(
            self.input_res % (self.shrink * self.patch_size) == 0,
            "input_res",
            self.input_res,
            f"be a multiple of {self.shrink * self.patch_size} pixels",
        )
        _require(
            self.scaling_activation_type in SCALES,
            "scaling_activation_type",
            self.scaling_activation_type,
            f"be one of {', '.join(SCALES)}",
        )
        for name, tokens in (("bwindow_size", self.tokens), ("window_size", 4 * self.tokens)):
            window = getattr(self, name)
            _require(
                window is None or window >= 1 and tokens % window == 0,
                name,
                window,
                f"be null or divide the sequence of {tokens} tokens",
            )

    @property
    def shrink(self) -> int:
        """The factor by which images are shrunk for the encoder."""
        return 2 if self.half_res_input else 1

    @property
    def tokens(self) -> int:
        """Length of the encoder's sequence, all views together."""
        return VIEWS * (self.input_res // self.shrink // self.patch_size) ** 2


@dataclass(frozen=True)
class RenderParams:
    """The meaning of scales: `render.params` of a published configuration, with the published defaults.

    scaling_activation_type: one of `SCALES`, scale_*_act: its constants. Raises ValueError for impossible values."""

    scaling_activation_type: str = "exp"
    scale_min_act: float = 1.0
    scale_max_act: float = 1.0
    scale_multi_act: float = 0.1
    sh_degree: int = 0

    def __post_init__(self):
        _require(
            self.scaling_activation_type in SCALES,
            "render scaling_activation_type",
            self.scaling_activation_type,
            f"be one of {', '.join(SCALES)}",
        )
        _require(self.sh_degree == 0, "render sh_degree", self.sh_degree, "be 0, since its colours are plain RGB")


class Attention(nn.Module):
    """Multi-head self-attention over (B, L, width), with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)  # CLIP's approximation of GELU


class Block(nn.Module):
    """A pre-norm transformer block over windows of `window` tokens (None = all), rolled by `shift` tokens."""

    def __init__(self, width, window, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.attn = Attention(width)
        self.layernorm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.layernorm2 = nn.LayerNorm(width)

    def forward(self, x):
        # windows are runs of the sequence of all views, and the window that the roll wraps around is not masked
        windows = self.layernorm1(x).roll(self.shift, 1).reshape(-1, self.window or x.shape[1], x.shape[2])
        x = x + self.attn(windows).reshape(x.shape).roll(-self.shift, 1)
        return x + self.mlp(self.layernorm2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, window):
        super().__init__()
        # every other block is rolled by half a window, so that tokens on both sides of a border attend to each other
        self.resblocks = nn.Sequential(*(Block(width, window, (window or 0) // 2 * (i % 2)) for i in range(layers)))

    def forward(self, x):
        return self.resblocks(x)


class Encoder(nn.Module):
    """Images and their Pluecker coordinates (B, V, C, S, S) -> tokens (B, V, n, width)."""

    def __init__(self, visual):
        super().__init__()
        width, patch = visual.width, visual.patch_size
        self.conv = nn.Conv2d(visual.in_channels + 6, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1, visual.tokens // VIEWS, width))
        self.layernorm1 = nn.LayerNorm(width)
        self.transformer = Transformer(width, visual.layers, visual.bwindow_size)
        self.layernorm2 = nn.LayerNorm(width)

    def forward(self, x):
        # all views share one positional embedding: only the Pluecker coordinates tell them apart
        tokens = self.layernorm1(self.conv(x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.positional_embedding)
        tokens = tokens.unflatten(0, x.shape[:2])
        return self.layernorm2(self.transformer(tokens.flatten(1, 2))).reshape(tokens.shape)


class Doubling(nn.Module):
    """Tokens (B, L, width_in) -> (B, 4 L, width)."""

    def __init__(self, width_in, width):
        super().__init__()
        self.residual_fc = nn.Linear(width_in, 4 * width)

    def forward(self, x):
        # the sequence of all views is reshaped to one square image, so pixels end up elsewhere than they came from
        side = math.isqrt(x.shape[1])
        image = self.residual_fc(x).transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(image, 2).flatten(2).transpose(1, 2)


class Upsampler(nn.Module):
    """Tokens of all views (B, L, width) -> (B, 4^decoder_ratio L, out_channels)."""

    def __init__(self, visual):
        super().__init__()
        self.stages, self.out_channels = visual.decoder_ratio, visual.width
        for i in range(self.stages):
            width = max(self.out_channels // 2 // HEAD_WIDTH, 1) * HEAD_WIDTH  # half, rounded down to whole heads
            self.add_module(f"upsampler_{i}", Doubling(self.out_channels, width))
            self.add_module(f"attention_{i}", Transformer(width, 2, visual.window_size))
            self.out_channels = width
        self.layernorm2 = nn.LayerNorm(self.out_channels)

    def forward(self, x):
        for i in range(self.stages):
            x = getattr(self, f"attention_{i}")(getattr(self, f"upsampler_{i}")(x))
        return self.layernorm2(x)


class GRM(Reconstructor):
    """visual_params: the fields of `VisualParams`; render: a dictionary of the fields of `RenderParams`.

    Raises ValueError for impossible values, TypeError for unknown names."""

    num_views = VIEWS

    def __init__(self, render: dict | None = None, **visual_params):
        super().__init__()
        self.visual, self.render_params = VisualParams(**visual_params), RenderParams(**(render or {}))
        self.input_size = self.visual.input_res
        self.transformer_encoder = Encoder(self.visual)
        channels = self.visual.width
        if self.visual.decoder_ratio:
            self.gaussian_upsampler = Upsampler(self.visual)
            channels = self.gaussian_upsampler.out_channels
        self.upscale = self.visual.shrink * self.visual.patch_size // 2**self.visual.decoder_ratio
        for name, outputs in HEADS.items():  # none has a bias
            self.add_module(f"out_layer_{name}", nn.Conv2d(channels, outputs * self.upscale**2, 1, bias=False))
        for name, std in {"depth": self.visual.depth_std, "opacity": 0.02, "scaling": 0.02}.items():
            nn.init.normal_(self.get_submodule(f"out_layer_{name}").weight, std=std)

    @staticmethod
    def input_cameras() -> Cameras:
        """Instant3D's four cameras."""
        return instant3d_cameras()

    def encode(self, images: torch.Tensor, c2w: torch.Tensor, fxfycxcy: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raw Gaussians, one per pixel, view by view, row by row: N = 4 S^2 with S = input_res.

        images: (B, 4, in_channels, S, S) in [-1, 1]; c2w: (B, 4, 4, 4); fxfycxcy: (B, 4, 4), both as in `Cameras`.
        Returns a dictionary of float32 tensors: plucker (B, 4, 6, S, S) (S/2 with half_res_input), tokens (B, 4, n,
        width), depth (B, 4, S, S) along the optical axes, xyz (B, N, 3) in the world, and, before their activations,
        feature (B, N, 3), opacity (B, N, 1), scaling (B, N, 3), rotation (B, N, 4). Raises ValueError for other shapes.
        """
        B, size, visual = len(images), self.input_size, self.visual
        shapes = {
            "images": (images, (B, VIEWS, visual.in_channels, size, size)),
            "c2w": (c2w, (B, VIEWS, 4, 4)),
            "fxfycxcy": (fxfycxcy, (B, VIEWS, 4)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor.shape != shape:
                raise ValueError(
                    f"GRM was given {name} of shape {tuple(tensor.shape)} but takes {shape}: resize the views to its "
                    f"input_size and give one camera for each."
                )
        cameras = Cameras(c2w.float(), fxfycxcy.float())
        images = images.float()
        if visual.half_res_input:
            images = F.interpolate(images.flatten(0, 1), scale_factor=0.5, mode="bilinear").unflatten(0, (B, VIEWS))
        plucker = self._plucker(cameras)
        tokens = self.transformer_encoder(torch.cat([images, plucker], 2).to(self.out_layer_depth.weight.dtype))
        raw = self._heads(tokens)
        position = cameras.c2w[..., :3, 3]
        depth = raw["depth"].reshape(B, VIEWS, -1, 1) + position.norm(dim=-1)[..., None, None]
        # no offset of half a pixel: corner pixels lie on the corners of the image, the optical axis passes its centre
        xyz = position[..., None, :] + depth * grid_directions(cameras, torch.linspace(0, 1, size, device=depth.device))
        return {
            **raw,
            "plucker": plucker,
            "tokens": tokens.float(),
            "depth": depth.reshape(B, VIEWS, size, size),
            "xyz": xyz.flatten(1, 2),
            "scaling": self._clip_scales(raw["scaling"]),
            "opacity": raw["opacity"] - 2,  # the Gaussians of an untrained network are nearly transparent
        }

    def _plucker(self, cameras):
        """Origin x direction and unit direction of the ray of every pixel that the encoder sees: (..., V, 6, S, S)."""
        size = self.input_size // self.visual.shrink
        # the offset is half an image where half a pixel is usual, so the optical axis passes the top left pixel
        direction = grid_directions(cameras, torch.linspace(0, 1, size, device=cameras.c2w.device) + 0.5)
        direction = F.normalize(direction, dim=-1)
        moment = torch.linalg.cross(cameras.c2w[..., None, :3, 3].expand_as(direction), direction)
        return torch.cat([moment, direction], -1).transpose(-1, -2).unflatten(-1, (size, size))

    def _heads(self, tokens):
        """The raw attributes of `HEADS` for every pixel, float32 (B, N, channels), of tokens (B, 4, n, width)."""
        features = tokens.flatten(1, 2)
        if self.visual.decoder_ratio:
            features = self.gaussian_upsampler(features)
        side = self.input_size // self.upscale
        features = features.reshape(-1, side, side, features.shape[-1]).permute(0, 3, 1, 2)
        raw = {}
        for name in HEADS:
            maps = F.pixel_shuffle(self.get_submodule(f"out_layer_{name}")(features), self.upscale).float()
            raw[name] = maps.unflatten(0, tokens.shape[:2]).permute(0, 1, 3, 4, 2).flatten(1, 3)
        return raw

    def _clip_scales(self, raw):
        """Raw scales (..., 3), shifted, and clipped if their activation is unbounded."""
        if self.visual.scaling_activation_type == "sigmoid":
            return raw
        offset = self.visual.scale_offset if self.visual.scaling_activation_type == "exp" else 0
        return (raw + offset).clamp(max=self.visual.scale_max)

    def gaussians(self, views: torch.Tensor, cameras: Cameras) -> torch.Tensor:
        """Activated Gaussians (B, N, 14), view by view, row by row: position 3, opacity 1, scale 3, unit quaternion 4
        (w, x, y, z), colour 3. Those outside the box (-1, 1)^3, which the public code removes, have opacity 0.

        views: (B, 4, 3, S, S) in [0, 1] on white, S = input_size; cameras: 4 or (B, 4).
        Raises ValueError for other shapes."""
        cameras = cameras.expand(len(views))
        raw = self.encode(2 * views - 1, cameras.c2w, cameras.fxfycxcy)
        inside = (raw["xyz"].abs() < 1).all(-1, keepdim=True)
        return torch.cat(
            [
                raw["xyz"],
                raw["opacity"].sigmoid() * inside,
                SCALES[self.render_params.scaling_activation_type](raw["scaling"], self.render_params),
                F.normalize(raw["rotation"], dim=-1),
                raw["feature"].sigmoid(),
            ],
            -1,
        )

    @torch.no_grad()
    def reconstruct(self, views: torch.Tensor, cameras: Cameras) -> Gaussians:
        """views: (B, 4, 3, S, S) in [0, 1] on white, S = input_size; cameras: 4 or (B, 4).

        Raises ValueError for other shapes."""
        parts = zip(views.split(RECONSTRUCT_BATCH), cameras.expand(len(views)).split(RECONSTRUCT_BATCH), strict=True)
        return Gaussians.from_packed(torch.cat([self.gaussians(*part) for part in parts]))

    def render(self, scene: Gaussians, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return render_views(scene, cameras, size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, the weights in the precision that they have."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"visual": asdict(self.visual), "render": asdict(self.render_params)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = {key: value.clone().contiguous() for key, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def from_weights(cls, weights: dict[str, torch.Tensor], config: dict[str, dict], source: str | Path) -> Self:
        """The model of `config`, {"visual": {...}, "render": {...}}, with `weights`, {published name: tensor}, in the
        precision that they have.

        source: what messages call the two. Raises UserError if the configuration is not that of a GRM, or with a list
        of the weights that are missing, unknown or of another shape."""
        try:
            with torch.device("meta"):
                model = cls(render=config["render"], **config["visual"])
        except UserError:
            raise
        except Exception as error:  # of many kinds, see recon/tiny_lrm.py
            raise UserError(
                f"{source} has no complete configuration of a GRM ({first_line(error)}): convert a published file with "
                f"`{CONVERTER} SOURCE OUT`."
            ) from error
        found = differences(weights, {key: value.shape for key, value in model.state_dict().items()})
        if found:
            raise UserError(
                f"{source} does not hold the weights of the GRM that its configuration describes: "
                f"{found}; give a complete published GRM with its own configuration."
            )
        model.load_state_dict(weights, assign=True)
        return model

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """The model of a folder that `recon.grm_checkpoint` wrote, in float32.

        Raises MissingFileError or UserError with one sentence."""
        folder, source = Path(checkpoint), f"recon.checkpoint = {str(checkpoint)!r}"
        if folder.is_file():
            raise UserError(
                f"{source} is a file, and GRM is read from a folder: convert the file once with "
                f"`{CONVERTER} {folder} OUT` and give OUT."
            )
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise MissingFileError(
                    f"{source} has no {name}: give a folder OUT that `{CONVERTER} SOURCE OUT` has made."
                )
        config = read_json(folder / "config.json", f"convert a published file with `{CONVERTER} SOURCE OUT`")
        weights = read_weights(folder / "model.safetensors")
        return cls.from_weights(weights, config, source).float().eval()
