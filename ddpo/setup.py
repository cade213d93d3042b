"""From a configuration to the things a run needs: the painter, the reward, the optimizer."""

import netrc
import os
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
from diffusers_patch.policy import LORA_FILE
from mrc import LPIPS, MRC, jpeg_compressibility, jpeg_incompressibility
from mrc.bounding_box import foreground_mask
from recon import load_reconstructor, reconstructor_cameras
from recon.cameras import camera_disagreement, instant3d_cameras

PAINTERS = {"mv_sdxl": (MVSDXL, StableDiffusionXLPipeline, instant3d_cameras)}
JPEG_REWARDS = {"jpeg_compressibility": jpeg_compressibility, "jpeg_incompressibility": jpeg_incompressibility}


def start_accelerator(config):
    """The Accelerator of this run: processes, device, loss scaling, tracker."""
    if config.tracker == "wandb" and not has_wandb_account():
        os.environ.setdefault("WANDB_MODE", "offline")  # otherwise wandb stops to ask for an account
    # bf16 is the policy's business (autocast inside `predict`); fp16 needs the accelerator's loss scaling besides
    return Accelerator(
        mixed_precision="fp16" if config.mixed_precision == "fp16" else "no", cpu=not torch.cuda.is_available(),
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.logdir))


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
    problems = camera_disagreement(PAINTERS[config.painter.name][2](), reconstructor_cameras(config.recon))
    if problems:
        raise ValueError(f"The painter {config.painter.name!r} and the reconstructor {config.recon.name!r} do not fit "
                         f"together: {'; '.join(problems)}. Choose another config.recon.name or config.painter.name.")


def load_painter(config, device):
    """The multi-view policy of `config`, on `device`, without anything trainable yet.

    Raises ValueError or FileNotFoundError, before the large files are read where that is possible."""
    policy_class, pipeline_class, cameras = PAINTERS[config.painter.name]
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # of reading files; downloads keep theirs
    source = dict(pretrained_model_name_or_path=config.pretrained.model, revision=config.pretrained.revision)
    try:
        scheduler = DDIMScheduler.from_pretrained(**source, subfolder="scheduler")
        scheduler.set_timesteps(config.sample.num_steps)
        check_scheduler(scheduler)
        pipeline = pipeline_class.from_pretrained(**source, scheduler=scheduler, add_watermarker=False)
    except OSError as error:
        raise FileNotFoundError(f"config.pretrained.model = {config.pretrained.model!r} could not be loaded as a "
                                f"diffusers pipeline ({error}): give a pipeline folder or a hub id.") from error
    pipeline.set_progress_bar_config(disable=True)
    if config.pretrained.lora:
        fuse_lora(pipeline, config.pretrained.lora)
    policy = policy_class(pipeline, cameras(), guidance_rescale=config.sample.guidance_rescale)
    return policy.to(device, config.mixed_precision)


def fuse_lora(pipeline, folder):
    """Add a LoRA in diffusers format to the pipeline's weights, so that nothing of it stays apart."""
    if not (Path(folder) / LORA_FILE).is_file():
        raise FileNotFoundError(f"config.pretrained.lora = {folder!r} has no {LORA_FILE}: give a folder with a LoRA in "
                                f"diffusers format, or '' for none.")
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
    return {"lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2),
            "weight_decay": train.adam_weight_decay, "eps": train.adam_epsilon}


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
    reconstructor = load_reconstructor(config.recon, device)
    lpips = LPIPS(config.mrc.lpips_checkpoint).to(device)
    judge = MRC(reconstructor, lpips, bbox_lpips=config.mrc.bbox_lpips, min_foreground=config.mrc.min_foreground,
                empty_view_reward=config.mrc.empty_view_reward, render_size=config.recon.render_size)
    return lambda views, prompts: judge(views)
