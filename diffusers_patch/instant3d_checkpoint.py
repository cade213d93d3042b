"""Instant3D's public file, instant3d.pth of justimyhxu/GRM, as a stock diffusers SDXL pipeline.

The file is the flat state dict of an SDXL under the names of Stability AI's generative-models ("sgm"): four models
under four prefixes. diffusers' own converters rename each of them; what is here says which model is where, adds the
configurations, which the file lacks (instant3d/*.json, those of SDXL 1.0), and refuses a file in which something is
missing, or from which something would be lost without a word.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from config.errors import UserError
from diffusers_patch.conversion import load_tokenizer, read_configs
from recon.weights import differences, read_weights

TOKENIZERS = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_FOLDER = f"a folder that has SDXL's tokenizer and tokenizer_2, or with access to the hub {TOKENIZERS}"
PUBLISHED = "give the complete instant3d.pth of justimyhxu/GRM"


@dataclass(frozen=True)
class Part:
    """One of the four models.

    prefix: what the names of its weights begin with in the file.
    make: its configuration -> model.
    convert: (model, {name in the file: weight}) -> {name in diffusers or transformers: weight}.
    """

    prefix: str
    make: Callable
    convert: Callable


PARTS = {
    "unet": Part(
        "model.diffusion_model.",
        UNet2DConditionModel.from_config,
        lambda model, weights: convert_ldm_unet_checkpoint(weights, model.config),
    ),
    "vae": Part(
        "first_stage_model.",
        AutoencoderKL.from_config,
        lambda model, weights: convert_ldm_vae_checkpoint(weights, model.config),
    ),
    "text_encoder": Part(  # CLIP ViT-L
        "conditioner.embedders.0.transformer.",
        lambda config: CLIPTextModel(CLIPTextConfig(**config)),
        lambda model, weights: convert_ldm_clip_checkpoint(weights),
    ),
    "text_encoder_2": Part(  # OpenCLIP ViT-bigG
        "conditioner.embedders.1.model.",
        lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
        lambda model, weights: convert_open_clip_checkpoint(model, weights, PARTS["text_encoder_2"].prefix),
    ),
}

CONFIGS = read_configs(Path(__file__).parent / "instant3d", [*PARTS, "scheduler"])
NOT_NEEDED = {  # key of the file: why no model here has it
    "denoiser.sigmas": "noise levels of the 1000 steps, which the scheduler computes from its betas",
    PARTS["text_encoder"].prefix + "text_model.embeddings.position_ids": "0 to 76, counted by the text encoder itself",
    PARTS["text_encoder_2"].prefix + "logit_scale": "temperature of CLIP's contrastive training, unused in encoding",
}


def convert_instant3d(
    weights: Mapping[str, torch.Tensor], configs: Mapping[str, dict] = CONFIGS, source: str = "this state dict"
) -> dict[str, torch.nn.Module]:
    """{part: model} of the `PARTS` of SDXL from one state dict under sgm's names; weights keep their type and device.

    configs: {part: configuration}, for a checkpoint that is not of the public size. source: its name in messages.
    Raises UserError, naming keys, unless every weight of every model is there in the right shape and every weight of
    the file is used or in `NOT_NEEDED`.
    """
    absent = [f"{part.prefix}* ({name})" for name, part in PARTS.items() if not _of(part, weights)]
    if absent:
        raise UserError(f"{source} has no weights {', '.join(absent)}: {PUBLISHED}.")
    prefixes = tuple(part.prefix for part in PARTS.values())
    unknown = [key for key in weights if not key.startswith(prefixes) and key not in NOT_NEEDED]
    if unknown:
        raise UserError(f"{source} holds {_some(unknown)}, which no part of SDXL has: {PUBLISHED}.")
    return {name: _convert_part(name, _of(part, weights), configs[name], source) for name, part in PARTS.items()}


def _convert_part(name, weights, config, source):
    part = PARTS[name]
    with init_empty_weights():  # every weight is about to be replaced, and the full size is 14 GB in float32
        model = part.make(config)
    try:
        converted = part.convert(model, weights)
    except KeyError as error:  # a converter looked for a weight
        raise UserError(f"{source} lacks {part.prefix}{error.args[0]}: {PUBLISHED}.") from error
    own = model.state_dict()
    converted = {
        # transformers 5 dropped the prefix "text_model." from one of its text encoders
        (key if key in own else key.removeprefix("text_model.")): value.contiguous()
        for key, value in converted.items()
        if value is not None  # a weight that a converter looked for in vain
    }
    found = differences(converted, {key: value.shape for key, value in own.items()})
    if found:
        raise UserError(f"{source} does not hold the {name} of SDXL (in diffusers' names: {found}): {PUBLISHED}.")
    unused = unused_keys(lambda marks: part.convert(model, marks), weights)
    if unused:
        raise UserError(f"{source} holds {_some(unused)}, which the {name} of SDXL does not have: {PUBLISHED}.")
    model.load_state_dict(converted, assign=True)
    return model.requires_grad_(False).eval()


def unused_keys(convert: Callable[[dict], dict], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Those keys of `weights` that `convert` (state dict -> state dict) makes nothing of.

    It is shown numbers in place of the weights, each expanded to the shape of its weight, and its results are searched
    for them; so it must move, split and transpose, and compute nothing.
    """
    marks = {
        key: torch.tensor(number, dtype=torch.int16).expand(value.shape)
        for number, (key, value) in enumerate(weights.items())
    }
    used = {int(value[(0,) * value.ndim]) for value in convert(marks).values() if value is not None}
    return [key for number, key in enumerate(weights) if number not in used]


