"""Small random checkpoints, in the formats in which the painters and reconstructors of the paper's runs are published.

The names of their weights are made from those of the models here by the inverse of what the conversions do, so that a
model of the public size would be written with the keys and shapes of the public file (a test compares them).
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from ml_collections import ConfigDict
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from diffusers_patch.conversion import CLIP_TOKENS
from diffusers_patch.instant3d_checkpoint import CONFIGS, NOT_NEEDED, PARTS, load_tokenizers
from diffusers_patch.mvdream import PREFIX, ldm_name
from diffusers_patch.mvdream_checkpoints import TEXT_PREFIX
from recon.grm import GRM
from recon.instantmesh import InstantMesh
from recon.instantmesh_checkpoint import published_weights
from recon.lgm import LGM, OPTIONS
from recon.openlrm import OpenLRM
from recon.openlrm_checkpoint import published_name
from recon.tiny_lrm import TinyLRM
from recon.weights import renamed

VAE_PREFIX = PARTS["vae"].prefix  # the same in all of Stable Diffusion

LATENT = 8  # latents of 8x8: a grid of 64x64 pixels, views of 32x32
TEXT_WIDTH = 16
UNET = dict(
    sample_size=LATENT,
    in_channels=4,
    out_channels=4,
    block_out_channels=[16, 32],
    layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    mid_block_type="UNetMidBlock2DCrossAttn",
    attention_head_dim=[2, 4],
    transformer_layers_per_block=[1, 1],
    cross_attention_dim=2 * TEXT_WIDTH,
    norm_num_groups=8,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
)
MVDREAM_UNET = dict(
    sample_size=LATENT // 2,
    block_out_channels=[16, 32],
    layers_per_block=1,
    cross_attention_dim=TEXT_WIDTH,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    attention_head_dim=[2, 4],
    norm_num_groups=8,
    use_linear_projection=True,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=16,
)
VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[4, 4, 8, 8],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    sample_size=64,
    scaling_factor=0.13025,
    force_upcast=False,
)
TEXT = dict(
    hidden_size=TEXT_WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
    projection_dim=TEXT_WIDTH,
)
LRM = dict(width=8, volume=8, voxel_channels=8, plane_width=32, plane_channels=4, hidden=16)
GRM_PARAMS = dict(in_channels=3, input_res=16, patch_size=8, layers=2, width=64, window_size=32, decoder_ratio=1)
GRM_RENDER = {  # with the parameters that a published file has besides those that are needed
    "render_type": "defered",
    "sh_degree": 0,
    "img_height": 512,
    "scaling_activation_type": "sigmoid",
    "scale_min_act": 0.001,
    "scale_max_act": 0.3,
    "scale_multi_act": 0.1,
}
OPENLRM = dict(
    camera_embed_dim=16,
    transformer_dim=32,
    transformer_layers=2,
    transformer_heads=2,
    triplane_low_res=4,
    triplane_high_res=8,
    triplane_dim=4,
    encoder_feat_dim=24,
    encoder_model_name="dinov2_vits14_reg",
    encoder_type="dinov2",
    encoder_freeze=False,
    rendering_samples_per_ray=16,
    input_size=28,
    encoder_overrides=dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28),
)

INSTANTMESH = dict(  # with attention heads of 64 channels, which is how a file of it is understood
    encoder_feat_dim=64,
    transformer_dim=64,
    transformer_layers=2,
    transformer_heads=1,
    triplane_low_res=4,
    triplane_high_res=8,
    triplane_dim=8,
    rendering_samples_per_ray=16,
    input_size=32,
    encoder_overrides=dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """What was written. path: the published file or folder; converter: the arguments of `python -m` that make of it the
    folder which is loaded, to be completed by that folder's name after the path; empty if it is loaded as it is."""

    path: Path
    converter: tuple[str, ...] = ()


