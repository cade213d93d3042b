"""From a configuration to the things a run needs: the painter, the reward, the optimizer."""

import netrc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusers_patch.ddim_with_logprob import check_scheduler
from diffusers_patch.mv_sdxl import MVSDXL
from diffusers_patch.mvdream import MVDream
from diffusers_patch.mvdream_checkpoints import SCHEDULER, load_mvdream_pipeline
from diffusers_patch.policy import LORA_FILE
from mrc import LPIPS, MRC, jpeg_compressibility, jpeg_incompressibility
from mrc.bounding_box import foreground_mask
from recon import background_remover, load_reconstructor, reconstructor_cameras
from recon.cameras import camera_disagreement, instant3d_cameras, mvdream_camera_vectors, mvdream_cameras


@dataclass(frozen=True)
class Painter:
    """How one kind of painter is made.

    cameras: config.painter -> where its views stand, known before anything is loaded; pipeline: (config.pretrained,
    scheduler) -> stock diffusers pipeline; policy: (pipeline, cameras, config) -> MultiViewPolicy."""

    cameras: Callable
    pipeline: Callable
    policy: Callable
    camera_hint: str = ""  # what can be changed if the cameras do not fit


def _sdxl_pipeline(pretrained, scheduler):
    return StableDiffusionXLPipeline.from_pretrained(
        pretrained.model, revision=pretrained.revision, scheduler=scheduler, add_watermarker=False
    )


def _mvdream_pipeline(pretrained, scheduler):
    return load_mvdream_pipeline(pretrained.model, pretrained.revision, pretrained.tokenizer, scheduler)


def _mvdream_policy(pipeline, cameras, config):
    return MVDream(
        pipeline,
        cameras,
        mvdream_camera_vectors(cameras),
        config.sample.guidance_rescale,
        config.painter.negative_prompt,
    )


PAINTERS = {
    "mv_sdxl": Painter(
        cameras=lambda painter: instant3d_cameras(),
        pipeline=_sdxl_pipeline,
        policy=lambda pipeline, cameras, config: MVSDXL(pipeline, cameras, config.sample.guidance_rescale),
    ),
    "mvdream": Painter(
        cameras=lambda painter: mvdream_cameras(painter.elevation, painter.azimuth_start),
        pipeline=_mvdream_pipeline,
        policy=_mvdream_policy,
        camera_hint="set config.painter.elevation to the sculptor's, or ",
    ),
}
JPEG_REWARDS = {"jpeg_compressibility": jpeg_compressibility, "jpeg_incompressibility": jpeg_incompressibility}


def start_accelerator(config):
    """The Accelerator of this run: processes, device, loss scaling, tracker."""
    if config.tracker == "wandb" and not has_wandb_account():
        os.environ.setdefault("WANDB_MODE", "offline")  # otherwise wandb stops to ask for an account
    # bf16 is the policy's business (autocast inside `predict`); fp16 needs the accelerator's loss scaling besides
    return Accelerator(
        mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.logdir),
    )


def has_wandb_account():
    """Whether wandb will find an account in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_tracker(accelerator, config, folder):
    """Start the tracker that `config.tracker` names, with its files in the run's folder."""
    if config.tracker == "none":
        return
    accelerator.project_configuration.logging_dir = str(folder)
    flat = {}
    for key, value in config.to_dict().items():
        section = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".strip("."): "none" if one is None else one for name, one in section.items()}
    accelerator.init_trackers("carve3d", flat, {"wandb": {"name": folder.name, "dir": str(folder)}})


def check_cameras(config):
    """Raise ValueError if painter and sculptor look from different places. Nothing is loaded."""
    if config.reward_fn != "mrc":
        return
    painter = PAINTERS[config.painter.name]
    problems = camera_disagreement(painter.cameras(config.painter), reconstructor_cameras(config.recon))
    if problems:
        raise ValueError(
            f"The painter {config.painter.name!r} and the reconstructor {config.recon.name!r} do not fit "
            f"together: {'; '.join(problems)}; {painter.camera_hint}choose another config.recon.name or "
            f"config.painter.name."
        )


