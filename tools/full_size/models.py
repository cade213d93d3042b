"""Full-size painters and reconstructors without weights, put where the trainer would load them from files.

Their architecture follows from config.painter.name and config.recon.name; where pretrained.model, pretrained.vae or
recon.checkpoint is a local folder, from the config.json files in it. No file of weights is needed.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_patch import loading, mvdream, mvdream_checkpoints
from diffusers_patch.instant3d_checkpoint import CONFIGS as SDXL
from recon.grm import GRM
from recon.instantmesh import InstantMesh
from recon.instantmesh_checkpoint import OPTIONS as INSTANTMESH_OPTIONS
from recon.lgm import LGM
from recon.openlrm import OPTIONS as OPENLRM_OPTIONS
from recon.openlrm import OpenLRM
from recon.tiny_lrm import TinyLRM

GRM_U = {  # the published GRM for Instant3D's four views
    "in_channels": 3,
    "input_res": 512,
    "patch_size": 16,
    "layers": 24,
    "width": 1024,
    "window_size": 4096,
    "decoder_ratio": 3,
}


def install(device: torch.device) -> None:
    """From now on `load_painter` and `load_reconstructor` make models with random weights instead of reading them.

    device: where they are made, for on a CPU the random numbers of the largest would take minutes."""
    loading.load_scheduler = _scheduler
    loading.load_vae = _vae
    loading.weights_variant = lambda pretrained: None
    loading.check_painter_files = lambda config: None
    loading.fuse_lora = lambda pipeline, folder: None
    for name, load_pipeline in PIPELINES.items():
        loading.PAINTERS[name] = replace(loading.PAINTERS[name], load_pipeline=_on(device, load_pipeline))
    for model, make in MAKE_RECONSTRUCTOR.values():
        model.from_pretrained = staticmethod(_on(device, make))


def _on(device, make):
    """`make`, with what it makes on `device`."""

    def make_there(*args, **kwargs):
        with torch.device(device):
            return make(*args, **kwargs)

    return make_there


# -- painters ---------------------------------------------------------------------------------------------------------


class Tokens:
    """A tokenizer without a vocabulary: every prompt is `model_max_length` times the same token."""

    added_tokens_encoder = {}

    def __init__(self, model_max_length):
        self.model_max_length = model_max_length

    def tokenize(self, prompt):  # asked for in search of textual inversion tokens
        return []

    def __call__(self, prompts, **_):
        count = 1 if isinstance(prompts, str) else len(prompts)
        ids = torch.ones(count, self.model_max_length, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def _sdxl_pipeline(pretrained, scheduler, **_):
    first = CLIPTextConfig(**_read(pretrained, "text_encoder", SDXL["text_encoder"]))
    second = CLIPTextConfig(**_read(pretrained, "text_encoder_2", SDXL["text_encoder_2"]))
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel.from_config(_read(pretrained, "unet", SDXL["unet"])),
        vae=AutoencoderKL.from_config(_read(pretrained, "vae", SDXL["vae"])),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=Tokens(first.max_position_embeddings),
        tokenizer_2=Tokens(second.max_position_embeddings),
        scheduler=scheduler,
        add_watermarker=False,
    )


def _mvdream_pipeline(pretrained, scheduler, **_):
    unet = _read(pretrained, "unet", mvdream.UNET_CONFIG)
    if "context_dim" in unet:  # the layout of ashawkey/mvdream-sd2.1-diffusers
        unet = mvdream.UNET_CONFIG | mvdream_checkpoints.stock_unet_config(unet)
    text = CLIPTextConfig(**_read(pretrained, "text_encoder", mvdream_checkpoints.TEXT_ENCODER))
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(unet),
        vae=AutoencoderKL.from_config(_read(pretrained, "vae", mvdream_checkpoints.VAE)),
        text_encoder=CLIPTextModel(text),
        tokenizer=Tokens(text.max_position_embeddings),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"mv_sdxl": _sdxl_pipeline, "mvdream": _mvdream_pipeline}


def _scheduler(pretrained):
    default = mvdream_checkpoints.SCHEDULER  # Stable Diffusion's, which SDXL has as well
    return DDIMScheduler.from_config(_read(pretrained, "scheduler", default, "scheduler_config.json"))


def _vae(source):
    """Another VAE in place of the painter's own; those that a hub offers are SDXL's, mended for half precision."""
    file = Path(source) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else SDXL["vae"] | {"force_upcast": False}
    return AutoencoderKL.from_config(config)


def _read(pretrained, part, default, file_name="config.json"):
    file = Path(pretrained.model) / part / file_name
    return json.loads(file.read_text()) if file.is_file() else default


# -- reconstructors ---------------------------------------------------------------------------------------------------


def _tiny_lrm(checkpoint):
    return TinyLRM(**(_read_folder(checkpoint) or {}))


def _lgm(checkpoint):
    return LGM()  # "big", the published one


def _grm(checkpoint):
    config = _read_folder(checkpoint) or {"visual": GRM_U, "render": None}
    return GRM(render=config["render"], **config["visual"])


def _openlrm(checkpoint):
    """Of the size that a hub id names, as in zxhezexin/openlrm-mix-base-1.1; "base" if it names none."""
    named = next((size for size in OPENLRM_OPTIONS if f"-{size}-" in str(checkpoint)), "base")
    return OpenLRM(**(_read_folder(checkpoint) or OPENLRM_OPTIONS[named]))


def _instantmesh(checkpoint):
    """Of the size that the file's name says, as in instant_nerf_base.ckpt; "large" if it says none."""
    return InstantMesh(**INSTANTMESH_OPTIONS["base" if "base" in Path(checkpoint).name else "large"])


# config.recon.name -> class, and checkpoint -> model
MAKE_RECONSTRUCTOR: dict[str, tuple[type[nn.Module], Callable]] = {
    "tiny_lrm": (TinyLRM, _tiny_lrm),
    "lgm": (LGM, _lgm),
    "grm": (GRM, _grm),
    "openlrm": (OpenLRM, _openlrm),
    "instantmesh": (InstantMesh, _instantmesh),
}


def _read_folder(checkpoint):
    file = Path(checkpoint) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None