def write_painter(config: ConfigDict, folder: Path) -> Checkpoint:
    """Write the painter that `config` trains: MVDream, Instant3D (which starts from blobs), or any other SDXL."""
    transformers_logging.disable_progress_bar()  # of writing files
    torch.manual_seed(0)
    if config.painter.name == "mvdream":
        return write_mvdream(folder)
    return write_instant3d(folder) if config.sample.initial_latents == "gaussian_blob" else write_sdxl(folder)


def write_reconstructor(config: ConfigDict, folder: Path) -> Checkpoint:
    """Write the reconstructor config.recon.name."""
    torch.manual_seed(1)
    return WRITERS[config.recon.name](folder)


def write_vae(folder: Path) -> Path:
    """A VAE in diffusers format, for config.pretrained.vae."""
    torch.manual_seed(2)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    return folder / "vae"


###### Painters ######


def write_instant3d(folder: Path) -> Checkpoint:
    """instant3d.pth: the flat state dict of an SDXL under sgm's names, in half precision; and two tokenizers."""
    file, models = folder / "instant3d.pth", small_sdxl(folder / "tokenizers" / "tokenizer")
    write_tokenizer(folder / "tokenizers" / "tokenizer_2")
    torch.save({"state_dict": {key: value.half() for key, value in instant3d_weights(models).items()}}, file)
    configs = write_configs({name: model.config for name, model in models.items()}, folder / "instant3d_configs")
    tokenizers = ("--tokenizer", str(folder / "tokenizers"), "--configs", str(configs))
    return Checkpoint(file, ("tools.convert_instant3d", *tokenizers))


def write_mvdream(folder: Path) -> Checkpoint:
    """sd-v2.1-base-4view.pt: the flat state dict of a Stable Diffusion 2.1 under ldm's names; and a tokenizer."""
    file = folder / "sd-v2.1-base-4view.pt"
    whole = text_config(write_tokenizer(folder / "tokenizer"), hidden_act="gelu", num_hidden_layers=3)
    unet, vae = UNet2DConditionModel(**MVDREAM_UNET), AutoencoderKL(**VAE)
    torch.save({"state_dict": mvdream_weights(unet, vae, CLIPTextModelWithProjection(whole))}, file)
    read = CLIPTextConfig(**whole.to_diff_dict() | {"num_hidden_layers": 2})  # the condition is the penultimate layer's
    configs = write_configs({"unet": unet.config, "vae": vae.config, "text_encoder": read}, folder / "mvdream_configs")
    flags = ("--tokenizer", str(folder / "tokenizer"), "--configs", str(configs))
    return Checkpoint(file, ("tools.convert_mvdream", *flags))


def write_sdxl(folder: Path) -> Checkpoint:
    """A folder in diffusers format, as any SDXL is published."""
    models = small_sdxl(folder / "tokenizer")
    size = models["text_encoder"].config.vocab_size
    StableDiffusionXLPipeline(
        **models,
        **load_tokenizers(folder / "tokenizer", folder / "tokenizer", [size, size]),
        scheduler=DDIMScheduler(**CONFIGS["scheduler"]),
        add_watermarker=False,
    ).save_pretrained(folder / "sdxl")
    return Checkpoint(folder / "sdxl")


