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

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or its import names every optional package that is missing

import numpy as np
import torch
from absl import app, flags
from accelerate.utils import gather_object
from ml_collections import config_flags
from scipy.stats import ttest_rel

from config.validate import batch_table, check_flags, validate
from ddpo import PerPromptStatTracker, advantages
from ddpo.checkpoint import checkpoints, find_checkpoint, forget_later, load_checkpoint, save_checkpoint
from ddpo.run_log import RunLog, sample_picture
from ddpo.sampling import NOISE, SHUFFLE_ADVANTAGES, SHUFFLE_SAMPLES, VALIDATION, epoch_prompts, generator, paint
from ddpo.setup import (
    adam_settings,
    check_cameras,
    load_painter,
    load_reward,
    make_optimizer,
    make_trainable,
    start_accelerator,
    start_tracker,
)
from ddpo.update import StepCalibration, update
from prompts.dataset import PromptDataset

IMAGES = {"views": "painted", "renders": "re-rendered"}  # of a sample -> what pictures call them


class Run:
    """Everything a run holds; the methods are the stages of an epoch, in `train` in the order of the paper."""

    def __init__(self, config):
        self.config = config
        checkpoint = None
        if config.resume_from:
            checkpoint = find_checkpoint(config.resume_from, config.resume_previous_if_damaged)
        self.accelerator = accelerator = start_accelerator(config)
        validate(config, accelerator.num_processes, accelerator.device.type)
        check_cameras(config)
        self.folder = checkpoint.parent if checkpoint else self.new_folder()
        self.show = accelerator.is_local_main_process and sys.stderr.isatty()
        self.say(f"run {self.folder}\n{batch_table(config, accelerator.num_processes)}")

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.prompts = PromptDataset.from_config(config.prompts)
        self.reward = load_reward(config, accelerator.device)
        self.policy = load_painter(config, accelerator.device)
        torch.manual_seed(config.seed)  # the LoRA's initial values, the same on every process
        make_trainable(self.policy, config)
        self.optimizer = accelerator.prepare(make_optimizer(self.policy, config))
        self.calibration = StepCalibration(self.policy, self.optimizer, accelerator, config)
        self.trackers = make_trackers(config)
        self.reference = config.kl_penalty or config.log_kl
        self.epochs_done, self.kl = 0, 0.0  # kl: mean over the last epoch

        self.log = RunLog(self.folder, accelerator, config)
        start_tracker(accelerator, config, self.folder)
        if checkpoint:
            self.load(checkpoint)
        else:
            self.save()  # so that a run killed in its first epochs can go on too

    def new_folder(self):
        """The folder of a new run, named by the main process' clock if config.run_name is empty."""
        name = self.config.run_name or gather_object([datetime.datetime.now().strftime("%Y.%m.%d_%H.%M.%S")])[0]
        folder = Path(self.config.logdir) / name
        if checkpoints(folder) or (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run: choose another config.run_name, or set config.resume_from "
                f"to {str(folder)!r} to go on with it."
            )
        self.accelerator.wait_for_everyone()  # before the main process writes there
        return folder

    def say(self, text):
        self.accelerator.print(text, flush=True)

    def train(self):
        """Validate, then epoch by epoch sample, judge, learn and save, to the last epoch or until the KL is spent."""
        while True:
            # in this order: a run that goes on from a checkpoint repeats the validation that follows it
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

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def epoch(self, number):
        """Sample, judge, compare, learn."""
        config, accelerator = self.config, self.accelerator
        prompts = epoch_prompts(self.prompts, config, number, accelerator.num_processes)
        share = len(prompts) // accelerator.num_processes
        mine = slice(share * accelerator.process_index, share * (accelerator.process_index + 1))
        generators = [generator(config.seed, NOISE, number, i) for i in range(mine.start, mine.stop)]
        samples = paint(self.policy, self.reward, prompts[mine], generators, config, self.reference, self.show)

        values = {"reward": samples.reward, "foreground": samples.foreground, "empty": samples.empty}
        if self.reference:
            values["kl"] = samples.kl
        everyone = {name: accelerator.gather(value.float()).cpu().numpy() for name, value in values.items()}
        verdict = advantages(
            everyone["reward"],
            prompts,
            everyone["kl"] if config.kl_penalty else None,
            self.trackers["reward"],
            self.trackers["kl"],
            config.kl_in_reward,
            config.kl_normalized_coeff,
        )
        merits = torch.as_tensor(verdict.advantages, dtype=torch.float32)
        if config.shuffle_advantages:
            merits = merits[torch.randperm(len(merits), generator=generator(config.seed, SHUFFLE_ADVANTAGES, number))]
        self.kl = float(everyone["kl"].mean()) if self.reference else 0.0

        start = time.perf_counter()
        updates = []
        if number > 0:  # the first epoch only fills the trackers
            updates = self.learn(number, samples.trajectory, merits[mine].to(accelerator.device))
        seconds = {**samples.seconds, "update": time.perf_counter() - start}
        self.record(number, samples, prompts[mine], everyone, updates, seconds)

    def learn(self, number, trajectory, merits):
        """The updates of an epoch: one dict of statistics per optimizer step."""
        shuffle = generator(self.config.seed, SHUFFLE_SAMPLES, number, self.accelerator.process_index)
        self.calibration.start(trajectory)
        return update(
            self.policy,
            self.optimizer,
            self.accelerator,
            trajectory,
            merits,
            self.config,
            shuffle,
            self.calibration.after_update,
            self.show,
        )

    def record(self, number, samples, prompts, everyone, updates, seconds):
        """metrics.jsonl, the tracker, a picture and one line of text. samples, prompts: of this process."""
        reward = everyone["reward"]
        counts, edges = np.histogram(reward, bins=10)
        line = {
            **summary(everyone),
            "reward_std": float(reward.std()),
            "reward_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
        }
        self.log.write("epoch", number, line)
        self.log.histogram("reward", reward, number)
        for i, statistics in enumerate(updates):
            self.log.write("update", number, {"update": i, **statistics})
        if number % self.config.save_freq == 0:
            images = {IMAGES["views"]: samples.trajectory.views, IMAGES["renders"]: samples.renders}
            self.picture("epoch", number, images, [f"reward {value:.3f}" for value in samples.reward.tolist()], prompts)

        learnt = "(fills the trackers, no update)"
        if updates:
            learnt = f"loss {updates[-1]['loss']:+.4f}  grad {updates[-1]['grad_norm']:.2e}"
        times = " ".join(f"{name} {value:.1f}s" for name, value in seconds.items())
        self.say(
            f"epoch {number:3d}  reward {reward.mean():+.4f} +- {reward.std():.4f}  kl {self.kl:.2e}  {learnt}  {times}"
        )

    def picture(self, kind, number, rows, notes, captions):
        """samples/<kind>_<number>.png of the first `sample.save_images` objects, from the main process.

        rows: label -> views (N, V, 3, S, S), None for a reward that renders nothing."""
        shown = self.config.sample.save_images
        if shown and self.accelerator.is_main_process:
            rows = {label: row[:shown] for label, row in rows.items() if row is not None}
            self.log.picture(kind, number, sample_picture(rows, notes, captions))

    # -- validation ---------------------------------------------------------------------------------------------------

    def validation(self):
        """Paint the validation prompts with noise that is the same in every run: results differ by weights alone.

        Any number of prompts is shared by any number of processes. Writes validation/epoch_XXXX.npz and a picture."""
        accelerator, config, captions, number = self.accelerator, self.config, self.prompts.val_set, self.epochs_done
        mine = range(accelerator.process_index, len(captions), accelerator.num_processes)
        found = []
        if mine:
            generators = [generator(0, VALIDATION, i) for i in mine]
            samples = paint(
                self.policy, self.reward, [captions[i] for i in mine], generators, config, self.reference, self.show
            )
            found = list(zip(mine, samples.rows(), strict=True))
        rows = [row for _, row in sorted(gather_object(found), key=lambda item: item[0])]
        everyone = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

        line = summary(everyone) | {
            "reward_standard_error": standard_error(everyone["reward"]),
            **{f"{name}s": everyone[name].tolist() for name in ("reward", "kl") if name in everyone},
        }
        if accelerator.is_main_process:
            self.log.write("validation", number, line)
            folder = self.folder / "validation"
            folder.mkdir(exist_ok=True)
            arrays = {name: everyone[name] for name in IMAGES if name in everyone}
            np.savez_compressed(
                folder / f"epoch_{number:04d}.npz", rewards=everyone["reward"], prompts=np.array(captions), **arrays
            )
            self.picture(
                "validation",
                number,
                {IMAGES[name]: torch.as_tensor(images) / 255 for name, images in arrays.items()},
                [f"reward {value:.3f}" for value in everyone["reward"]],
                captions,
            )
        self.say(
            f"validation after {number} epochs: reward {line['reward_mean']:+.4f} +- "
            f"{line['reward_standard_error']:.4f} (standard error over {len(rows)} prompts)"
            + (f", kl {line['kl_mean']:.2e}" if self.reference else "")
        )

    # -- saving and going on ------------------------------------------------------------------------------------------

    def save(self):
        """The LoRA for stock diffusers, the curves, and last, because it says that all is there, a checkpoint."""
        if self.accelerator.is_main_process:
            if self.config.use_lora and self.epochs_done > 0:
                self.policy.save_lora(self.folder / "lora" / f"epoch_{self.epochs_done:04d}")
            self.log.curves()
            scaler = self.accelerator.scaler
            state = {
                "kl": self.kl,
                "calibrations_left": self.calibration.remaining,
                "trackers": {name: tracker and tracker.state_dict() for name, tracker in self.trackers.items()},
                "loss_scaler": scaler and scaler.state_dict(),
                "config": self.config.to_dict(),
            }
            save_checkpoint(
                self.folder,
                self.epochs_done,
                self.policy.trainable_state(),
                self.optimizer.state_dict(),
                state,
                self.config.num_checkpoint_limit,
            )
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint):
        """Go on from a checkpoint, with the settings of this configuration where they differ from the checkpoint's."""
        weights, optimizer_state, state = load_checkpoint(checkpoint)
        self.policy.load_trainable_state(weights)
        self.optimizer.load_state_dict(optimizer_state)
        for group in self.optimizer.param_groups:
            calibrated = {"lr": group["lr"]} if self.config.train.kl_per_update > 0 else {}
            group.update(adam_settings(self.config) | calibrated)
        self.calibration.remaining = state["calibrations_left"]
        for name, tracker in self.trackers.items():
            if tracker and state["trackers"][name]:
                tracker.load_state_dict(state["trackers"][name])
        if self.accelerator.scaler and state["loss_scaler"]:
            self.accelerator.scaler.load_state_dict(state["loss_scaler"])
        self.epochs_done, self.kl = state["epochs_done"], state["kl"]
        if self.accelerator.is_main_process:
            forget_later(checkpoint)
        self.log.resume(self.epochs_done)
        self.say(f"going on from {checkpoint}, {self.epochs_done} epochs done")

    def before_and_after(self):
        """samples/before_after_<epochs>.png: the first validation prompts before training and after it, four rows each:
        painted and re-rendered before, painted and re-rendered after."""
        files = sorted((self.folder / "validation").glob("epoch_*.npz"))
        before, after = np.load(files[0]), np.load(files[-1])
        rows = {
            f"{label}, {when}": torch.as_tensor(data[name]) / 255
            for when, data in (("before", before), ("after", after))
            for name, label in IMAGES.items()
            if name in data
        }
        notes = [
            f"reward {a:.3f} before, {b:.3f} after" for a, b in zip(before["rewards"], after["rewards"], strict=True)
        ]
        self.picture("before_after", self.epochs_done, rows, notes, [str(prompt) for prompt in before["prompts"]])

    def finish(self):
        """final/ and the comparison of before and after."""
        if self.accelerator.is_main_process:
            self.policy.save_weights(self.folder / "final")
            self.log.curves()
            scores = [np.array(line["rewards"]) for line in self.log.lines if line["kind"] == "validation"]
            before, after = scores[0], scores[-1]
            gain = after - before
            self.before_and_after()
            p = ttest_rel(after, before).pvalue if gain.std() > 0 else float("nan")
            if self.epochs_done < self.config.num_epochs:
                self.say(f"stopped: the mean KL {self.kl:.2e} has reached config.stop_kl = {self.config.stop_kl:.2e}")
            self.say(
                f"\nvalidation reward before {before.mean():+.4f} +- {standard_error(before):.4f}, after "
                f"{after.mean():+.4f} +- {standard_error(after):.4f}: {100 * gain.mean() / abs(before.mean()):+.1f} % "
                f"(paired t-test over {len(gain)} prompts: p = {p:.1e})\n"
                f"the weights are in {self.folder / 'final'}, curves and pictures in {self.folder}"
            )
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def make_trackers(config):
    """{"reward", "kl"}: the per-prompt statistics, None for those that are not wanted."""
    tracking = config.per_prompt_stat_tracking
    wanted = {"reward": tracking is not None, "kl": tracking is not None and config.kl_per_prompt_stat_tracking}
    return {
        name: PerPromptStatTracker(tracking.buffer_size, tracking.min_count) if want else None
        for name, want in wanted.items()
    }


def summary(everyone):
    """The numbers that epochs and validations share, from arrays over all samples."""
    line = {
        "reward_mean": float(everyone["reward"].mean()),
        "reward/empty_views": float(everyone["empty"].mean()),
        "reward/foreground": float(everyone["foreground"].mean()),
    }
    return line | ({"kl_mean": float(everyone["kl"].mean())} if "kl" in everyone else {})


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
