"""What a run asks of each GPU: memory, FLOPs and seconds of every stage, measured with the trainer's own functions.

Each stage runs at full size, on one batch. What waits in host memory, an epoch's trajectories, is measured with all
denoising steps and a painter that paints nothing.
"""

import contextlib
import copy
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState
from ml_collections import ConfigDict
from torch.utils._pytree import tree_leaves

from config.batches import gradients_while_painting, reference_steps, samples_per_process, trained_steps
from ddpo.calibration import SAMPLES as CALIBRATION_SAMPLES
from ddpo.calibration import StepCalibration
from ddpo.sampling import NOISE, SHUFFLE_SAMPLES, collect_samples, make_generator
from ddpo.setup import make_optimizer, start_accelerator
from ddpo.update import update, update_from_gradients
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.rollout import Trajectory
from mrc.rewards import load_mrc, load_reward

PROMPT = "a prompt"


@dataclass(frozen=True)
class Measurement:
    """What one process needs: bytes of live tensors on its GPU; FLOPs, two for a multiplication and an addition; and
    seconds, where a real GPU was asked.

    weights: {"painter", "reward", "optimizer"}: bytes that stay for the whole run.
    host: bytes of host memory in which an epoch's trajectories, and gradients, wait for the update.
    peak: {stage: bytes}, the most at once during a stage, weights included. The stages are "sampling", "decode",
        "reward", "update" (which begins with painting where that takes the gradients) and, if the learning rate is to
        be calibrated, "calibration".
    flops: {stage: FLOPs per sample}, with all its denoising steps; the stages are "policy", "reference" (if it is
        scored), "decode", "reward" and "update" (once for every pass over the samples; what gradients add to painting,
        where that takes them).
    gradient_bytes: what an update averages over the processes.
    seconds: {stage: seconds per sample}, of the stages of `flops`.
    """

    weights: dict[str, int]
    host: int
    peak: dict[str, int]
    flops: dict[str, float]
    gradient_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


class Reading(NamedTuple):
    """One time that a stage ran: the most bytes above those that were there when it began, FLOPs, seconds."""

    bytes: int
    flops: int
    seconds: float


def measure_run(gpu, config: ConfigDict, num_processes: int = 1) -> Measurement:
    """Measure the run of a validated `config` with `num_processes` processes, of which this is one.

    gpu: see the package. Raises ValueError as a run would."""
    check_cameras(config)
    AcceleratorState._reset_state(reset_partial_state=True)  # may hold the precision of an earlier measurement
    return _RunBench(gpu, config, num_processes).measure()


def measure_reward(gpu, config: ConfigDict) -> Measurement:
    """Measure the judge of `config` alone, on a batch of views as large as its renders: reconstructing, and all of it.

    The stage "reward" is left out where a package that it needs is not installed."""
    return _RewardBench(gpu, config).measure()


class _Bench:
    """A record of what stages need above what is there when they begin, and of what is there all the time."""

    def __init__(self, gpu):
        self.gpu, self.weights, self.readings = gpu, {}, defaultdict(list)

    @contextlib.contextmanager
    def _weights(self, name):
        before = self.gpu.memory.now
        yield
        gc.collect()
        self.weights[name] = self.gpu.memory.now - before

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        memory, flops = self.gpu.memory, self.gpu.flops
        memory.reset()
        start = memory.now, flops.total, self.gpu.clock()
        yield
        end = memory.peak, flops.total, self.gpu.clock()
        self.readings[name].append(Reading(*(after - before for before, after in zip(start, end, strict=True))))

    def bytes(self, name: str) -> int:
        return max((reading.bytes for reading in self.readings[name]), default=0)

    def flops(self, name: str) -> int:
        return max((reading.flops for reading in self.readings[name]), default=0)

    def seconds(self, name: str) -> float:
        return min((reading.seconds for reading in self.readings[name]), default=0.0)

    def measure_passes(self, run_stages: Callable[[], None]) -> None:
        """Run all stages once to count, and again for the time, when all kernels are loaded."""
        torch.cuda.empty_cache()  # of what was needed while the weights were made
        with self.gpu.counting():
            run_stages()
        for _ in range(self.gpu.timed_passes):
            run_stages()

    def during(self, name: str, function: Callable) -> Callable:
        """`function`, as a part of stage `name`."""

        def measured(*args, **kwargs):
            with self.stage("reference" if kwargs.get("reference") else name):
                return function(*args, **kwargs)

        return measured


