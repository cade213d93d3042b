"""Finds every contradiction of a configuration before any model is loaded, and derives the batch numbers.

The trainer calls, in this order,
    check_flags(sys.argv)                          before config_flags.DEFINE_config_file, which already parses
    validate(config, num_processes, device_type)   fills in what is derived, raises ValueError with what to change
    print(batch_table(config, num_processes))
"""

import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from config import base
from prompts.dataset import load_prompts

ROOT = Path(__file__).resolve().parent.parent
INFINITY = math.inf

# What an enumerated key may be. A new painter, reconstructor or reward is added here and where it is loaded.
CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "tracker": ("wandb", "tensorboard", "none"),
    "reward_fn": ("mrc", "jpeg_compressibility", "jpeg_incompressibility"),
    "kl_estimator": ("log_ratio", "analytic"),
    "painter.name": ("mv_sdxl", "mvdream"),
    "lora.targets": ("attention", "attention+conv"),
    "train.timestep_weighting": ("uniform", "noise"),
    "recon.name": ("tiny_lrm", "lgm", "grm", "openlrm"),
    "recon.dtype": ("fp32", "bf16", "fp16"),
}

# Key -> interval, as mathematicians write it: [ ] include the bound, ( ) do not.
RANGES = {
    "seed": "[0, inf)",
    "num_epochs": "[1, inf)",
    "save_freq": "[1, inf)",
    "val_freq": "[1, inf)",
    "num_checkpoint_limit": "[1, inf)",
    "painter.elevation": "[0, 90)",
    "painter.azimuth_start": "[0, 360)",
    "lora.rank": "[1, inf)",
    "prompts.num_train": "[0, inf)",
    "sample.num_steps": "[1, 1000]",
    "sample.eta": "(0, 1]",
    "sample.guidance_scale": "[1, inf)",
    "sample.guidance_rescale": "[0, 1]",
    "sample.total_batch_size": "[0, inf)",
    "sample.batch_size": "[1, inf)",
    "sample.num_batches_per_epoch": "[0, inf)",
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
    "train.skip_last_steps": "[0, inf)",
    "train.timesteps_per_forward": "[1, inf)",
    "train.kl_per_update": "[0, inf)",
    "train.kl_calibration_updates": "[1, inf)",
    "recon.render_size": "[32, inf)",
    "recon.chunk_size": "[1, inf)",
    "recon.input_views": "[1, 4]",
    "mrc.min_foreground": "[0, 1)",
    "mrc.empty_view_reward": "(-inf, 0)",
    "per_prompt_stat_tracking.buffer_size": "[0, inf)",
    "per_prompt_stat_tracking.min_count": "[1, inf)",
    "kl_beta": "[0, inf)",
    "kl_normalized_coeff": "[0, inf)",
    "stop_kl": "[0, inf)",
}

# Keys of the published configurations that have another name here, or that nothing needs any more.
PUBLISHED_NAMES = {
    "kl_log": "use config.log_kl",
    "bbox_lpips": "use config.mrc.bbox_lpips",
    "lora_rank": "use config.lora.rank",
    "train_size": "use config.prompts.num_train",
    "prompt_fn": "name the prompt files in config.prompts.train_file, val_file and test_file",
    "prompt_fn_kwargs": "name the prompt files in config.prompts.train_file, val_file and test_file",
    "curate_low_reward_prompts": "run python -m prompts.curate and give its kept.txt as config.prompts.train_file",
    "num_nodes": "leave it out: the number of processes is the launcher's",
    "num_views": "leave it out: the painter says how many views it paints",
}


