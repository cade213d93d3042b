"""Finds every contradiction of a configuration before any model is loaded.

Unknown keys and values of another type are refused by the lock of base.get_config() where they are written, and
config/cli.py turns those errors into a sentence. Prompt files are checked by `PromptDataset`, which reads them.
"""

import difflib
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from config import base
from config.batches import (
    derive_batches,
    gradients_while_painting,
    kl_in_loss,
    largest_divisor,
    samples_per_process,
    trainable_steps,
    trained_steps,
)
from config.errors import MissingFileError, UnwritableError, UserError

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
AUTO = "auto"  # config.resume_from: the run's newest good checkpoint, or a new run

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
    "train.objective": ("ddpo", "awm"),
    "train.timestep_weighting": ("uniform", "noise"),
    "recon.name": ("tiny_lrm", "lgm", "grm", "openlrm", "instantmesh"),
    "recon.cameras": ("instant3d", "mvdream", "zero123plus"),
    "recon.dtype": ("fp32", "bf16", "fp16"),
}

# Key -> interval, as mathematicians write it: [ ] include the bound, ( ) do not. The upper bounds of sizes are far
# beyond what can be meant, so that a slip of the keyboard does not start a run that fails when its memory is full.
RANGES = {
    "seed": "[0, 1e18]",
    "num_epochs": "[1, inf)",
    "save_freq": "[1, inf)",
    "val_freq": "[1, inf)",
    "num_checkpoint_limit": "[1, inf)",
    "max_bad_samples": "[1, inf)",
    "painter.elevation": "[0, 90)",
    "painter.azimuth_start": "[0, 360)",
    "lora.rank": "[1, 1024]",
    "prompts.num_train": "[0, inf)",
    "sample.num_steps": "[1, 1000]",
    "sample.eta": "(0, 1]",
    "sample.guidance_scale": "[1, inf)",
    "sample.guidance_rescale": "[0, 1]",
    "sample.blob_std": "(0, 1]",
    "sample.total_batch_size": "[0, 1e6]",
    "sample.batch_size": "[1, 1e6]",
    "sample.num_batches_per_epoch": "[0, 1e6]",
    "sample.decode_batch_size": "[1, inf)",
    "sample.save_images": "[0, inf)",
    "train.total_batch_size": "[0, 1e6]",
    "train.batch_size": "[1, 1e6]",
    "train.gradient_accumulation_steps": "[0, 1e6]",
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
    "recon.render_size": "[32, 4096]",
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
    Raises UserError (MissingFileError for files) with one sentence that names the key and what to change.
    """
    if num_processes < 1:
        raise UserError(f"num_processes is {num_processes}: a run has at least one process")
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
        _check_files({key: flatten(config)[key] for key in ("pretrained.model", "pretrained.vae", "pretrained.lora")})
    if config.reward_fn == "mrc":
        _check_judge(config, device_type, check_files)
    return config


def validate_judge(config: ConfigDict, device_type: str | None = None) -> ConfigDict:
    """As `validate`, for a command that judges given views, whose configuration needs neither painter nor prompts."""
    _check_choices_and_ranges(config)
    resolve(config, 1)
    _check_foreign_keys(config)
    _check_judge(config, device_type, check_files=True)
    return config


def check_run_places(config: ConfigDict) -> None:
    """Raise UserError unless the run's folder will be below config.logdir and can be written, or, for a run that is
    resumed, unless there is a checkpoint. Nothing is left there."""
    if config.resume_from not in ("", AUTO):
        run, remedy = Path(config.resume_from), "give a run's folder or one of its checkpoint folders"
        if not run.is_dir():
            found = "is a file" if run.exists() else "does not exist"
            raise MissingFileError(f"config.resume_from = {config.resume_from!r} {found}: {remedy}")
        if not run.name.startswith("checkpoint_") and not any(run.glob("checkpoint_*")):
            raise MissingFileError(f"config.resume_from = {config.resume_from!r} holds no checkpoint: {remedy}")
        check_folder("config.resume_from", run)
        return
    name = Path(config.run_name)
    if config.run_name and (name.is_absolute() or not name.parts or ".." in name.parts or "\0" in config.run_name):
        raise UserError(
            f"config.run_name is {config.run_name!r}, which is no name of a folder below config.logdir: write a name "
            f"without '/' and '..', and the folder that holds it in config.logdir"
        )
    if any(len(os.fsencode(part)) > 255 for part in name.parts):
        raise UserError(f"config.run_name has {len(config.run_name)} letters: use at most 255")
    check_folder("config.logdir", config.logdir)


def check_folder(name: str, path: str | Path) -> None:
    """Raise UserError unless `path` is a folder that can be written, or can be made. Nothing is left there.

    name: of the flag or key that says so."""
    place = next(place for place in (Path(path), *Path(path).absolute().parents) if os.path.lexists(place))
    if not place.is_dir():
        what = "which" if place == Path(path) else f"but {place}"
        raise UnwritableError(f"{name} is {str(path)!r}, {what} is a file: name a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UnwritableError(
            f"{name} is {str(path)!r}, but {place} cannot be written ({error.strerror}): name another folder"
        ) from error


def check_file(name: str, path: str | Path, endings: Sequence[str] = (".png", ".jpg", ".pdf")) -> None:
    """Raise UserError unless a file that ends in one of `endings` can be written to `path`, or can be written anew.

    name: of the flag that says so."""
    if Path(path).is_dir():
        raise UnwritableError(f"{name} is {str(path)!r}, which is a folder: name a file in it")
    if Path(path).suffix.lower() not in endings:
        raise UserError(f"{name} is {str(path)!r}: name a file that ends in {' or '.join(endings)}")
    check_folder(name, Path(path).parent)


def resolve(config: ConfigDict, num_processes: int) -> ConfigDict:
    """Fill in, in place, what follows from other keys; calling it twice changes nothing more.

    Batches: see `config.batches.derive_batches`. per_prompt_stat_tracking.buffer_size = 0 becomes None, no tracking.
    Paths that do not exist from the current folder but do from the repository's are made absolute.
    Raises UserError if the processes cannot share a total evenly.
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
            raise UserError(f"config.{key} is None: give it a value, or leave it at its default in config/base.py")
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            nearest = difflib.get_close_matches(values[key], allowed, n=1, cutoff=0.5)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise UserError(f"config.{key} is {values[key]!r}{hint}: set it to one of {', '.join(map(repr, allowed))}")
    for key, interval in RANGES.items():
        if key in values and not _inside(values[key], interval):
            raise UserError(f"config.{key} is {values[key]!r}: set it to a value in {interval}")


def _check_train_batch_fits(config: ConfigDict) -> None:
    """Asked of the numbers as written and again of the derived ones, so that more processes do not hide a mistake."""
    sample, train = config.sample, config.train
    if train.batch_size > sample.batch_size:
        raise UserError(
            f"config.train.batch_size is {train.batch_size}, larger than config.sample.batch_size, "
            f"{sample.batch_size}: set train.batch_size to {sample.batch_size} or less"
        )


def _check_batches(config: ConfigDict, num_processes: int) -> None:
    """The batch arithmetic of a resolved configuration (DDPO's conditions, as sentences)."""
    sample, train = config.sample, config.train
    if not _inside(sample.total_batch_size, RANGES["sample.total_batch_size"]):
        raise UserError(
            f"config.sample.num_batches_per_epoch is {sample.num_batches_per_epoch}, which makes an epoch of "
            f"{sample.total_batch_size} samples: set it to 0, and sample.total_batch_size to a million or less"
        )
    samples = samples_per_process(config)
    if samples % train.batch_size:
        raise UserError(
            f"config.train.batch_size is {train.batch_size}, which does not divide the {samples} samples "
            f"of a process (sample.batch_size {sample.batch_size} x num_batches_per_epoch "
            f"{sample.num_batches_per_epoch}): set it to {largest_divisor(samples, train.batch_size)}"
        )
    if sample.total_batch_size % train.total_batch_size:
        raise UserError(
            f"an update takes {train.total_batch_size} samples (config.train.batch_size {train.batch_size} x "
            f"{num_processes} processes x gradient_accumulation_steps {train.gradient_accumulation_steps}), which does "
            f"not divide the epoch's {sample.total_batch_size}: set train.gradient_accumulation_steps to a divisor of "
            f"{samples // train.batch_size}, or train.total_batch_size to {sample.total_batch_size} and "
            f"train.gradient_accumulation_steps to 0"
        )


def _check_steps(config: ConfigDict) -> None:
    sample, train = config.sample, config.train
    if train.skip_last_steps >= sample.num_steps:
        raise UserError(
            f"config.train.skip_last_steps is {train.skip_last_steps} of config.sample.num_steps "
            f"{sample.num_steps}, which leaves no step to train: skip at most {sample.num_steps - 1}"
        )
    steps = trained_steps(config)
    if steps < 1:
        left = trainable_steps(config)
        raise UserError(
            f"config.train.timestep_fraction {train.timestep_fraction} of {left} steps leaves no step to "
            f"train: set it to {math.ceil(1000 / left) / 1000} or more"
        )
    if train.timesteps_per_forward > steps and not gradients_while_painting(config):
        raise UserError(
            f"config.train.timesteps_per_forward is {train.timesteps_per_forward}, but only {steps} steps "
            f"of a sample are trained: set it to {steps} or less"
        )
    if not train.cfg and train.objective == "ddpo":
        raise UserError(
            "config.train.cfg is False, but the update has to score the policy that sampled, with the same guidance: "
            "set it to True (and sample.guidance_scale to 1.0 for a run without guidance)"
        )


def _check_foreign_keys(config: ConfigDict) -> None:
    """A key that only one painter or reconstructor reads would be ignored without a word if set for another."""
    default = base.get_config()
    for key in ("elevation", "azimuth_start", "negative_prompt"):
        if config.painter.name != "mvdream" and config.painter[key] != default.painter[key]:
            raise UserError(
                f"config.painter.{key} is {config.painter[key]!r}, which only the painter 'mvdream' can "
                f"follow: set config.painter.name to 'mvdream', or leave the key out"
            )
    if config.painter.name != "mv_sdxl" and config.sample.initial_latents == "gaussian_blob":
        raise UserError(
            "config.sample.initial_latents is 'gaussian_blob', which only the painter 'mv_sdxl' can follow: set it to "
            "'noise', or config.painter.name to 'mv_sdxl'"
        )
    if config.sample.initial_latents != "gaussian_blob" and config.sample.blob_std != default.sample.blob_std:
        raise UserError(
            f"config.sample.blob_std is {config.sample.blob_std!r}, but config.sample.initial_latents is "
            f"{config.sample.initial_latents!r}, which has no blobs: set that to 'gaussian_blob', or leave the key out"
        )
    for key, names in (("input_views", ("openlrm",)), ("cameras", ANY_CAMERAS)):
        if config.recon.name not in names and config.recon[key] != default.recon[key]:
            raise UserError(
                f"config.recon.{key} is {config.recon[key]!r}, which only the reconstructor {names[0]!r} can follow: "
                f"set config.recon.name to {names[0]!r}, or leave the key out"
            )
    if config.recon.cameras != "mvdream" and config.recon.elevation != default.recon.elevation:
        raise UserError(
            f"config.recon.elevation is {config.recon.elevation!r}, which only config.recon.cameras = 'mvdream' can "
            f"follow, and that is {config.recon.cameras!r}: set it to 'mvdream', or leave the key out"
        )


def _check_statistics_and_kl(config: ConfigDict) -> None:
    tracking = config.per_prompt_stat_tracking
    if tracking is not None and tracking.buffer_size < tracking.min_count:
        raise UserError(
            f"config.per_prompt_stat_tracking.buffer_size is {tracking.buffer_size}, smaller than "
            f"min_count, {tracking.min_count}, so a prompt could never have enough rewards: set "
            f"buffer_size to {tracking.min_count} or more (published: 3 x min_count)"
        )
    if config.kl_in_reward and not config.kl_penalty:
        raise UserError(
            "config.kl_in_reward is True but config.kl_penalty is False, so there is no KL to put into "
            "the reward: set kl_penalty to True, or kl_in_reward to False (log_kl still logs it)"
        )
    if config.kl_in_reward and config.kl_per_prompt_stat_tracking and tracking is None:
        raise UserError(
            "config.kl_per_prompt_stat_tracking is True but config.per_prompt_stat_tracking is off, which "
            "has the buffer sizes it needs: turn that on, or set kl_per_prompt_stat_tracking to False"
        )
    if kl_in_loss(config) and config.kl_timestep_fraction < 1:
        raise UserError(
            f"config.kl_timestep_fraction is {config.kl_timestep_fraction}, but config.kl_in_reward is False, and a KL "
            f"in the loss is one of every trained step: set kl_timestep_fraction to 1.0, or kl_in_reward to True"
        )
    penalised = kl_in_loss(config) and config.kl_beta > 0
    if config.train.objective == "awm" and penalised and config.kl_estimator == "log_ratio":
        raise UserError(
            "config.kl_estimator is 'log_ratio', but config.train.objective is 'awm', whose paths nobody scored, so "
            "that a KL in the loss needs the closed form: set kl_estimator to 'analytic', or kl_in_reward to True"
        )
    if config.stop_kl > 0 and not (config.kl_penalty or config.log_kl):
        raise UserError(
            f"config.stop_kl is {config.stop_kl} but no KL is computed: set log_kl to True, or stop_kl to 0"
        )


def _check_precision(config: ConfigDict, device_type: str | None) -> None:
    if device_type == "cpu":
        _check_half("mixed_precision", config.mixed_precision)
        if config.train.use_8bit_adam:
            raise UserError("config.train.use_8bit_adam needs a GPU and this run has none: set it to False")
    if config.train.use_8bit_adam:
        remedy = "pip install bitsandbytes, or set it to False"
        _check_package("bitsandbytes", "config.train.use_8bit_adam = True", remedy)


def _check_half(key: str, dtype: str) -> None:
    """For a run without a GPU."""
    if dtype == "fp16":
        raise UserError(f"config.{key} is 'fp16', which needs a GPU and this run has none: set it to 'bf16'")


def _check_judge(config: ConfigDict, device_type: str | None, check_files: bool) -> None:
    """What the reward "mrc" needs: config.recon and config.mrc."""
    recon = config.recon
    if device_type == "cpu":
        _check_half("recon.dtype", recon.dtype)
    _check_device(recon.device, device_type)
    if not recon.checkpoint:
        raise UserError(
            "config.recon.checkpoint is empty: set --config.recon.checkpoint=... to the weights of the reconstructor "
            "that the reward needs"
        )
    if not check_files:
        return
    if device_type == "cuda" and recon.device != "cpu" and recon.name in SPLATTING:
        _check_package("gsplat", f"config.recon.name = {recon.name!r} on a GPU", "pip install gsplat==1.5.3")
    if recon.remove_background:
        _check_package("rembg", "config.recon.remove_background = True", "pip install rembg, or set it to False")
    _check_files({"recon.checkpoint": recon.checkpoint, "mrc.lpips_checkpoint": config.mrc.lpips_checkpoint})


def _check_device(device: str, device_type: str | None) -> None:
    if not re.fullmatch(r"|cpu|cuda(:\d+)?", device):
        raise UserError(f"config.recon.device is {device!r}: set it to 'cpu', 'cuda', one such as 'cuda:1', or ''")
    if device.startswith("cuda") and device_type == "cpu":
        raise UserError(f"config.recon.device is {device!r}, and this run has no GPU: set it to ''")
    if ":" in device and device_type == "cuda":
        from torch.cuda import device_count  # takes seconds to import

        if int(device.split(":")[1]) >= device_count():
            raise UserError(
                f"config.recon.device is {device!r}, and the GPUs are 'cuda:0' to 'cuda:{device_count() - 1}': set it "
                f"to one of them, or ''"
            )


def _check_package(package: str, what: str, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}, which is not installed: {remedy}")


def _check_required(config: ConfigDict) -> None:
    required = {
        "pretrained.model": "a diffusers folder or hub id of a multi-view painter",
        "prompts.train_file": "a text file with one prompt per line",
        "prompts.val_file": "a text file with one prompt per line",
        "prompts.test_file": "a text file with one prompt per line",
        "logdir": "the folder for the runs' folders",
    }
    if config.resume_from == AUTO:
        required["run_name"] = "the name of the run that config.resume_from = 'auto' resumes or starts"
    values = flatten(config)
    for key, what in required.items():
        if not values[key]:
            raise UserError(f"config.{key} is empty: set --config.{key}=... to {what}")


def _check_files(paths: dict[str, str]) -> None:
    """paths: key -> file, folder or hub id, "" for none."""
    for key, path in paths.items():
        hub_id = key in ("pretrained.model", "pretrained.vae", "recon.checkpoint") and _may_be_hub_id(path)
        if path and not hub_id and not Path(path).expanduser().exists():
            raise MissingFileError(
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
