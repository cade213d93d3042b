"""The public files of MVDream, in any of their three layouts, as one stock diffusers pipeline."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from huggingface_hub import hf_hub_download
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from config.errors import MissingFileError, UserError
from diffusers_patch.checks import CLIP_FOLDER, check_ldm_tokenizer, check_unet
from diffusers_patch.conversion import load_tokenizer, load_tokenizers_of
from diffusers_patch.mvdream import PREFIX, convert_mvdream_unet
from recon.weights import check_hub, read_weights

# Stable Diffusion 2.1's, read from its published configuration
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER = {  # OpenCLIP ViT-H without its last layer: the condition is the penultimate one
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TEXT_PREFIX = "cond_stage_model.model."


def load_mvdream_pipeline(
    source: str | Path,
    revision: str | None = None,
    tokenizer: str = "",
    scheduler: DDIMScheduler | None = None,
    dtype: dict[str, torch.dtype] | None = None,
    variant: str | None = None,
    **ldm_configs,
) -> StableDiffusionPipeline:
    """MVDream as a stock `StableDiffusionPipeline`; nothing is fetched for a local path.

    source: a folder or hub id, of a stock pipeline or in the layout of ashawkey/mvdream-sd2.1-diffusers, or the
        original (ldm) file sd-v2.1-base-4view.pt.
    tokenizer: folder of CLIP's tokenizer, for an ldm file only, which has none.
    dtype, variant: as in diffusers, for a stock pipeline only; the other layouts are read as they are.
    ldm_configs: unet, vae, text_encoder of an ldm file that is not of the public size.
    Raises MissingFileError or UserError with one sentence.
    """
    if Path(source).is_file():
        return _from_ldm_file(Path(source), tokenizer, scheduler, **ldm_configs)
    if not Path(source).is_dir():
        check_hub("the source", str(source), revision)
    where = {
        "pretrained_model_name_or_path": str(source),
        "revision": revision,
        "local_files_only": Path(source).is_dir(),
    }
    unet = UNet2DConditionModel.load_config(**where, subfolder="unet")
    scheduler = scheduler or DDIMScheduler.from_pretrained(**where, subfolder="scheduler")
    tokenizer = load_tokenizers_of(source, "tokenizer")
    if unet["_class_name"] == "UNet2DConditionModel":
        check_unet(unet, "mvdream", str(source))
        return StableDiffusionPipeline.from_pretrained(
            **where,
            **tokenizer,
            scheduler=scheduler,
            dtype=dtype,
            variant=variant,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _assemble(
        convert_mvdream_unet(_unet_weights(source, revision), **stock_unet_config(unet)),
        AutoencoderKL.from_pretrained(**where, subfolder="vae"),
        CLIPTextModel.from_pretrained(**where, subfolder="text_encoder"),
        tokenizer.get("tokenizer") or CLIPTokenizer.from_pretrained(**where, subfolder="tokenizer"),
        scheduler,
    )


def stock_unet_config(config: dict) -> dict:
    """The entries of a stock UNet's config that correspond to the config of one of ashawkey's (ldm) UNets."""
    widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
    attends = [2**level in config["attention_resolutions"] for level in range(len(widths))]
    return {
        "sample_size": config["image_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        "layers_per_block": config["num_res_blocks"],
        "cross_attention_dim": config["context_dim"],
        "attention_head_dim": [max(1, width // config["num_head_channels"]) for width in widths],
    }


def _unet_weights(source, revision):
    folder = Path(source) / "unet"
    for name in WEIGHT_FILES:
        if folder.is_dir():
            file = folder / name
        else:
            try:
                file = Path(hf_hub_download(str(source), f"unet/{name}", revision=revision))
            except OSError:
                continue
        if file.is_file():
            return read_weights(file)
    raise MissingFileError(
        f"{source} has neither {' nor '.join(f'unet/{name}' for name in WEIGHT_FILES)}: give a "
        f"complete folder or hub id of MVDream"
    )


def _from_ldm_file(file, tokenizer, scheduler=None, unet=None, vae=None, text_encoder=None):
    check_ldm_tokenizer(file, tokenizer)
    configs = {"unet": unet or {}, "vae": VAE | (vae or {}), "text_encoder": TEXT_ENCODER | (text_encoder or {})}
    weights = read_weights(file)
    if not any(key.startswith(PREFIX) for key in weights):
        raise UserError(f"{file} has no weights under {PREFIX}*: give MVDream's sd-v2.1-base-4view.pt")
    tokenizer = load_tokenizer(tokenizer, "", configs["text_encoder"]["vocab_size"], CLIP_FOLDER)
    painter = convert_mvdream_unet(weights, **configs["unet"])
    decoder = AutoencoderKL(**configs["vae"])
    _load(decoder, convert_ldm_vae_checkpoint(weights, decoder.config), file)
    encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    layers = encoder.config.num_hidden_layers
    text = {
        key: value
        for key, value in weights.items()
        if key.startswith(TEXT_PREFIX) and f"resblocks.{layers}." not in key and "text_projection" not in key
    }
    _load(encoder, convert_open_clip_checkpoint(encoder, text, TEXT_PREFIX), file)
    return _assemble(painter, decoder, encoder, tokenizer, scheduler or DDIMScheduler(**SCHEDULER))


def _load(model, state, file):
    """Load what diffusers' converters made; transformers 5 dropped the prefix "text_model."."""
    names = set(model.state_dict())
    state = {key if key in names else key.removeprefix("text_model."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    problems = model.load_state_dict(state, strict=False)
    missing = [key for key in problems.missing_keys if not key.endswith("position_ids")]
    if missing or problems.unexpected_keys:
        raise UserError(
            f"{file} does not hold a complete {type(model).__name__}: {len(missing)} weights are missing "
            f"{missing[:3]}, {len(problems.unexpected_keys)} unknown {problems.unexpected_keys[:3]}; give "
            f"MVDream's sd-v2.1-base-4view.pt"
        )


def _assemble(unet, vae, text_encoder, tokenizer, scheduler):
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
