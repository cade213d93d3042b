"""From a configuration to a painter: the multi-view diffusion model that a run finetunes.

A new kind of painter is one entry in `PAINTERS` and one in `checks.KINDS` (and its name in config/validate.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import list_repo_files, try_to_load_from_cache
from ml_collections import ConfigDict
from transformers.utils import logging as transformers_logging

from config.errors import UserError, first_line
from diffusers_patch.checks import check_cameras as check_cameras
from diffusers_patch.checks import check_painter_files, check_timesteps, check_unet, painter_cameras, read_lora
from diffusers_patch.conversion import load_tokenizers_of
from diffusers_patch.ddim_with_logprob import check_scheduler
from diffusers_patch.mv_sdxl import MVSDXL
from diffusers_patch.mvdream import MVDream
from diffusers_patch.mvdream_checkpoints import SCHEDULER, load_mvdream_pipeline
from diffusers_patch.policy import DTYPES, MultiViewPolicy
from recon.cameras import mvdream_camera_vectors


@dataclass(frozen=True)
class Painter:
    """How one kind of painter is made; what is known before is in `checks.KINDS`.

    load_pipeline: (config.pretrained, scheduler, dtype, variant) -> stock diffusers pipeline.
    make_policy: (pipeline, cameras, config) -> MultiViewPolicy.
    """

    load_pipeline: Callable
    make_policy: Callable


def _load_sdxl(pretrained, scheduler, **options):
    check_unet(_unet_config(pretrained), "mv_sdxl", f"config.pretrained.model = {pretrained.model!r}")
    return StableDiffusionXLPipeline.from_pretrained(
        pretrained.model,
        revision=pretrained.revision,
        scheduler=scheduler,
        add_watermarker=False,
        **load_tokenizers_of(pretrained.model, "tokenizer", "tokenizer_2"),
        **options,
    )


def _unet_config(pretrained):
    where = {"revision": pretrained.revision, "subfolder": "unet"}
    try:  # in the folder or the cache: without network every question to the hub takes half a minute
        return UNet2DConditionModel.load_config(pretrained.model, local_files_only=True, **where)
    except OSError:
        return UNet2DConditionModel.load_config(pretrained.model, **where)


def _load_mvdream(pretrained, scheduler, **options):
    return load_mvdream_pipeline(pretrained.model, pretrained.revision, pretrained.tokenizer, scheduler, **options)


def _make_mv_sdxl(pipeline, cameras, config):
    blob_std = config.sample.blob_std if config.sample.initial_latents == "gaussian_blob" else None
    return MVSDXL(pipeline, cameras, config.sample.guidance_rescale, blob_std)


def _make_mvdream(pipeline, cameras, config):
    vectors = mvdream_camera_vectors(cameras)
    return MVDream(pipeline, cameras, vectors, config.sample.guidance_rescale, config.painter.negative_prompt)


PAINTERS = {"mv_sdxl": Painter(_load_sdxl, _make_mv_sdxl), "mvdream": Painter(_load_mvdream, _make_mvdream)}


def load_painter(config: ConfigDict, device: torch.device | str) -> MultiViewPolicy:
    """The multi-view policy of `config`, on `device`, without anything trainable yet.

    Raises UserError or MissingFileError, before the large files are read where that is possible.
    """
    painter = PAINTERS[config.painter.name]
    check_painter_files(config)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # of reading files; downloads keep theirs
    vae = load_vae(config.pretrained.vae) if config.pretrained.vae else None
    with reading("config.pretrained.model", config.pretrained.model, "the folder or hub id of a diffusers pipeline"):
        scheduler = load_scheduler(config.pretrained)
        check_timesteps(scheduler.config, config.sample.num_steps)
        scheduler.set_timesteps(config.sample.num_steps)
        check_scheduler(scheduler)
        pipeline = painter.load_pipeline(config.pretrained, scheduler, **loading_options(config))
    pipeline.set_progress_bar_config(disable=True)
    if vae is not None:
        replace_vae(pipeline, vae, config.pretrained.vae)
    if config.pretrained.lora:
        fuse_lora(pipeline, config.pretrained.lora)
    policy = painter.make_policy(pipeline, painter_cameras(config.painter), config)
    policy.decode_batch_size = config.sample.decode_batch_size
    return policy.to(device, config.mixed_precision)


@contextlib.contextmanager
def reading(key: str, source: str, wanted: str) -> Iterator[None]:
    """Inside, a library reads `source`, the value of `key`: errors of many kinds, which do not name it, become a
    UserError that does.

    They may advise to run code that is in the files, which is never done here."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if any(advice in str(error) for advice in ("trust_remote_code", "weights_only")):
            raise UserError(f"{key} = {source!r} brings code of its own, which is never run: give {wanted}") from error
        raise UserError(f"{key} = {source!r} could not be read ({first_line(error)}): give {wanted}") from error


