"""Carve3D: reinforcement-learning finetuning of a multi-view diffusion model for multi-view consistency.

On this machine, with the small world that ships with the repository (CPU or GPUs):
    $ bash carve3d_train.sh
The same by hand, with any key of config/base.py changed:
    $ accelerate launch carve3d_train.py --config config/tiny.py --config.train.learning_rate=1e-3
The published run on 6 nodes, on each of them with MASTER_ADDR, MASTER_PORT and RANK set:
    $ bash carve3d_train.sh 6 --config.pretrained.model=... --config.recon.checkpoint=...

An epoch: draw prompts, paint them (keeping every denoising step and its log-probability), let the judge reconstruct and
compare, turn rewards and KL into advantages, update the LoRA. The first epoch only fills the per-prompt statistics.
"""

import datetime
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from absl import app, flags
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from ml_collections import config_flags
from scipy.stats import ttest_rel

from config.validate import batch_table, check_flags, validate
from ddpo import PerPromptStatTracker, advantages
from ddpo.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from ddpo.run_log import RunLog, sample_picture
from ddpo.sampling import (
    NOISE, SHUFFLE_ADVANTAGES, SHUFFLE_SAMPLES, VALIDATION, epoch_prompts, generator, paint,
)
from ddpo.setup import check_cameras, load_painter, load_reward, make_optimizer, make_trainable
from ddpo.update import StepCalibration, kl_between, trajectory_means, update
from prompts.dataset import PromptDataset


