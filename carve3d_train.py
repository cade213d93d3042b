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
import time
from functools import partial

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or its import names every optional package that is missing

import numpy as np

from config import cli
from config.batches import batch_table, gradients_while_painting
from config.errors import first_line
from config.validate import check_run_places, validate
from ddpo.advantages import epoch_advantages
from ddpo.area import AreaControl
from ddpo.bad_samples import leave_out_bad
from ddpo.calibration import StepCalibration, check_clip_range
from ddpo.checkpoint import load_run, save_run
from ddpo.files import whole
from ddpo.final import save_final
from ddpo.report import write_report
from ddpo.run_folder import open_run
from ddpo.run_log import RunLog
from ddpo.sampling import (
    NOISE,
    SHUFFLE_SAMPLES,
    STEPS,
    VALIDATION,
    collect_samples,
    epoch_prompts,
    gather_scores,
    gather_uneven_scores,
    local_slice,
    make_generator,
)
from ddpo.setup import make_optimizer, set_arithmetic, start_accelerator
from ddpo.stat_tracking import make_trackers
from ddpo.stopping import Stopped, Stopping, end_early, end_with_launcher
from ddpo.tracking import start_tracker
from ddpo.update import update, update_from_gradients
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from mrc.rewards import load_reward
from prompts.dataset import PromptDataset


