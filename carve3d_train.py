"""Carve3D: reinforcement-learning finetuning of a multi-view diffusion model for multi-view consistency.

On this machine, with the small world that ships with the repository (CPU or GPUs):
    $ bash carve3d_train.sh
The same by hand, with any key of config/base.py changed:
    $ accelerate launch carve3d_train.py --config config/tiny.py --config.train.learning_rate=1e-3
The published run on 6 nodes, on each of them with MASTER_ADDR, MASTER_PORT and RANK set:
    $ bash carve3d_train.sh 6 --config.pretrained.model=... --config.recon.checkpoint=...

An epoch: draw prompts, paint them (keeping every denoising step and its log-probability), reconstruct and compare,
turn rewards and KL into advantages, update the LoRA. The first epoch only fills the per-prompt statistics.
"""

import os
import sys
import time
from functools import partial

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or its import names every optional package that is missing

import torch

from config import cli
from config.batches import batch_table
from config.validate import check_run_places, validate
from ddpo.advantages import compute_advantages
from ddpo.calibration import StepCalibration, check_clip_range
from ddpo.checkpoint import check_validation_prompts, find_checkpoint, load_run, new_run_folder, save_run
from ddpo.run_log import RunLog
from ddpo.sampling import (
    NOISE,
    SHUFFLE_ADVANTAGES,
    SHUFFLE_SAMPLES,
    VALIDATION,
    collect_samples,
    epoch_prompts,
    gather_scores,
    gather_uneven_scores,
    local_slice,
    make_generator,
)
from ddpo.setup import make_optimizer, start_accelerator, start_tracker
from ddpo.stat_tracking import make_trackers
from ddpo.update import update
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from mrc.rewards import load_reward
from prompts.dataset import PromptDataset