class _RunBench(_Bench):
    """Everything that a run sets up."""

    def __init__(self, gpu, config: ConfigDict, num_processes: int):
        super().__init__(gpu)
        self.config, self.num_processes = config, num_processes
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        with self._weights("reward"):
            self.reward_fn = load_reward(config, gpu.device)
        with self._weights("painter"):
            self.policy = load_painter(config, gpu.device)
            make_trainable(self.policy, config)
        with self._weights("optimizer"):
            with config.unlocked():
                untracked = copy.deepcopy(config)
            untracked.tracker = "none"
            self.accelerator = start_accelerator(untracked)
            self.optimizer = self.accelerator.prepare(make_optimizer(self.policy, config))
            self._take_an_empty_step()
        self.learner = self.policy, self.optimizer, self.accelerator

    def _take_an_empty_step(self):
        """The optimizer makes its state in its first step; from the second on it is there during the backward pass."""
        for parameter in self.policy.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self) -> Measurement:
        config = self.config
        self.short = short = copy.deepcopy(config)  # as many denoising steps as one pass of the update takes
        K = short.sample.num_steps = config.train.timesteps_per_forward
        short.train.skip_last_steps, short.train.timestep_fraction = 0, 1.0
        short.train.gradient_accumulation_steps = short.train.num_inner_epochs = 1
        self.measure_passes(self._run_stages)

        weights = sum(self.weights.values())
        # the network at work on one step, and what is kept of all of them until the batch goes to host memory
        kept = self.bytes("a batch of all steps")
        peak = {
            "sampling": weights + max(self.bytes("policy"), self.bytes("reference")) + kept,
            "decode": weights + self.bytes("decode") + kept,
            "reward": weights + self.bytes("reward") + kept,
            "update": weights + self.bytes("update") + self.bytes_of_a_sample * config.train.batch_size,
        }
        if config.train.kl_per_update > 0:
            peak["calibration"] = weights + self.bytes("calibration") + self.bytes("calibration of all steps")
        B, b, T = config.sample.batch_size, config.train.batch_size, config.sample.num_steps
        times = {  # of a stage as it was measured, for one sample of the run
            "policy": T / B,
            "reference": reference_steps(config) / B,
            "decode": 1 / B,
            "reward": 1 / B,
            "update": trained_steps(config) * config.train.num_inner_epochs / (b * K),
        }
        gradients = sum(4 * parameter.numel() for parameter in self.policy.trainable_parameters())  # float32
        waiting = gradients if gradients_while_painting(config) else 0
        return Measurement(
            weights=self.weights,
            host=(self.bytes_of_a_sample + waiting) * samples_per_process(config),
            peak=peak,
            flops=_existing({name: self._without_painting(self.flops, name) * count for name, count in times.items()}),
            gradient_bytes=gradients,
            seconds=_existing(
                {name: self._without_painting(self.seconds, name) * count for name, count in times.items()}
            ),
        )

    def _without_painting(self, reading, name):
        """The FLOPs or seconds of a stage; of an update that began with painting, what it needed beyond that."""
        painting = 0
        if name == "update" and gradients_while_painting(self.config):
            painting = reading("policy") + reading("reference")  # one step of a batch, of which there are K
            painting *= self.config.train.batch_size / self.config.sample.batch_size * self.short.sample.num_steps
        return reading(name) - painting

    def _run_stages(self):
        samples, result = self._collect_one_batch(self.short)
        if gradients_while_painting(self.config):
            self._paint_and_update(self.short, result)
        else:
            self._update(self.short, samples.trajectory)
        calibrates = self.config.train.kl_per_update > 0
        if calibrates:
            self._calibrate("calibration", self.short, samples.trajectory)
        with self._decoding_nothing(result) as reward_fn, self._predicting_nothing():
            del samples
            with self.stage("a batch of all steps"):
                trajectory = self._collect(self.config, self.config.sample.batch_size, reward_fn).trajectory
            if calibrates:
                self._calibrate("calibration of all steps", self.config, trajectory)
        self.bytes_of_a_sample = _bytes(trajectory) // self.config.sample.batch_size

    # -- the stages ---------------------------------------------------------------------------------------------------

    def _collect(self, config, count, reward_fn, **options):
        generators = [make_generator(config.seed, NOISE, i) for i in range(count)]
        score_reference = config.kl_penalty or config.log_kl
        prompts = [PROMPT] * count
        with self._replaced("equals_reference", lambda: False):  # so it is after the first epoch
            return collect_samples(self.policy, reward_fn, prompts, generators, config, score_reference, **options)

    def _collect_one_batch(self, config):
        """The samples, and what the reward function returned."""
        results = []

        def reward_fn(views, prompts):
            self.views_shape = views.shape[1:]
            results.append(self.during("reward", self.reward_fn)(views, prompts))
            return results[-1]

        with self._replaced("predict", self.during("policy", self.policy.predict)):
            with self._replaced("decode", self.during("decode", self.policy.decode)):
                samples = self._collect(config, config.sample.batch_size, reward_fn)
        return samples, results[0]

    def _update(self, config, trajectory):
        b = config.train.batch_size
        trajectory, generator = _resized(trajectory, b), make_generator(config.seed, SHUFFLE_SAMPLES)
        with self.stage("update"):
            logs = update(*self.learner, trajectory, torch.linspace(-1, 1, b), config, generator)
        _check_finite(*logs)

    def _paint_and_update(self, config, result):
        b = config.train.batch_size
        with self._decoding_nothing(result) as reward_fn, self.stage("update"):
            samples = self._collect(config, b, reward_fn, backward=self.accelerator.backward)
            logs = update_from_gradients(*self.learner, samples.gradients, torch.linspace(-1, 1, b), config)
        _check_finite(*logs)

    def _calibrate(self, stage, config, trajectory):
        trajectory = _resized(trajectory, max(1, CALIBRATION_SAMPLES // self.num_processes))
        calibration = StepCalibration(self.policy, self.optimizer, self.accelerator, config)
        with self.stage(stage):
            calibration.start(trajectory)
            calibration.after_update()

    # -- stand-ins ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _replaced(self, name, function):
        """Inside, `function` in place of the painter's method `name`."""
        setattr(self.policy, name, function)
        yield
        delattr(self.policy, name)

    @contextlib.contextmanager
    def _predicting_nothing(self):
        """Inside, the painter predicts zeros."""
        with self._replaced("predict", lambda latents, *args, **kwargs: torch.zeros_like(latents)):
            with self._replaced("full_precision", contextlib.nullcontext):
                yield

    @contextlib.contextmanager
    def _decoding_nothing(self, result):
        """Inside, the painter's views are black. Gives a reward function that returns copies of `result`."""
        tensors = {f.name: getattr(result, f.name) for f in fields(result)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}

        def reward_fn(views, prompts):
            rows = torch.arange(len(views), device=views.device) % len(result.reward)
            return replace(result, **{name: value[rows] for name, value in tensors.items()})

        shape = self.views_shape
        with self._replaced("decode", lambda latents: torch.zeros(len(latents), *shape, device=latents.device)):
            yield reward_fn


class _RewardBench(_Bench):
    def __init__(self, gpu, config: ConfigDict):
        super().__init__(gpu)
        self.config = config
        with self._weights("reward"):
            self.judge = load_mrc(config, gpu.device)

    def measure(self) -> Measurement:
        self.measure_passes(self._run_stages)
        names = ("reconstruct", "reward")
        B, weights = self.config.sample.batch_size, sum(self.weights.values())
        return Measurement(
            weights=self.weights,
            host=0,
            peak={name: weights + self.bytes(name) for name in names if self.readings[name]},
            flops=_existing({name: self.flops(name) / B for name in names}),
            gradient_bytes=0,
            seconds=_existing({name: self.seconds(name) / B for name in names}),
        )

    @torch.no_grad()
    def _run_stages(self):
        config, model = self.config, self.judge.reconstructor
        shape = config.sample.batch_size, model.num_views, 3
        size = (config.recon.render_size,) * 2
        inputs = torch.rand(*shape, model.input_size, model.input_size, device=self.gpu.device)
        with self.stage("reconstruct"):
            model.reconstruct(inputs, model.cameras)
        views = torch.rand(*shape, *size, device=self.gpu.device)
        with contextlib.suppress(ImportError), self.stage("reward"):
            self.judge(views)


def _existing(values: dict[str, float]) -> dict[str, float]:
    """Those that were measured, which are not 0."""
    return {name: value for name, value in values.items() if value}


def _check_finite(log):
    if not (log["step_skipped"] or math.isfinite(log["grad_norm"])):
        raise ValueError(f"the update's gradient is {log['grad_norm']}: nothing that follows would mean anything")


def _resized(trajectory: Trajectory, count: int) -> Trajectory:
    """The first `count` samples, repeated if there are fewer."""
    return trajectory.take(torch.arange(count) % len(trajectory))


def _bytes(trajectory: Trajectory) -> int:
    """Of all its tensors, wherever they are."""
    values = [getattr(trajectory, f.name) for f in fields(Trajectory)]
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, torch.Tensor))