class Run:
    """One training run. The methods are its stages; `train` has them in the order of the paper."""

    def __init__(self, config):
        self.config = config
        check_run_places(config)
        set_arithmetic(config)
        self.accelerator = accelerator = start_accelerator(config)
        validate(config, accelerator.num_processes, accelerator.device.type)
        check_cameras(config)
        self.prompts = PromptDataset.from_config(config.prompts)
        self.opened = open_run(config, accelerator, self.prompts)
        self.folder, checkpoint = self.opened.folder, self.opened.checkpoint
        self.stopping = Stopping(self.folder, accelerator)
        accelerator.print(f"run {self.folder}\n{batch_table(config, accelerator.num_processes)}", flush=True)

        self.reward_fn = load_reward(config, accelerator.device)
        self.policy = load_painter(config, accelerator.device)
        suffix = config.sample.prompt_suffix
        self.policy.encode([prompt + suffix for prompt in (*self.prompts.train_set, *self.prompts.val_set)])
        make_trainable(self.policy, config)
        if not gradients_while_painting(config):  # nothing is clipped where every ratio is 1
            check_clip_range(self.policy, self.prompts.train_set, config)
        self.optimizer = accelerator.prepare(make_optimizer(self.policy, config))
        self.calibration = StepCalibration(self.policy, self.optimizer, accelerator, config)
        self.trackers = make_trackers(config)
        self.area_control = AreaControl() if config.train.hold_foreground else None
        self.score_reference = config.kl_penalty or config.log_kl
        self.show_progress = accelerator.is_local_main_process
        switches = {"score_reference": self.score_reference, "show_progress": self.show_progress}
        self.collect_samples = partial(collect_samples, self.policy, config=config, **switches)
        self.epochs_done, self.kl = 0, 0.0  # kl: mean over the last epoch

        # nothing is written before this: a run that cannot be resumed is refused above, or by load_run
        if checkpoint:
            load_run(self, checkpoint)
        self.log = RunLog(self.folder, accelerator, config)
        with self.stopping.safely():
            self.log.start(self.epochs_done, self.finished, self.opened)
        start_tracker(accelerator, config, self.folder)
        if not checkpoint:
            self.save()  # so that a run killed in its first epochs can be resumed too

    def train(self):
        """Validate, then epoch by epoch sample, score, learn and save, to the last epoch or until the KL is spent."""
        with self.stopping.listening():
            try:
                self.all_epochs()
            except Stopped as stopped:
                end_early(self, stopped)

    def all_epochs(self):
        """What `train` does unless it is told to stop."""
        while True:
            # in this order: a run resumed from a checkpoint repeats the validation that follows it
            if self.finished or self.epochs_done % self.config.val_freq == 0:
                self.validation()
            if self.finished:
                break
            self.epoch(self.epochs_done)
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
        samples = self.collect_samples(
            self.reward_fn,
            prompts[local],
            generators,
            keep_images=shown,
            before_batch=self.stopping.check,
            step_generator=make_generator(config.seed, STEPS, epoch, accelerator.process_index),
            backward=accelerator.backward if epoch > 0 and gradients_while_painting(config) else None,
        )

        scores = gather_scores(samples, accelerator)
        good = np.isfinite(scores["reward"])
        if not good.all():
            samples = leave_out_bad(self, epoch, samples, prompts, good, local)
        advantages = epoch_advantages(scores, prompts, good, self.trackers, config, epoch)
        if self.area_control:
            advantages = self.area_control(advantages, scores["foreground"], prompts, good)
        scores = {name: value[good] for name, value in scores.items()}
        self.kl = float(scores["kl"].mean()) if self.score_reference else 0.0

        start = time.perf_counter()
        updates = []
        if epoch > 0:  # the first epoch only fills the trackers
            updates = self.update(epoch, samples, advantages[local])
        self.epochs_done += 1
        seconds = {**samples.seconds, "update": time.perf_counter() - start}
        with self.stopping.safely():
            self.log.epoch(epoch, samples, prompts[local], scores, updates, seconds)

    def update(self, epoch, samples, advantages):
        """The updates of an epoch: one dict of statistics per optimizer step."""
        generator = make_generator(self.config.seed, SHUFFLE_SAMPLES, epoch, self.accelerator.process_index)
        self.calibration.start(samples.trajectory)
        learner = self.policy, self.optimizer, self.accelerator
        after = self.calibration.after_update
        if samples.gradients is not None:
            return update_from_gradients(*learner, samples.gradients, advantages, self.config, after)
        return update(*learner, samples.trajectory, advantages, self.config, generator, after, self.show_progress)

    def validation(self):
        """Paint the validation prompts with noise that is the same in every run: results differ by weights alone.

        Any number of prompts is divided among any number of processes."""
        prompts, accelerator = self.prompts.val_set, self.accelerator
        local = range(accelerator.process_index, len(prompts), accelerator.num_processes)
        samples = None
        if local:
            generators = [make_generator(0, VALIDATION, i) for i in local]
            reward_fn = getattr(self.reward_fn, "judged", self.reward_fn)
            samples = self.collect_samples(reward_fn, [prompts[i] for i in local], generators, keep_images=len(local))
        with self.stopping.safely():
            self.log.validation_images(self.epochs_done, local, samples.images if samples else {})
        scores = gather_uneven_scores(samples, local)
        with self.stopping.safely():
            self.log.validation(self.epochs_done, scores, prompts)

    def save(self):
        """The LoRA for stock diffusers, the curves, and last, because it says that all is there, a checkpoint."""
        with self.stopping.safely():
            if self.accelerator.is_main_process:
                if self.config.use_lora and self.epochs_done > 0:
                    with whole(self.folder / "lora" / f"epoch_{self.epochs_done:04d}") as partial:
                        self.policy.save_lora(partial)
                self.log.curves()
                save_run(self)

    def finish(self):
        """final/, and the comparison of before and after."""
        with self.stopping.safely():
            if self.accelerator.is_main_process:
                save_final(self.policy, self.config, self.folder / "final")
            if self.epochs_done < self.config.num_epochs:
                self.log.say(
                    f"stopped: the mean KL {self.kl:.2e} has reached config.stop_kl = {self.config.stop_kl:.2e}"
                )
            self.log.final()
            if self.config.report and self.accelerator.is_main_process:
                self.report()
        self.accelerator.end_training()

    def report(self):
        """report.html. All else is saved by now, and a run that is done must not fail for a page."""
        try:
            self.log.report(write_report([self.folder], device=self.accelerator.device))
        except Exception as error:
            self.log.say(
                f"report.html was not written ({first_line(error)}); the run itself is complete, and "
                f"`python -m tools.report {self.folder}` tries again"
            )


def main(args):
    end_with_launcher()
    Run(args.config).train()


if __name__ == "__main__":
    cli.run("carve3d_train", main, "config/base.py")
