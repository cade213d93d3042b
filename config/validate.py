"""Finds every contradiction of a configuration before any model is loaded.

Unknown keys and values of another type are refused by the lock of base.get_config() where they are written, and
config/cli.py turns those errors into a sentence. Prompt files are checked by `PromptDataset`, which reads them.
"""

import difflib
import importlib.util
import math
import re
from pathlib import Path

from ml_collections import ConfigDict

from config import base
from config.batches import (
    derive_batches,
    largest_divisor,
    samples_per_process,
    trainable_steps,
    trained_steps,
    updates_per_epoch,
)

ROOT = Path(__file__).resolve().parent.parent
PATHS = (  # keys that name files or folders
    "prompts.train_file",
    "prompts.val_file",
    "prompts.test_file",
    "pretrained.model",
    "pretrained.vae",
    "pretrained.lora",
    "pretrained.tokenizer",
    "recon.checkpoint",
    "mrc.lpips_checkpoint",
)

SPLATTING = ("lgm", "grm")  # reconstructors whose scenes are rendered by gsplat on GPUs
ANY_CAMERAS = ("instantmesh",)  # reconstructors that follow config.recon.cameras

# The values that a key may have. Painters, reconstructors and rewards are those of the registries in diffusers_patch/
# loading.py, recon/__init__.py and mrc/rewards.py, which cost seconds to import; a test holds the names here to them.
CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "tracker": ("wandb", "tensorboard", "none"),
    "reward_fn": ("mrc", "jpeg_compressibility", "jpeg_incompressibility"),
    "kl_estimator": ("log_ratio", "analytic"),
    "painter.name": ("mv_sdxl", "mvdream"),
    "lora.targets": ("attention", "attention+conv"),
    "sample.initial_latents": ("noise", "gaussian_blob"),
    "train.timestep_weighting": ("uniform", "noise"),
    "recon.name": ("tiny_lrm", "lgm", "grm", "openlrm", "instantmesh"),
    "recon.cameras": ("instant3d", "mvdream", "zero123plus"),
    "recon.dtype": ("fp32", "bf16", "fp16"),
}

# Key -> interval, as mathematicians write it: [ ] include the bound, ( ) do not.
RANGES = {
    "seed": "[0, inf)",
    "num_epochs": "[1, inf)",
    "save_freq": "[1, inf)",
    "val_freq": "[1, inf)",
    "num_checkpoint_limit": "[1, inf)",
    "max_bad_samples": "[1, inf)",
    "painter.elevation": "[0, 90)",
    "painter.azimuth_start": "[0, 360)",
    "lora.rank": "[1, inf)",
    "prompts.num_train": "[0, inf)",
    "sample.num_steps": "[1, 1000]",
    "sample.eta": "(0, 1]",
    "sample.guidance_scale": "[1, inf)",
    "sample.guidance_rescale": "[0, 1]",
    "sample.blob_std": "(0, 1]",
    "sample.total_batch_size": "[0, inf)",
    "sample.batch_size": "[1, inf)",
    "sample.num_batches_per_epoch": "[0, inf)",
    "sample.decode_batch_size": "[1, inf)",
    "sample.save_images": "[0, inf)",
    "train.total_batch_size": "[0, inf)",
    "train.batch_size": "[1, inf)",
    "train.gradient_accumulation_steps": "[0, inf)",
    "train.learning_rate": "(0, inf)",
    "train.adam_beta1": "[0, 1)",
    "train.adam_beta2": "[0, 1)",
    "train.adam_weight_decay": "[0, inf)",
    "train.adam_epsilon": "(0, inf)",
    "train.max_grad_norm": "(0, inf)",
    "train.num_inner_epochs": "[1, inf)",
    "train.adv_clip_max": "(0, inf)",
    "train.clip_range": "(0, 1)",
    "train.timestep_fraction": "(0, 1]",
    "kl_timestep_fraction": "(0, 1]",
    "train.skip_last_steps": "[0, inf)",
    "train.timesteps_per_forward": "[1, inf)",
    "train.kl_per_update": "[0, inf)",
    "train.kl_calibration_updates": "[1, inf)",
    "recon.render_size": "[32, inf)",
    "recon.chunk_size": "[1, inf)",
    "recon.input_views": "[1, 4]",
    "recon.elevation": "[0, 90)",
    "mrc.min_foreground": "[0, 1)",
    "mrc.empty_view_reward": "(-inf, 0)",
    "per_prompt_stat_tracking.buffer_size": "[0, inf)",
    "per_prompt_stat_tracking.min_count": "[1, inf)",
    "kl_beta": "[0, inf)",
    "kl_normalized_coeff": "[0, inf)",
    "stop_kl": "[0, inf)",
}