class Run:
    """One training run. The methods are its stages; `train` has them in the order of the paper."""

    def __init__(self, config):
        self.config = config
        check_run_places(config)
        checkpoint = None
        if config.resume_from:
            checkpoint = find_checkpoint(config.resume_from, config.resume_previous_if_damaged)
        self.accelerator = accelerator = start_accelerator(config)
        validate(config, accelerator.num_processes, accelerator.device.type)
        check_cameras(config)
        self.prompts = PromptDataset.from_config(config.prompts)
        if checkpoint:
            check_validation_prompts(checkpoint, self.prompts.val_set)
        self.folder = checkpoint.parent if checkpoint else new_run_folder(config, accelerator)
        accelerator.print(f"run {self.folder}\n{batch_table(config, accelerator.num_processes)}", flush=True)

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.reward_fn = load_reward(config, accelerator.device)
        self.policy = load_painter(config, accelerator.device)
        suffix = config.sample.prompt_suffix
        self.policy.encode([prompt + suffix for prompt in (*self.prompts.train_set, *self.prompts.val_set)])
        make_trainable(self.policy, config)
        check_clip_range(self.policy, self.prompts.train_set, config)
        self.optimizer = accelerator.prepare(make_optimizer(self.policy, config))
        self.calibration = StepCalibration(self.policy, self.optimizer, accelerator, config)
        self.trackers = make_trackers(config)
        self.score_reference = config.kl_penalty or config.log_kl
        self.show_progress = accelerator.is_local_main_process and sys.stderr.isatty()
        switches = {"score_reference": self.score_reference, "show_progress": self.show_progress}
        self.collect_samples = partial(collect_samples, self.policy, self.reward_fn, config=config, **switches)
        self.epochs_done, self.kl = 0, 0.0  # kl: mean over the last epoch

        self.log = RunLog(self.folder, accelerator, config)
        start_tracker(accelerator, config, self.folder)
        if checkpoint:
            load_run(self, checkpoint)
            self.log.resume(self.epochs_done)
            self.log.say(f"resumed from {checkpoint}, {self.epochs_done} epochs done")
        else:
            self.save()  # so that a run killed in its first epochs can be resumed too

    def train(self):
        """Validate, then epoch by epoch sample, score, learn and save, to the last epoch or until the KL is spent."""
        while True:
            # in this order: a run resumed from a checkpoint repeats the validation that follows it
            if self.finished or self.epochs_done % self.config.val_freq == 0:
                self.validation()
            if self.finished:
                break
            self.epoch(self.epochs_done)
            self.epochs_done += 1
            if self.finished or self.epochs_done % self.config.save_freq == 0:
                self.save()
        self.finish()

    @property
    def finished(self):
        return self.epochs_done >= self.config.num_epochs or 0 < self.config.stop_kl <= self.kl

    def epoch(self, epoch):
        """Sample, score, compare, learn."""
        config, accelerator = self.config, self.accelerator
        prompts = epoch_prompts(self.prompts, config, epoch, accelerator.num_processes)
        local = local_slice(len(prompts), accelerator)
        generators = [make_generator(config.seed, NOISE, epoch, i) for i in range(local.start, local.stop)]
        shown = config.sample.save_images if accelerator.is_main_process and epoch % config.save_freq == 0 else 0
        samples = self.collect_samples(prompts[local], generators, keep_images=shown)

        gathered = gather_scores(samples, accelerator)
        advantages = compute_advantages(
            gathered["reward"],
            prompts,
            gathered["kl"] if config.kl_penalty else None,
            self.trackers["reward"],
            self.trackers["kl"],
            config.kl_in_reward,
            config.kl_normalized_coeff,
            empty=None if config.mrc.empty_in_statistics else gathered["empty"].any(1),
            worst=-config.train.adv_clip_max,
        ).advantages
        advantages = torch.as_tensor(advantages, dtype=torch.float32)
        if config.shuffle_advantages:
            generator = make_generator(config.seed, SHUFFLE_ADVANTAGES, epoch)
            advantages = advantages[torch.randperm(len(advantages), generator=generator)]
        self.kl = float(gathered["kl"].mean()) if self.score_reference else 0.0

        start = time.perf_counter()
        updates = []
        if epoch > 0:  # the first epoch only fills the trackers
            updates = self.update(epoch, samples.trajectory, advantages[local])
        seconds = {**samples.seconds, "update": time.perf_counter() - start}
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.log.epoch(epoch, samples, prompts[local], gathered, updates, learning_rate, seconds)

    def update(self, epoch, trajectory, advantages):
        """The updates of an epoch: one dict of statistics per optimizer step."""
        generator = make_generator(self.config.seed, SHUFFLE_SAMPLES, epoch, self.accelerator.process_index)
        self.calibration.start(trajectory)
        return update(
            self.policy,
            self.optimizer,
            self.accelerator,
            trajectory,
            advantages,
            self.config,
            generator,
            self.calibration.after_update,
            self.show_progress,
        )

    def validation(self):
        """Paint the validation prompts with noise that is the same in every run: results differ by weights alone.

        Any number of prompts is divided among any number of processes."""
        prompts, accelerator = self.prompts.val_set, self.accelerator
        local = range(accelerator.process_index, len(prompts), accelerator.num_processes)
        samples = None
        if local:
            generators = [make_generator(0, VALIDATION, i) for i in local]
            samples = self.collect_samples([prompts[i] for i in local], generators, keep_images=len(local))
            self.log.validation_images(self.epochs_done, local, samples.images)
        self.log.validation(self.epochs_done, gather_uneven_scores(samples, local), prompts)

    def save(self):
        """The LoRA for stock diffusers, the curves, and last, because it says that all is there, a checkpoint."""
        if self.accelerator.is_main_process:
            if self.config.use_lora and self.epochs_done > 0:
                self.policy.save_lora(self.folder / "lora" / f"epoch_{self.epochs_done:04d}")
            self.log.curves()
            save_run(self)
        self.accelerator.wait_for_everyone()

    def finish(self):
        """final/, and the comparison of before and after."""
        if self.accelerator.is_main_process:
            self.policy.save_weights(self.folder / "final")
        if self.epochs_done < self.config.num_epochs:
            self.log.say(f"stopped: the mean KL {self.kl:.2e} has reached config.stop_kl = {self.config.stop_kl:.2e}")
        self.log.final(self.epochs_done)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def main(args):
    Run(args.config).train()


if __name__ == "__main__":
    cli.run("carve3d_train", main, "config/base.py")