def loading_options(config: ConfigDict) -> dict:
    """How the files of a pipeline are read: {"dtype": {part: type}, "variant": name or None}.

    The weights are read in the type that they will have, which saves memory; but in float32 if a LoRA is added to them
    first, and the VAE always, because it may have to stay so (`force_upcast`).
    """
    dtype = torch.float32 if config.pretrained.lora else DTYPES[config.mixed_precision]
    return {"dtype": {"default": dtype, "vae": torch.float32}, "variant": weights_variant(config.pretrained)}


def weights_variant(pretrained: ConfigDict) -> str | None:
    """ "fp16" if the UNet of config.pretrained.model exists in half precision only, else None."""
    model = Path(pretrained.model)
    plain, half = (f"diffusion_pytorch_model.{kind}safetensors" for kind in ("", "fp16."))
    if model.is_dir():
        names = {file.name for file in (model / "unet").glob("*")}
    elif model.is_file():
        return None
    else:
        names = _unet_files_on_hub(pretrained, plain, half)
    return "fp16" if half in names and plain not in names else None


def _unet_files_on_hub(pretrained, *wanted):
    """Names of files in the folder unet of a hub id.

    Those of `wanted` that are in the local cache, if the first of them is: the hub is not asked then, which without
    network takes half a minute. Otherwise all that the hub has, or what is in the cache if it is out of reach."""
    where = {"repo_id": pretrained.model, "revision": pretrained.revision}
    cached = set()
    try:
        cached = {name for name in wanted if isinstance(try_to_load_from_cache(filename=f"unet/{name}", **where), str)}
        if wanted[0] in cached:
            return cached
        return {file.removeprefix("unet/") for file in list_repo_files(**where) if file.startswith("unet/")}
    except Exception:  # no network, no such id: said when the pipeline is loaded, unless that finds it in the cache
        return cached


def load_scheduler(pretrained: ConfigDict) -> DDIMScheduler:
    """The DDIM scheduler of the painter (config.pretrained); an ldm file has none and gets Stable Diffusion's."""
    if Path(pretrained.model).is_file():
        return DDIMScheduler(**SCHEDULER)
    return DDIMScheduler.from_pretrained(pretrained.model, revision=pretrained.revision, subfolder="scheduler")


def load_vae(source: str) -> AutoencoderKL:
    """The VAE in a folder, or of a hub id. Raises MissingFileError, or UserError if something else is there."""
    where = {"pretrained_model_name_or_path": source, "local_files_only": Path(source).is_dir()}
    wanted = "a folder with a VAE's config.json and weights, a hub id, or '' for the painter's own"
    with reading("config.pretrained.vae", source, wanted):
        kind = AutoencoderKL.load_config(**where).get("_class_name", "no model of diffusers")
        if kind != "AutoencoderKL":
            raise UserError(f"config.pretrained.vae = {source!r} holds {kind}: give an AutoencoderKL")
        return AutoencoderKL.from_pretrained(**where)


def replace_vae(pipeline, vae: AutoencoderKL, source: str) -> None:
    """Let `pipeline` decode with another VAE of the same latents. Raises UserError if they cannot be the same."""

    def latents(vae):
        # every block but the last halves the image
        reduction = 2 ** (len(vae.config.block_out_channels) - 1)
        return f"{vae.config.latent_channels} channels scaled by {vae.config.scaling_factor} at 1/{reduction} size"

    if latents(vae) != latents(pipeline.vae):
        raise UserError(
            f"config.pretrained.vae = {source!r} has latents of {latents(vae)}, but the painter's are of "
            f"{latents(pipeline.vae)}: give a VAE that was made for this kind of painter, or '' for its own"
        )
    pipeline.register_modules(vae=vae)


def fuse_lora(pipeline, folder: str | Path) -> None:
    """Add a LoRA in diffusers format to the weights of a pipeline, and forget that it was one.

    Raises MissingFileError or UserError as `read_lora`, also if the LoRA does not fit.
    """
    shapes = {name: tuple(value.shape) for name, value in pipeline.unet.state_dict().items()}
    read_lora(folder, shapes, "config.pretrained.lora", "give another folder, or '' for none")
    verbosity = diffusers_logging.get_verbosity()
    # or it would warn that the file holds nothing for the text encoders, and list what does not fit
    diffusers_logging.set_verbosity(diffusers_logging.FATAL)
    try:
        with reading("config.pretrained.lora", str(folder), "a LoRA of this painter, in diffusers format"):
            pipeline.load_lora_weights(folder)
    finally:
        diffusers_logging.set_verbosity(verbosity)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def make_trainable(policy: MultiViewPolicy, config: ConfigDict) -> None:
    """Add what a run trains: LoRA matrices whose initial values follow from config.seed, or the whole UNet.

    With config.train.gradient_checkpointing the UNet's blocks are computed again in the backward pass instead of kept.
    """
    torch.manual_seed(config.seed)  # the same on every process
    if config.use_lora:
        policy.add_lora(config.lora.rank, config.lora.targets)
    else:
        policy.train_all()
    if config.train.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