def load_instant3d_pipeline(
    source: str | Path,
    tokenizer: str | Path = TOKENIZERS,
    tokenizer_2: str | Path = "",
    dtype: torch.dtype | None = None,
    configs: Mapping[str, dict] = CONFIGS,
) -> StableDiffusionXLPipeline:
    """The pipeline of the file `source` (.pth or .safetensors) with the DDIM scheduler of SDXL's betas.

    tokenizer, tokenizer_2: see `load_tokenizers`. dtype: of all weights; None = as in the file.
    Raises MissingFileError or UserError with one sentence.
    """
    vocabularies = [configs[name]["vocab_size"] for name in ("text_encoder", "text_encoder_2")]
    tokenizers = load_tokenizers(tokenizer, tokenizer_2, vocabularies)
    parts = convert_instant3d(read_weights(source), configs, str(source))
    if dtype is not None:
        for model in parts.values():
            torch.nn.Module.to(model, dtype)
    return StableDiffusionXLPipeline(
        **parts,
        **tokenizers,
        scheduler=DDIMScheduler(**CONFIGS["scheduler"]),
        force_zeros_for_empty_prompt=True,  # as in training: what replaces a dropped caption is zeros
        add_watermarker=False,
    )


def load_tokenizers(
    tokenizer: str | Path, tokenizer_2: str | Path, vocabularies: Sequence[int]
) -> dict[str, CLIPTokenizer]:
    """SDXL's two tokenizers, {"tokenizer": ..., "tokenizer_2": ...}.

    tokenizer: a folder or hub id that has them in its folders `tokenizer` and `tokenizer_2`, as every SDXL does; or,
        if `tokenizer_2` is given too, the folder of the first one alone. They differ in their padding only, which is
        set here: the end token for CLIP, token 0 for OpenCLIP. So one and the same folder may be given twice.
    vocabularies: how many tokens each text encoder knows.
    Raises MissingFileError.
    """
    where = (
        [(tokenizer, ""), (tokenizer_2, "")] if tokenizer_2 else [(tokenizer, "tokenizer"), (tokenizer, "tokenizer_2")]
    )
    first, second = (load_tokenizer(*place, size, SDXL_FOLDER) for place, size in zip(where, vocabularies, strict=True))
    first.pad_token = first.eos_token
    second.pad_token = second.convert_ids_to_tokens(0)
    return {"tokenizer": first, "tokenizer_2": second}


def _of(part, weights):
    """The weights of a part, under their names in the file."""
    return {key: value for key, value in weights.items() if key.startswith(part.prefix) and key not in NOT_NEEDED}


def _some(keys):
    return f"{len(keys)} weights ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