def load_painter(config, device):
    """The multi-view policy of `config`, on `device`, without anything trainable yet.

    Raises ValueError or FileNotFoundError, before the large files are read where that is possible."""
    painter = PAINTERS[config.painter.name]
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # of reading files; downloads keep theirs
    try:
        scheduler = load_scheduler(config.pretrained)
        scheduler.set_timesteps(config.sample.num_steps)
        check_scheduler(scheduler)
        pipeline = painter.pipeline(config.pretrained, scheduler)
    except OSError as error:
        raise FileNotFoundError(
            f"config.pretrained.model = {config.pretrained.model!r} could not be loaded as a "
            f"diffusers pipeline ({error}): give a pipeline folder or a hub id."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    if config.pretrained.lora:
        fuse_lora(pipeline, config.pretrained.lora)
    policy = painter.policy(pipeline, painter.cameras(config.painter), config)
    return policy.to(device, config.mixed_precision)


def load_scheduler(pretrained):
    """The DDIM scheduler of the painter; an ldm file has none of its own and gets Stable Diffusion's."""
    if Path(pretrained.model).is_file():
        return DDIMScheduler(**SCHEDULER)
    return DDIMScheduler.from_pretrained(pretrained.model, revision=pretrained.revision, subfolder="scheduler")


def fuse_lora(pipeline, folder):
    """Add a LoRA in diffusers format to the pipeline's weights, so that nothing of it stays apart."""
    if not (Path(folder) / LORA_FILE).is_file():
        raise FileNotFoundError(
            f"config.pretrained.lora = {folder!r} has no {LORA_FILE}: give a folder with a LoRA in "
            f"diffusers format, or '' for none."
        )
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it would warn that the file holds nothing for the text encoders
    pipeline.load_lora_weights(folder)
    diffusers_logging.set_verbosity(verbosity)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def make_trainable(policy, config):
    """Add what is trained: LoRA matrices, or the whole UNet."""
    if config.use_lora:
        policy.add_lora(config.lora.rank, config.lora.targets)
    else:
        policy.train_all()


def adam_settings(config):
    """AdamW's settings under torch's names."""
    train = config.train
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.adam_weight_decay,
        "eps": train.adam_epsilon,
    }


def make_optimizer(policy, config):
    """AdamW over the policy's trainable weights, in 8 bits if asked for."""
    if config.train.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(policy.trainable_parameters(), **adam_settings(config))
    return torch.optim.AdamW(policy.trainable_parameters(), **adam_settings(config))


@dataclass
class PlainResult:
    """The verdict of a reward that needs no reconstruction: as `mrc.MRCResult`, without renders."""

    reward: torch.Tensor
    foreground: torch.Tensor
    empty: torch.Tensor
    renders: None = None


def load_reward(config, device):
    """The reward of `config` as a function (views (B, V, 3, S, S), prompts) -> result.

    A result has `reward` (B,), `foreground` (B, V), `empty` (B, V) bool and `renders` (B, V, 3, S, S) or None. To add
    one's own reward, return such a function here under a new name and list the name in config/validate.py."""
    if config.reward_fn in JPEG_REWARDS:
        score = JPEG_REWARDS[config.reward_fn]

        def jpeg(views, prompts):
            foreground = foreground_mask(views).float().mean((-1, -2))
            return PlainResult(score(views), foreground, foreground < config.mrc.min_foreground)

        return jpeg
    on_white = background_remover() if config.recon.remove_background else lambda views: views
    reconstructor = load_reconstructor(config.recon, device)
    lpips = LPIPS(config.mrc.lpips_checkpoint).to(device)
    judge = MRC(
        reconstructor,
        lpips,
        bbox_lpips=config.mrc.bbox_lpips,
        min_foreground=config.mrc.min_foreground,
        empty_view_reward=config.mrc.empty_view_reward,
        render_size=config.recon.render_size,
    )
    return lambda views, prompts: judge(on_white(views))