def validate(
    config: ConfigDict, num_processes: int, device_type: str | None = None, check_files: bool = True
) -> ConfigDict:
    """Check the whole configuration for a run on `num_processes` processes; returns it with derived numbers filled in.

    device_type: "cuda" or "cpu" where it is known (torch.device.type); None leaves out what depends on it.
    check_files: False leaves out whether checkpoints and optional packages exist.
    The same `config` object is changed (see `resolve`) and returned.
    Raises ValueError (FileNotFoundError for files) with one sentence that names the key and what to change.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}: a run has at least one process")
    _check_choices_and_ranges(config)
    _check_train_batch_fits(config)
    resolve(config, num_processes)
    _check_train_batch_fits(config)
    _check_batches(config, num_processes)
    _check_steps(config)
    _check_foreign_keys(config)
    _check_statistics_and_kl(config)
    _check_precision(config, device_type)
    _check_required(config)
    if check_files:
        _check_packages(config, device_type)
        _check_files(config)
    return config


def resolve(config: ConfigDict, num_processes: int) -> ConfigDict:
    """Fill in, in place, what follows from other keys; calling it twice changes nothing more.

    Batches: see `config.batches.derive_batches`. per_prompt_stat_tracking.buffer_size = 0 becomes None, no tracking.
    Paths that do not exist from the current folder but do from the repository's are made absolute.
    Raises ValueError if the processes cannot share a total evenly.
    """
    derive_batches(config, num_processes)
    tracking = config.per_prompt_stat_tracking
    if tracking is not None and tracking.buffer_size == 0:
        config.per_prompt_stat_tracking = None
    for key in PATHS:
        section, name = key.split(".")
        path = config[section][name]
        if path and not Path(path).exists() and (ROOT / path).exists():
            config[section][name] = str(ROOT / path)
    return config


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"train.batch_size": 4, ...}: every key that is no section, under its dotted name."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return flat


###### The checks, from single keys to their combinations ######


def _check_choices_and_ranges(config: ConfigDict) -> None:
    values = flatten(config)
    for key, value in values.items():
        if value is None and key != "per_prompt_stat_tracking":  # the lock lets None pass for any type
            raise ValueError(f"config.{key} is None: give it a value, or leave it at its default in config/base.py")
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            nearest = difflib.get_close_matches(values[key], allowed, n=1, cutoff=0.5)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"config.{key} is {values[key]!r}{hint}: set it to one of {', '.join(map(repr, allowed))}")
    for key, interval in RANGES.items():
        if key in values and not _inside(values[key], interval):
            raise ValueError(f"config.{key} is {values[key]!r}: set it to a value in {interval}")


def _check_train_batch_fits(config: ConfigDict) -> None:
    """Asked of the numbers as written and again of the derived ones, so that more processes do not hide a mistake."""
    sample, train = config.sample, config.train
    if train.batch_size > sample.batch_size:
        raise ValueError(
            f"config.train.batch_size is {train.batch_size}, larger than config.sample.batch_size, "
            f"{sample.batch_size}: set train.batch_size to {sample.batch_size} or less"
        )


def _check_batches(config: ConfigDict, num_processes: int) -> None:
    """The batch arithmetic of a resolved configuration (DDPO's conditions, as sentences)."""
    sample, train = config.sample, config.train
    samples = samples_per_process(config)
    if samples % train.batch_size:
        raise ValueError(
            f"config.train.batch_size is {train.batch_size}, which does not divide the {samples} samples "
            f"of a process (sample.batch_size {sample.batch_size} x num_batches_per_epoch "
            f"{sample.num_batches_per_epoch}): set it to {largest_divisor(samples, train.batch_size)}"
        )
    if sample.total_batch_size % train.total_batch_size:
        raise ValueError(
            f"an update takes {train.total_batch_size} samples (config.train.batch_size {train.batch_size} x "
            f"{num_processes} processes x gradient_accumulation_steps {train.gradient_accumulation_steps}), which does "
            f"not divide the epoch's {sample.total_batch_size}: set train.gradient_accumulation_steps to a divisor of "
            f"{samples // train.batch_size}, or train.total_batch_size to {sample.total_batch_size} and "
            f"train.gradient_accumulation_steps to 0"
        )


def _check_steps(config: ConfigDict) -> None:
    sample, train = config.sample, config.train
    if train.skip_last_steps >= sample.num_steps:
        raise ValueError(
            f"config.train.skip_last_steps is {train.skip_last_steps} of config.sample.num_steps "
            f"{sample.num_steps}, which leaves no step to train: skip at most {sample.num_steps - 1}"
        )
    steps = trained_steps(config)
    if steps < 1:
        left = trainable_steps(config)
        raise ValueError(
            f"config.train.timestep_fraction {train.timestep_fraction} of {left} steps leaves no step to "
            f"train: set it to {math.ceil(1000 / left) / 1000} or more"
        )
    if train.timesteps_per_forward > steps:
        raise ValueError(
            f"config.train.timesteps_per_forward is {train.timesteps_per_forward}, but only {steps} steps "
            f"of a sample are trained: set it to {steps} or less"
        )
    if not train.cfg:
        raise ValueError(
            "config.train.cfg is False, but the update has to score the policy that sampled, with the same guidance: "
            "set it to True (and sample.guidance_scale to 1.0 for a run without guidance)"
        )
    total_updates = (config.num_epochs - 1) * updates_per_epoch(config)
    if train.kl_per_update > 0 and train.kl_calibration_updates > max(total_updates, 1):
        raise ValueError(
            f"config.train.kl_calibration_updates is {train.kl_calibration_updates}, more than the "
            f"{total_updates} updates of the run: lower it or raise config.num_epochs"
        )


def _check_foreign_keys(config: ConfigDict) -> None:
    """A key that only one painter or reconstructor reads would be ignored without a word if set for another."""
    default = base.get_config()
    for key in ("elevation", "azimuth_start", "negative_prompt"):
        if config.painter.name != "mvdream" and config.painter[key] != default.painter[key]:
            raise ValueError(
                f"config.painter.{key} is {config.painter[key]!r}, which only the painter 'mvdream' can "
                f"follow: set config.painter.name to 'mvdream', or leave the key out"
            )
    if config.painter.name != "mv_sdxl" and config.sample.initial_latents == "gaussian_blob":
        raise ValueError(
            "config.sample.initial_latents is 'gaussian_blob', which only the painter 'mv_sdxl' can follow: set it to "
            "'noise', or config.painter.name to 'mv_sdxl'"
        )
    if config.sample.initial_latents != "gaussian_blob" and config.sample.blob_std != default.sample.blob_std:
        raise ValueError(
            f"config.sample.blob_std is {config.sample.blob_std!r}, but config.sample.initial_latents is "
            f"{config.sample.initial_latents!r}, which has no blobs: set that to 'gaussian_blob', or leave the key out"
        )
    if config.recon.name != "openlrm" and config.recon.input_views != default.recon.input_views:
        raise ValueError(
            f"config.recon.input_views is {config.recon.input_views!r}, which only the reconstructor 'openlrm' can "
            f"follow: set config.recon.name to 'openlrm', or leave the key out"
        )
    if config.recon.name not in ANY_CAMERAS and config.recon.cameras != default.recon.cameras:
        raise ValueError(
            f"config.recon.cameras is {config.recon.cameras!r}, which only the reconstructor 'instantmesh' can follow: "
            f"set config.recon.name to 'instantmesh', or leave the key out"
        )
    if config.recon.cameras != "mvdream" and config.recon.elevation != default.recon.elevation:
        raise ValueError(
            f"config.recon.elevation is {config.recon.elevation!r}, which only config.recon.cameras = 'mvdream' can "
            f"follow, and that is {config.recon.cameras!r}: set it to 'mvdream', or leave the key out"
        )


def _check_statistics_and_kl(config: ConfigDict) -> None:
    tracking = config.per_prompt_stat_tracking
    if tracking is not None and tracking.buffer_size < tracking.min_count:
        raise ValueError(
            f"config.per_prompt_stat_tracking.buffer_size is {tracking.buffer_size}, smaller than "
            f"min_count, {tracking.min_count}, so a prompt could never have enough rewards: set "
            f"buffer_size to {tracking.min_count} or more (published: 3 x min_count)"
        )
    if config.kl_in_reward and not config.kl_penalty:
        raise ValueError(
            "config.kl_in_reward is True but config.kl_penalty is False, so there is no KL to put into "
            "the reward: set kl_penalty to True, or kl_in_reward to False (log_kl still logs it)"
        )
    if config.kl_in_reward and config.kl_per_prompt_stat_tracking and tracking is None:
        raise ValueError(
            "config.kl_per_prompt_stat_tracking is True but config.per_prompt_stat_tracking is off, which "
            "has the buffer sizes it needs: turn that on, or set kl_per_prompt_stat_tracking to False"
        )
    if config.stop_kl > 0 and not (config.kl_penalty or config.log_kl):
        raise ValueError(
            f"config.stop_kl is {config.stop_kl} but no KL is computed: set log_kl to True, or stop_kl to 0"
        )


def _check_precision(config: ConfigDict, device_type: str | None) -> None:
    if device_type == "cpu":
        for key, value, half in (
            ("mixed_precision", config.mixed_precision, "fp16"),
            ("recon.dtype", config.recon.dtype, "fp16"),
        ):
            if value == half:
                raise ValueError(f"config.{key} is 'fp16', which needs a GPU and this run has none: set it to 'bf16'")
    if config.train.use_8bit_adam:
        if device_type == "cpu":
            raise ValueError("config.train.use_8bit_adam needs a GPU and this run has none: set it to False")


def _check_packages(config: ConfigDict, device_type: str | None) -> None:
    if device_type == "cuda" and config.recon.name in SPLATTING and config.reward_fn == "mrc":
        _check_package("gsplat", f"config.recon.name = {config.recon.name!r} on a GPU", "pip install gsplat==1.5.3")
    if config.recon.remove_background and config.reward_fn == "mrc":
        _check_package("rembg", "config.recon.remove_background = True", "pip install rembg, or set it to False")
    if config.train.use_8bit_adam:
        remedy = "pip install bitsandbytes, or set it to False"
        _check_package("bitsandbytes", "config.train.use_8bit_adam = True", remedy)


def _check_package(package: str, what: str, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs the package {package}, which is not installed: {remedy}")


def _check_required(config: ConfigDict) -> None:
    required = {
        "pretrained.model": "a diffusers folder or hub id of a multi-view painter",
        "prompts.train_file": "a text file with one prompt per line",
        "prompts.val_file": "a text file with one prompt per line",
        "prompts.test_file": "a text file with one prompt per line",
        "logdir": "the folder for the runs' folders",
    }
    if config.reward_fn == "mrc":
        required["recon.checkpoint"] = "the weights of the reconstructor that the reward needs"
    if config.resume_from == "auto":
        required["run_name"] = "the name of the run that config.resume_from = 'auto' resumes or starts"
    values = flatten(config)
    for key, what in required.items():
        if not values[key]:
            raise ValueError(f"config.{key} is empty: set --config.{key}=... to {what}")


def _check_files(config: ConfigDict) -> None:
    checkpoints = {
        "pretrained.model": config.pretrained.model,
        "pretrained.vae": config.pretrained.vae,
        "pretrained.lora": config.pretrained.lora,
        "resume_from": "" if config.resume_from == "auto" else config.resume_from,
    }
    if config.reward_fn == "mrc":
        checkpoints["recon.checkpoint"] = config.recon.checkpoint
        checkpoints["mrc.lpips_checkpoint"] = config.mrc.lpips_checkpoint
    for key, path in checkpoints.items():
        hub_id = key in ("pretrained.model", "pretrained.vae", "recon.checkpoint") and _may_be_hub_id(path)
        if path and not hub_id and not Path(path).expanduser().exists():
            raise FileNotFoundError(
                f"config.{key} is {path!r}, which does not exist: set it to an existing file or folder"
            )


###### Small helpers ######


def _inside(value: float, interval: str) -> bool:
    """Whether `value` lies in an interval written like "[0, 1)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # NaN is in no interval


def _may_be_hub_id(path: str) -> bool:
    """ "owner/name" whose first part is no folder here; anything else is a path."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not (ROOT / path.split("/")[0]).exists()
        and not Path(path.split("/")[0]).exists()
    )