def small_sdxl(tokenizer_folder: Path) -> dict[str, torch.nn.Module]:
    """The models of an SDXL for a tokenizer that is written into `tokenizer_folder`: the parts that PARTS names."""
    tokenizer = write_tokenizer(tokenizer_folder)
    return {
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(text_config(tokenizer, hidden_act="quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer, hidden_act="gelu")),
    }


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer without its merges: the bytes, each also as the end of a word, and the special tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    files[1].write_text("#version: 0.2\n")
    return CLIPTokenizer(*map(str, files), model_max_length=CLIP_TOKENS, pad_token="<|endoftext|>")


def text_config(tokenizer: CLIPTokenizer, **settings) -> CLIPTextConfig:
    """Of a small text encoder for `tokenizer`; settings: what differs from `TEXT`."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return CLIPTextConfig(
        **TEXT | {"max_position_embeddings": CLIP_TOKENS, "vocab_size": len(tokenizer)} | ids | settings
    )


def write_configs(configs: Mapping[str, object], folder: Path) -> Path:
    """PART.json of each part's configuration, for the --configs of a converter."""
    folder.mkdir()
    for part, config in configs.items():
        values = config.to_diff_dict() if isinstance(config, CLIPTextConfig) else dict(config)
        # what the libraries note of themselves is no argument of the models
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        (folder / f"{part}.json").write_text(json.dumps(values, indent=1))
    return folder


def instant3d_weights(models: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """{key of instant3d.pth: weight} of the `PARTS` of an SDXL, and of what the file holds besides."""
    clip, openclip = (PARTS[name].prefix for name in ("text_encoder", "text_encoder_2"))
    alphas = DDIMScheduler(**CONFIGS["scheduler"]).alphas_cumprod
    positions = models["text_encoder"].config.max_position_embeddings
    superfluous = (((1 - alphas) / alphas).sqrt(), torch.arange(positions)[None], torch.tensor(4.6052))
    return (
        ldm_unet_weights(models["unet"])
        | ldm_vae_weights(models["vae"])
        | {clip + _with_prefix(key): value for key, value in models["text_encoder"].state_dict().items()}
        | openclip_weights(models["text_encoder_2"], openclip)
        | dict(zip(NOT_NEEDED, superfluous, strict=True))
    )


def mvdream_weights(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModelWithProjection
) -> dict[str, torch.Tensor]:
    """{key of sd-v2.1-base-4view.pt: weight}."""
    return ldm_unet_weights(unet) | ldm_vae_weights(vae) | openclip_weights(text_encoder, TEXT_PREFIX)


def ldm_unet_weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Those of a stock UNet under the names of ldm and sgm."""
    return {PREFIX + ldm_name(key, unet.config): value for key, value in unet.state_dict().items()}


VAE_NAMES = {  # pattern of a name in diffusers -> name in ldm, applied in this order
    r"\.conv_norm_out\.": ".norm_out.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.group_norm\.": ".mid.attn_1.norm.",
    r"\.mid_block\.attentions\.0\.to_([qkv])\.": r".mid.attn_1.\1.",
    r"\.mid_block\.attentions\.0\.to_out\.0\.": ".mid.attn_1.proj_out.",
    r"\.(down|up)_blocks\.(\d+)\.resnets\.": r".\1.\2.block.",
    r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.": r".\1.\2.\3sample.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
}


def ldm_vae_weights(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Those of a stock VAE under the names of ldm, which counts the decoder's blocks from the last."""
    last = len(vae.config.up_block_types) - 1
    weights = {}
    for key, value in vae.state_dict().items():
        name = renamed(re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", key), VAE_NAMES)
        is_convolution = ".mid.attn_1." in name and value.ndim == 2  # of one pixel, where diffusers has a matrix
        weights[VAE_PREFIX + name] = value[..., None, None] if is_convolution else value
    return weights


OPENCLIP_NAMES = {  # pattern of a name in transformers -> name in OpenCLIP
    r"^text_projection\.weight$": "text_projection",
    r"^text_model\.embeddings\.token_embedding\.": "token_embedding.",
    r"^text_model\.embeddings\.position_embedding\.weight$": "positional_embedding",
    r"^text_model\.final_layer_norm\.": "ln_final.",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm(\d)\.": r".ln_\1.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"\.self_attn\.[qkv]_proj\.": ".attn.in_proj_",
    r"\.self_attn\.out_proj\.": ".attn.out_proj.",
}


def openclip_weights(model: CLIPTextModelWithProjection, prefix: str) -> dict[str, torch.Tensor]:
    """Those of a text encoder under `prefix` and the names of OpenCLIP."""
    weights = _stack(model.state_dict(), lambda key: renamed(_with_prefix(key), OPENCLIP_NAMES))
    weights["text_projection"] = weights["text_projection"].T.contiguous()
    return {prefix + key: value for key, value in weights.items()}


###### Reconstructors ######


def write_grm(folder: Path) -> Checkpoint:
    """grm_u.pth: a pickle of weights, a configuration made of EasyDicts, and what training left."""
    save_with_easydicts(grm_checkpoint(GRM(**GRM_PARAMS)), folder / "grm_u.pth")
    return Checkpoint(folder / "grm_u.pth", ("tools.convert_grm",))


def grm_checkpoint(model: GRM, **changes) -> dict:
    """The content of a published file. changes: visual, render, other parameters than those of the small model."""
    visual = {**GRM_PARAMS, "checkpointing": True, "num_input_views": 4}
    parts = {"visual": {"params": visual}, "render": {"params": GRM_RENDER}}
    parts |= {part: {"params": params} for part, params in changes.items()}
    return {
        "model": {f"module.visual_encoder.{key}": value for key, value in model.state_dict().items()},
        "config": EasyDict({"model_config": parts, "name": "u"}),
        "epoch": 3,
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}],
        },
        "amp": None,
    }


class EasyDict(dict):
    """What the class of that name in the package easydict does: every item is an attribute, too."""

    __module__ = "easydict"  # under which it is pickled

    def __init__(self, values):
        for key, value in values.items():
            setattr(self, key, EasyDict(value) if isinstance(value, dict) else value)

    def __setattr__(self, key, value):
        super().__setattr__(key, value)
        self[key] = value


def save_with_easydicts(content: object, file: Path) -> None:
    """torch.save, where the pickler finds `EasyDict` in the package easydict, which need not be installed."""
    installed, package = sys.modules.get("easydict"), ModuleType("easydict")
    package.EasyDict = EasyDict
    sys.modules["easydict"] = package
    try:
        torch.save(content, file)
    finally:
        del sys.modules["easydict"]
        if installed:
            sys.modules["easydict"] = installed


def write_lgm(folder: Path) -> Checkpoint:
    """A safetensors file in half precision, as LGM's."""
    file = folder / "lgm_rehearsal_fp16.safetensors"
    save_file({key: value.half() for key, value in LGM(**OPTIONS["rehearsal"]).state_dict().items()}, file)
    return Checkpoint(file)


def write_openlrm(folder: Path) -> Checkpoint:
    """A folder with config.json and model.safetensors, as on the hub."""
    folder = folder / "openlrm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OPENLRM, indent=1))
    weights = _stack(OpenLRM(**OPENLRM).state_dict(), published_name)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def write_instantmesh(folder: Path) -> Checkpoint:
    """instant_nerf_base.ckpt: a checkpoint of PyTorch Lightning."""
    file = folder / "instant_nerf_rehearsal.ckpt"
    save_as_lightning(InstantMesh(**INSTANTMESH), file)
    return Checkpoint(file)


def save_as_lightning(model: InstantMesh, file: Path, **entries) -> None:
    """Write the weights of an InstantMesh as they are published; entries: more than those, or in their place."""
    state = {"state_dict": published_weights(model), "epoch": 3, "pytorch-lightning_version": "2.1.2"}
    torch.save(state | entries, file)


def write_tiny_lrm(folder: Path) -> Checkpoint:
    """A folder as tiny/weights/lrm."""
    TinyLRM(**LRM).save_pretrained(folder / "lrm")
    return Checkpoint(folder / "lrm")


WRITERS = {
    "tiny_lrm": write_tiny_lrm,
    "lgm": write_lgm,
    "grm": write_grm,
    "openlrm": write_openlrm,
    "instantmesh": write_instantmesh,
}


###### Names ######


def _with_prefix(name: str) -> str:
    """With the prefix text_model that transformers 5 dropped from one of its text encoders."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _stack(weights: Mapping[str, torch.Tensor], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """{rename(key): weight}; queries, keys and values that get the same name are stacked in this order."""
    together = {}
    for key, value in weights.items():
        match = re.search(r"\.([qkv])_proj\.", key)
        together.setdefault(rename(key), {})["qkv".index(match[1]) if match else 0] = value
    return {
        name: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in together.items()
    }
