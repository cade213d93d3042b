"""The arithmetic of batches and steps: what one process samples and trains on, derived from totals of the whole run."""

import math

from ml_collections import ConfigDict

from config.errors import UserError


def derive_batches(config: ConfigDict, num_processes: int) -> ConfigDict:
    """Fill in, in place, the numbers that follow from others; calling it twice changes nothing more.

    Totals and per-process numbers (`sample` here, and likewise `train` with gradient_accumulation_steps):
        total_batch_size = batch_size * num_processes * num_batches_per_epoch
    With num_batches_per_epoch = 0 it is derived from the total, and batch_size is an upper bound; otherwise the total
    follows. Raises UserError if the processes cannot share a total evenly.
    """
    sample, train = config.sample, config.train
    if sample.num_batches_per_epoch == 0:
        per_process = _per_process(
            sample.total_batch_size, num_processes, "sample.total_batch_size", "sample.num_batches_per_epoch"
        )
        sample.batch_size = largest_divisor(per_process, sample.batch_size)
        sample.num_batches_per_epoch = per_process // sample.batch_size
    sample.total_batch_size = sample.batch_size * num_processes * sample.num_batches_per_epoch

    if train.gradient_accumulation_steps == 0:
        per_process = _per_process(
            train.total_batch_size, num_processes, "train.total_batch_size", "train.gradient_accumulation_steps"
        )
        # also a divisor of what a process samples, or the last micro-batch would be incomplete
        train.batch_size = largest_divisor(math.gcd(per_process, samples_per_process(config)), train.batch_size)
        train.gradient_accumulation_steps = per_process // train.batch_size
    train.total_batch_size = train.batch_size * num_processes * train.gradient_accumulation_steps
    return config


def samples_per_process(config: ConfigDict) -> int:
    """Samples that one process paints in an epoch, once the batches are derived."""
    return config.sample.batch_size * config.sample.num_batches_per_epoch


def updates_per_epoch(config: ConfigDict) -> int:
    """Optimizer steps per epoch, once the batches are derived; 1 = purely on-policy."""
    return config.sample.total_batch_size // config.train.total_batch_size * config.train.num_inner_epochs


def trainable_steps(config: ConfigDict) -> int:
    """Denoising steps of a trajectory that may be trained on, counted from its first: T - skip_last_steps."""
    return config.sample.num_steps - config.train.skip_last_steps


def trained_steps(config: ConfigDict) -> int:
    """Denoising steps of a trajectory that get a gradient: int(trainable_steps * timestep_fraction)."""
    return int(trainable_steps(config) * config.train.timestep_fraction)


def reference_steps(config: ConfigDict) -> int:
    """Denoising steps of a trajectory at which the base model is asked: at least 1 of the trainable ones."""
    return max(1, int(trainable_steps(config) * config.kl_timestep_fraction))


def kl_in_loss(config: ConfigDict) -> bool:
    """Whether the loss has a KL to the base model, times config.kl_beta."""
    return config.kl_penalty and not config.kl_in_reward


def gradients_while_painting(config: ConfigDict) -> bool:
    """Whether an epoch's only update takes its gradients from the painting passes, once the batches are derived."""
    painted = config.train.gradients_while_painting and config.train.objective == "ddpo"
    return painted and updates_per_epoch(config) == 1 and config.use_lora and not kl_in_loss(config)


def steps_beyond_chance(config: ConfigDict) -> bool:
    """Whether steps are as long as chance leaves them, which takes the gradient of every sample and Adam's momentum."""
    return config.train.beyond_chance and gradients_while_painting(config) and not config.train.use_8bit_adam


def batch_table(config: ConfigDict, num_processes: int) -> str:
    """What an epoch is made of, as text for the first lines of a run: samples, updates, on-policy or not."""
    derive_batches(config, num_processes)
    sample, train = config.sample, config.train
    updates = updates_per_epoch(config)
    steps = trained_steps(config)
    passes, later = f"{min(train.timesteps_per_forward, steps)} per UNet pass", ""
    if updates == 1:
        policy = "purely on-policy (one update on each epoch's own samples)"
        if gradients_while_painting(config):
            policy += ", its gradients taken while painting"
            passes = "in the passes that paint them"
            if train.batch_size < sample.batch_size:
                later = f"; after the first epoch {train.batch_size} at a time"
    else:
        policy = f"off-policy after the first of {updates} updates on the same samples"
    if steps_beyond_chance(config):
        policy += ", its step as long as chance leaves it"
    elif config.train.beyond_chance:
        policy += "; beyond_chance is not used: it needs gradients taken while painting, and no 8-bit Adam"
    rows = [
        ("processes", f"{num_processes}"),
        (
            "samples per epoch",
            f"{sample.total_batch_size} = {sample.batch_size} at a time"
            f" x {sample.num_batches_per_epoch} batches x {num_processes} processes{later}",
        ),
        (
            "samples per update",
            f"{train.total_batch_size} = {train.batch_size} at a time"
            f" x {train.gradient_accumulation_steps} accumulated x {num_processes} processes",
        ),
        ("updates per epoch", f"{updates}, {policy}"),
        ("trained steps", f"{steps} of {sample.num_steps} per sample, {passes}"),
        ("epochs", f"{config.num_epochs}: 1 that fills the trackers, then {config.num_epochs - 1} with updates"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    return next(d for d in range(max(1, min(limit, number)), 0, -1) if number % d == 0)


def _per_process(total: int, num_processes: int, total_key: str, count_key: str) -> int:
    """What one process does of `total`."""
    if total == 0:
        raise UserError(f"config.{total_key} and config.{count_key} are both 0: set one of them")
    if total % num_processes:
        raise UserError(
            f"config.{total_key} is {total}, which {num_processes} processes cannot share evenly: run on "
            f"{largest_divisor(total, num_processes)}, or set it to {math.ceil(total / num_processes) * num_processes}"
        )
    return total // num_processes