class Run:
    """Everything a run holds; the methods are the stages of an epoch."""

    def __init__(self, config):
        self.config = config
        checkpoint = find_checkpoint(config.resume_from, config.resume_previous_if_damaged) if config.resume_from else None
        self.accelerator = start_accelerator(config)
        validate(config, self.accelerator.num_processes, self.accelerator.device.type)
        check_cameras(config)
        name = config.run_name or shared_name(self.accelerator)
        self.folder = checkpoint.parent if checkpoint else Path(config.logdir) / name
        if checkpoint is None and (self.folder / "metrics.jsonl").exists():
            raise ValueError(f"{self.folder} already holds a run: choose another config.run_name, or set config.resume_from "
                             f"to {str(self.folder)!r} to go on with it.")
        self.show = self.accelerator.is_local_main_process and sys.stderr.isatty()
        self.say(f"run {self.folder}\n{batch_table(config, self.accelerator.num_processes)}")

        torch.manual_seed(config.seed)  # the LoRA's initial values, the same on every process
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        device = self.accelerator.device
        self.prompts = PromptDataset.from_config(config.prompts)
        self.reward = load_reward(config, device)
        self.policy = load_painter(config, device)
        make_trainable(self.policy, config)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.policy, config))
        self.calibration = StepCalibration(config)
        tracking = config.per_prompt_stat_tracking
        make_tracker = lambda wanted: PerPromptStatTracker(tracking.buffer_size, tracking.min_count) if tracking and wanted else None
        self.trackers = {"reward": make_tracker(True), "kl": make_tracker(config.kl_per_prompt_stat_tracking)}
        self.reference = config.kl_penalty or config.log_kl

        self.log = RunLog(self.folder, self.accelerator, config)
        start_tracker(self.accelerator, config, self.folder)
        self.epochs_done = 0
        if checkpoint:
            self.load(checkpoint)

    def say(self, text):
        self.accelerator.print(text, flush=True)

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def epoch(self, number):
        """Sample, judge, compare, learn. Returns the epoch's mean KL."""
        config, accelerator = self.config, self.accelerator
        prompts = epoch_prompts(self.prompts, config, number, accelerator.num_processes)
        share = len(prompts) // accelerator.num_processes
        first = share * accelerator.process_index
        generators = [generator(config.seed, NOISE, number, i) for i in range(first, first + share)]
        samples = paint(self.policy, self.reward, prompts[first : first + share], generators, config, self.reference, self.show)

        kl = samples.trajectory.kl(config.kl_estimator)
        everyone = {name: accelerator.gather(value.float()).cpu().numpy() for name, value in {
            "reward": samples.reward, "foreground": samples.foreground, "empty": samples.empty,
            **({} if kl is None else {"kl": kl})}.items()}
        verdict = advantages(
            everyone["reward"], prompts, everyone["kl"] if config.kl_penalty else None, self.trackers["reward"],
            self.trackers["kl"], config.kl_in_reward, config.kl_normalized_coeff)
        merits = torch.as_tensor(verdict.advantages, dtype=torch.float32)
        if config.shuffle_advantages:
            merits = merits[torch.randperm(len(merits), generator=generator(config.seed, SHUFFLE_ADVANTAGES, number))]
        merits = merits[first : first + share].to(accelerator.device)

        start = time.perf_counter()
        updates = []
        if number > 0:  # the first epoch only fills the trackers
            updates = self.learn(number, samples.trajectory, merits)
        self.record(number, samples, everyone, updates, prompts[first : first + share], time.perf_counter() - start)
        return float(everyone["kl"].mean()) if "kl" in everyone else 0.0

    def learn(self, number, trajectory, merits):
        """The updates of an epoch: one dict of statistics per optimizer step."""
        config, calibration = self.config, self.calibration
        measured = []
        before = [trajectory_means(self.policy, trajectory, config, calibration.SAMPLES) if calibration.remaining else None]

        def calibrate():
            if not calibration.remaining:
                return
            after = trajectory_means(self.policy, trajectory, config, calibration.SAMPLES)
            kl = float(self.accelerator.reduce(kl_between(before[0], after), reduction="mean"))
            before[0] = after
            measured.append({"kl_of_update": kl, "next_learning_rate": calibration.adjust(self.optimizer, kl)})

        shuffle = generator(config.seed, SHUFFLE_SAMPLES, number, self.accelerator.process_index)
        logs = update(self.policy, self.optimizer, self.accelerator, trajectory, merits, config, shuffle, calibrate, self.show)
        for log, calibrated in zip(logs, measured):
            log.update(calibrated)
        return logs

    def record(self, number, samples, everyone, updates, prompts, update_seconds):
        """metrics.jsonl, the tracker, the picture and one line of text."""
        reward = everyone["reward"]
        counts, edges = np.histogram(reward, bins=10)
        line = {
            "reward_mean": float(reward.mean()), "reward_std": float(reward.std()),
            "reward_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "reward/empty_views": float(everyone["empty"].mean()), "reward/foreground": float(everyone["foreground"].mean()),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": {**samples.seconds, "update": update_seconds},
        }
        if "kl" in everyone:
            line["kl_mean"] = float(everyone["kl"].mean())
        self.log.write("epoch", number, line)
        self.log.histogram("reward", reward, number)
        for one in updates:
            self.log.write("update", number, one)
        shown = self.config.sample.save_images
        if shown and self.accelerator.is_main_process and number % self.config.save_freq == 0:
            renders = None if samples.renders is None else samples.renders[:shown]
            self.log.picture(f"epoch_{number:04d}", sample_picture(samples.trajectory.views[:shown], renders, samples.reward, prompts), number)
        seconds = " ".join(f"{name} {value:.1f}s" for name, value in line["seconds"].items())
        learnt = f"  loss {updates[-1]['loss']:+.4f}  grad {updates[-1]['grad_norm']:.2e}" if updates else "  (fills the trackers, no update)"
        self.say(f"epoch {number:3d}  reward {line['reward_mean']:+.4f} +- {line['reward_std']:.4f}  kl {line.get('kl_mean', 0):.2e}{learnt}  {seconds}")

    # -- validation ---------------------------------------------------------------------------------------------------

    def validate(self, epochs_done):
        """Paint the validation prompts with noise that is the same in every run, so that two results differ by weights alone.

        Any number of prompts is shared by any number of processes. Writes validation/epoch_XXXX.npz and a picture."""
        accelerator, config = self.accelerator, self.config
        captions = self.prompts.val_set
        mine = list(range(accelerator.process_index, len(captions), accelerator.num_processes))
        found = []
        if mine:
            generators = [generator(0, VALIDATION, i) for i in mine]
            samples = paint(self.policy, self.reward, [captions[i] for i in mine], generators, config, self.reference, self.show)
            kl = samples.trajectory.kl(config.kl_estimator)
            views = (samples.trajectory.views * 255).round().byte().cpu().numpy()
            renders = None if samples.renders is None else (samples.renders * 255).round().byte().cpu().numpy()
            for row, i in enumerate(mine):
                found.append((i, float(samples.reward[row]), float(kl[row]) if kl is not None else 0.0, bool(samples.empty[row]),
                              float(samples.foreground[row]), views[row], None if renders is None else renders[row]))
        found = sorted(gather_object(found), key=lambda item: item[0])
        _, rewards, kls, empty, foreground, views, renders = zip(*found)
        rewards = np.array(rewards)
        line = {"reward_mean": float(rewards.mean()), "reward_standard_error": standard_error(rewards), "kl_mean": float(np.mean(kls)),
                "reward/empty_views": float(np.mean(empty)), "reward/foreground": float(np.mean(foreground)), "rewards": rewards.tolist()}
        if accelerator.is_main_process:
            self.log.write("validation", epochs_done, line)
            folder = self.folder / "validation"
            folder.mkdir(exist_ok=True)
            np.savez_compressed(folder / f"epoch_{epochs_done:04d}.npz", views=np.stack(views), rewards=rewards, prompts=np.array(captions))
            shown = self.config.sample.save_images
            if shown:
                tensor = lambda arrays: torch.as_tensor(np.stack(arrays[:shown])) / 255
                self.log.picture(f"validation_{epochs_done:04d}", sample_picture(
                    tensor(views), None if renders[0] is None else tensor(renders), rewards, captions), epochs_done)
        self.say(f"validation after {epochs_done} epochs: reward {line['reward_mean']:+.4f} +- {line['reward_standard_error']:.4f} "
                 f"(standard error over {len(rewards)} prompts), kl {line['kl_mean']:.2e}")
        return rewards

    # -- saving and going on ------------------------------------------------------------------------------------------

    def save(self):
        """A checkpoint, and the LoRA in the format that stock diffusers loads."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            save_checkpoint(self.folder, self.epochs_done, self.policy.trainable_state(), self.optimizer.state_dict(), {
                "calibrations_left": self.calibration.remaining,
                "trackers": {name: tracker and tracker.state_dict() for name, tracker in self.trackers.items()},
                "loss_scaler": scaler and scaler.state_dict(), "config": self.config.to_dict()}, self.config.num_checkpoint_limit)
            self.policy.save_weights(self.folder / "lora" / f"epoch_{self.epochs_done:04d}")
            self.log.curves()
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint):
        weights, optimizer_state, state = load_checkpoint(checkpoint)
        self.policy.load_trainable_state(weights)
        self.optimizer.load_state_dict(optimizer_state)
        self.calibration.remaining = state["calibrations_left"]
        for name, tracker in self.trackers.items():
            if tracker and state["trackers"][name]:
                tracker.load_state_dict(state["trackers"][name])
        if self.accelerator.scaler and state["loss_scaler"]:
            self.accelerator.scaler.load_state_dict(state["loss_scaler"])
        self.epochs_done = state["epochs_done"]
        self.log.resume(self.epochs_done)
        self.say(f"going on from {checkpoint}, {self.epochs_done} epochs done")

    def finish(self):
        """final/ and the comparison of before and after."""
        if self.accelerator.is_main_process:
            self.policy.save_weights(self.folder / "final")
            self.log.curves()
            scores = [np.array(line["rewards"]) for line in self.log.lines if line["kind"] == "validation"]
            before, after = scores[0], scores[-1]
            gain = after - before
            p = ttest_rel(after, before).pvalue if len(scores) > 1 and gain.std() > 0 else float("nan")
            self.say(f"\nvalidation reward before {before.mean():+.4f} +- {standard_error(before):.4f}, after {after.mean():+.4f} +- "
                     f"{standard_error(after):.4f}: {100 * gain.mean() / abs(before.mean()):+.1f} % (paired t-test over "
                     f"{len(gain)} prompts: p = {p:.1e})\nthe LoRA is in {self.folder / 'final'}, curves and pictures in {self.folder}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def train(self):
        config = self.config
        if self.epochs_done == 0:
            self.validate(0)
        while self.epochs_done < config.num_epochs:
            kl = self.epoch(self.epochs_done)
            self.epochs_done += 1
            stop = 0 < config.stop_kl <= kl
            last = stop or self.epochs_done == config.num_epochs
            if last or self.epochs_done % config.val_freq == 0:
                self.validate(self.epochs_done)
            if last or self.epochs_done % config.save_freq == 0:
                self.save()
            if stop:
                self.say(f"stopping: the mean KL {kl:.2e} has reached config.stop_kl = {config.stop_kl:.2e}")
                break
        self.finish()


def start_accelerator(config):
    """An Accelerator with this run's arithmetic and tracker. wandb is offline unless the user is logged in."""
    if config.tracker == "wandb" and not os.environ.get("WANDB_API_KEY") and not (Path.home() / ".netrc").exists():
        os.environ.setdefault("WANDB_MODE", "offline")
    # bf16 is the policy's business (autocast inside predict); fp16 needs the accelerator's loss scaling
    return Accelerator(
        mixed_precision="fp16" if config.mixed_precision == "fp16" else "no", cpu=not torch.cuda.is_available(),
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.logdir))


def start_tracker(accelerator, config, folder):
    if config.tracker == "none":
        return
    accelerator.project_configuration.logging_dir = str(folder)
    flat = {key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in config.to_dict().items() if not isinstance(value, dict)}
    flat |= {f"{section}.{key}": value if isinstance(value, (int, float, str, bool)) else str(value)
             for section, values in config.to_dict().items() if isinstance(values, dict) for key, value in values.items()}
    accelerator.init_trackers("carve3d", config=flat, init_kwargs={"wandb": {"name": folder.name, "dir": str(folder)}})


def shared_name(accelerator):
    """A run name from the clock of the main process, the same on all."""
    names = gather_object([datetime.datetime.now().strftime("%Y.%m.%d_%H.%M.%S")])
    return names[0]


def standard_error(values):
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def main(_):
    Run(flags.FLAGS.config).train()


if __name__ == "__main__":
    try:
        check_flags(sys.argv)
        config_flags.DEFINE_config_file("config", "config/base.py", "Training configuration.")
        app.run(main)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("CARVE3D_DEBUG"):
            raise
        sys.exit(f"carve3d_train: {error}")