def validate(
    config: ConfigDict, num_processes: int, device_type: str | None = None, check_files: bool = True
) -> ConfigDict:
    """Checks the whole configuration for a run on `num_processes` processes; returns it, derived numbers filled in.

    device_type: "cuda" or "cpu" where it is known (torch.device.type); None leaves out what depends on it.
    check_files: False leaves out whether prompts and checkpoints exist.
    The same `config` object is changed (see `resolve`) and returned.
    Raises ValueError (FileNotFoundError for files) with one sentence that names the key and what to change.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}: a run has at least one process")
    _check_keys_and_types(config)
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
        _check_files(config)
    return config


def resolve(config: ConfigDict, num_processes: int) -> ConfigDict:
    """Fills in, in place, the numbers that follow from others; calling it twice changes nothing more.

    Totals and per-process numbers (sample.* alike for train.*, with gradient_accumulation_steps):
        total_batch_size = batch_size * num_processes * num_batches_per_epoch
    With num_batches_per_epoch = 0 it is derived from the total, and batch_size is an upper bound; otherwise the total
    follows. per_prompt_stat_tracking.buffer_size = 0 turns the tracking off (None). Paths that do not exist from the
    current folder but do from the repository's are made absolute.
    Raises ValueError if a total cannot be shared evenly by the processes.
    """
    sample, train = config.sample, config.train
    if sample.num_batches_per_epoch == 0:
        share = _share(
            sample.total_batch_size, num_processes, "sample.total_batch_size", "sample.num_batches_per_epoch"
        )
        sample.batch_size = _largest_divisor(share, sample.batch_size)
        sample.num_batches_per_epoch = share // sample.batch_size
    sample.total_batch_size = sample.batch_size * num_processes * sample.num_batches_per_epoch

    if train.gradient_accumulation_steps == 0:
        share = _share(
            train.total_batch_size, num_processes, "train.total_batch_size", "train.gradient_accumulation_steps"
        )
        # also a divisor of what a process sampled, or the last micro-batch would be a broken one
        samples = sample.batch_size * sample.num_batches_per_epoch
        train.batch_size = _largest_divisor(math.gcd(share, samples), train.batch_size)
        train.gradient_accumulation_steps = share // train.batch_size
    train.total_batch_size = train.batch_size * num_processes * train.gradient_accumulation_steps

    tracking = config.per_prompt_stat_tracking
    if tracking is not None and tracking.buffer_size == 0:
        config.per_prompt_stat_tracking = None

    for key in (
        "prompts.train_file",
        "prompts.val_file",
        "prompts.test_file",
        "pretrained.model",
        "pretrained.lora",
        "pretrained.tokenizer",
        "recon.checkpoint",
        "mrc.lpips_checkpoint",
    ):
        section, name = key.split(".")
        path = config[section][name]
        if path and not Path(path).exists() and (ROOT / path).exists():
            config[section][name] = str(ROOT / path)
    return config


def batch_table(config: ConfigDict, num_processes: int) -> str:
    """What an epoch is made of, as text for the run's first lines: samples, updates, on-policy or not, per process."""
    resolve(config, num_processes)
    sample, train = config.sample, config.train
    updates = updates_per_epoch(config)
    steps = trained_steps(config)
    if updates == 1:
        policy = "purely on-policy (one update on each epoch's own samples)"
    else:
        policy = f"off-policy after the first of {updates} updates on the same samples"
    rows = [
        ("processes", f"{num_processes}"),
        (
            "samples per epoch",
            f"{sample.total_batch_size} = {sample.batch_size} at a time"
            f" x {sample.num_batches_per_epoch} batches x {num_processes} processes",
        ),
        (
            "samples per update",
            f"{train.total_batch_size} = {train.batch_size} at a time"
            f" x {train.gradient_accumulation_steps} accumulated x {num_processes} processes",
        ),
        ("updates per epoch", f"{updates}, {policy}"),
        (
            "trained steps",
            f"{steps} of {sample.num_steps} per sample, {min(train.timesteps_per_forward, steps)} per UNet pass",
        ),
        ("epochs", f"{config.num_epochs}: 1 that fills the trackers, then {config.num_epochs - 1} with updates"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def updates_per_epoch(config: ConfigDict) -> int:
    """Optimizer steps per epoch of a resolved configuration; 1 = purely on-policy."""
    return config.sample.total_batch_size // config.train.total_batch_size * config.train.num_inner_epochs


def trained_steps(config: ConfigDict) -> int:
    """Denoising steps per trajectory that get a gradient: int((T - skip_last_steps) * timestep_fraction)."""
    return int((config.sample.num_steps - config.train.skip_last_steps) * config.train.timestep_fraction)


def check_flags(arguments: Sequence[str]) -> None:
    """Refuses `--config.KEY` flags whose KEY does not exist, naming the nearest one that does.

    arguments: the command line, as sys.argv. absl itself would stop with a traceback that names nothing.
    Raises ValueError.
    """
    known = _flatten(base.get_config(), sections=True)
    for argument in arguments:
        flag = re.match(r"--?(?:no)?config\.([^=]+)(?:=(.*))?$", argument, flags=re.DOTALL)
        if flag is None:
            continue
        key, value = flag.groups()
        if key not in known:
            raise ValueError(_unknown_key(key, known))
        if key == "per_prompt_stat_tracking" and value == "None":
            raise ValueError(
                "--config.per_prompt_stat_tracking=None cannot be written on the command line: use "
                "--config.per_prompt_stat_tracking.buffer_size=0"
            )


###### The checks, from single keys to their combinations ######


def _check_keys_and_types(config: ConfigDict) -> None:
    expected = _flatten(base.get_config(), sections=True)
    found = _flatten(config, sections=True)
    for key, value in found.items():
        if key not in expected:
            raise ValueError(_unknown_key(key, expected))
        if not _same_type(value, expected[key]) and not (key == "per_prompt_stat_tracking" and value is None):
            raise ValueError(
                f"config.{key} is {value!r} ({type(value).__name__}): it must be a "
                f"{_type_name(expected[key])}, such as {expected[key]!r}"
            )
    for key in expected:
        if key not in found and not (
            key.startswith("per_prompt_stat_tracking.") and found.get("per_prompt_stat_tracking") is None
        ):
            raise ValueError(f"config.{key} is missing: start from config/base.py's get_config(), which has every key")


def _check_choices_and_ranges(config: ConfigDict) -> None:
    values = _flatten(config)
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
    samples = sample.batch_size * sample.num_batches_per_epoch
    if samples % train.batch_size:
        raise ValueError(
            f"config.train.batch_size is {train.batch_size}, which does not divide the {samples} samples "
            f"of a process (sample.batch_size {sample.batch_size} x num_batches_per_epoch "
            f"{sample.num_batches_per_epoch}): set it to {_largest_divisor(samples, train.batch_size)}"
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
        left = sample.num_steps - train.skip_last_steps
        raise ValueError(
            f"config.train.timestep_fraction {train.timestep_fraction} of {left} steps leaves no step to "
            f"train: set it to {math.ceil(1000 / left) / 1000} or more"
        )
    if train.timesteps_per_forward > steps:
        raise ValueError(
            f"config.train.timesteps_per_forward is {train.timesteps_per_forward}, but only {steps} steps "
            f"of a sample are trained: set it to {steps} or less"
        )
    if not train.cfg and sample.guidance_scale != 1.0:
        raise ValueError(
            f"config.train.cfg is False but samples are painted with config.sample.guidance_scale "
            f"{sample.guidance_scale}, so the update would score another policy than the one that "
            f"sampled: set train.cfg to True or sample.guidance_scale to 1.0"
        )
    total_updates = (config.num_epochs - 1) * updates_per_epoch(config)
    if train.kl_per_update > 0 and train.kl_calibration_updates > max(total_updates, 1):
        raise ValueError(
            f"config.train.kl_calibration_updates is {train.kl_calibration_updates}, more than the "
            f"{total_updates} updates of the run: lower it or raise config.num_epochs"
        )


def _check_foreign_keys(config: ConfigDict) -> None:
    """Keys of one painter or sculptor that are set for another would be ignored in silence."""
    default = base.get_config().painter
    for key in ("elevation", "azimuth_start", "negative_prompt"):
        if config.painter.name != "mvdream" and config.painter[key] != default[key]:
            raise ValueError(
                f"config.painter.{key} is {config.painter[key]!r}, which only the painter 'mvdream' can "
                f"follow: set config.painter.name to 'mvdream', or leave the key out"
            )
    if config.recon.name != "openlrm" and config.recon.input_views != base.get_config().recon.input_views:
        raise ValueError(
            f"config.recon.input_views is {config.recon.input_views!r}, which only the sculptor 'openlrm' can "
            f"follow: set config.recon.name to 'openlrm', or leave the key out"
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
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "config.train.use_8bit_adam needs the package bitsandbytes, which is not installed: "
                "pip install bitsandbytes, or set it to False"
            )


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
    values = _flatten(config)
    for key, what in required.items():
        if not values[key]:
            raise ValueError(f"config.{key} is empty: set --config.{key}=... to {what}")


def _check_files(config: ConfigDict) -> None:
    for key in ("train_file", "val_file", "test_file"):
        path = config.prompts[key]
        try:
            prompts = load_prompts(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"config.prompts.{key}: {error}") from None
        except ValueError as error:
            raise ValueError(f"config.prompts.{key}: {error}") from None
        if key == "train_file" and config.prompts.num_train > len(prompts):
            raise ValueError(
                f"config.prompts.num_train is {config.prompts.num_train} but {path} has {len(prompts)} "
                f"prompts: set it to {len(prompts)} or less (0 = all)"
            )
    checkpoints = {
        "pretrained.model": config.pretrained.model,
        "pretrained.lora": config.pretrained.lora,
        "resume_from": config.resume_from,
    }
    if config.reward_fn == "mrc":
        checkpoints["recon.checkpoint"] = config.recon.checkpoint
        checkpoints["mrc.lpips_checkpoint"] = config.mrc.lpips_checkpoint
    for key, path in checkpoints.items():
        hub_id = key in ("pretrained.model", "recon.checkpoint") and _may_be_hub_id(path)
        if path and not hub_id and not Path(path).expanduser().exists():
            raise FileNotFoundError(
                f"config.{key} is {path!r}, which does not exist: set it to an existing file or folder"
            )


###### Small helpers ######


def _share(total: int, num_processes: int, total_key: str, count_key: str) -> int:
    """What one process does of `total`."""
    if total == 0:
        raise ValueError(f"config.{total_key} and config.{count_key} are both 0: set one of them")
    if total % num_processes:
        below = _largest_divisor(total, num_processes)
        raise ValueError(
            f"config.{total_key} is {total}, which {num_processes} processes cannot share evenly: run on "
            f"{below}, or set it to {math.ceil(total / num_processes) * num_processes}"
        )
    return total // num_processes


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (at least 1)."""
    return next(d for d in range(max(1, min(limit, number)), 0, -1) if number % d == 0)


def _inside(value: float, interval: str) -> bool:
    """Whether `value` lies in an interval written like "[0, 1)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # NaN is in no interval


def _flatten(config: ConfigDict, prefix: str = "", sections: bool = False) -> dict[str, Any]:
    """{"train.batch_size": 4, ...}; with `sections` the inner dictionaries themselves too."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            if sections:
                flat[prefix + key] = value
            flat.update(_flatten(value, f"{prefix}{key}.", sections))
        else:
            flat[prefix + key] = value
    return flat


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _type_name(default: Any) -> str:
    names = {bool: "truth value", int: "whole number", float: "number", str: "text", ConfigDict: "group of keys"}
    return names[type(default)]


def _unknown_key(key: str, known: dict[str, Any]) -> str:
    if key in PUBLISHED_NAMES:
        return (
            f"config.{key} is a key of the published configuration that this one does not have: {PUBLISHED_NAMES[key]}"
        )
    # by the whole name or by its last part, whichever is nearer: train.lr_rate, but also plain learning_rate
    keys = [name for name in known if not isinstance(known[name], ConfigDict)]
    leaf = key.split(".")[-1]
    nearest = max(
        keys,
        key=lambda name: (max(_similarity(key, name), _similarity(leaf, name.split(".")[-1])), _similarity(key, name)),
    )
    return f"config.{key} does not exist: did you mean config.{nearest}? (config/base.py lists all keys)"


def _similarity(a: str, b: str) -> float:
    """0 to 1; the letters two names share, in order."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def _may_be_hub_id(path: str) -> bool:
    """ "owner/name" whose first part is no folder here; anything else is a path."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not (ROOT / path.split("/")[0]).exists()
        and not Path(path.split("/")[0]).exists()
    )


def _command_line() -> None:
    """`python -m config.validate --processes N --config ...`: one sentence and exit status 1 if a run could not
    start."""
    from absl import app, flags
    from ml_collections import config_flags

    check_flags(sys.argv)
    config_flags.DEFINE_config_file("config", "config/base.py", "The configuration to check.")
    flags.DEFINE_integer("processes", 1, "Processes of the run.", lower_bound=1)
    app.run(lambda _: validate(flags.FLAGS.config, flags.FLAGS.processes) and None)


if __name__ == "__main__":
    try:
        _command_line()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"carve3d_train: {error}")
