"""What a run asks of each GPU: memory and FLOPs of every stage, measured with the trainer's own functions.

Each stage runs once at full size, on one batch. What waits in host memory, an epoch's trajectories, is measured with
all denoising steps and a painter that paints nothing.
"""

import contextlib
import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from accelerate.state import AcceleratorState
from ml_collections import ConfigDict
from torch.utils._pytree import tree_leaves

from config.batches import samples_per_process, trained_steps
from ddpo.calibration import SAMPLES as CALIBRATION_SAMPLES
from ddpo.calibration import StepCalibration
from ddpo.sampling import NOISE, SHUFFLE_SAMPLES, collect_samples, make_generator
from ddpo.setup import make_optimizer, start_accelerator
from ddpo.update import update
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.rollout import Trajectory
from mrc.rewards import load_reward
from recon import volume_rendering
from recon.volume_rendering import render_images
from tools.pretend_gpu.gpu import GPU, PretendGPU, pretend_gpu

PROMPT = "a prompt"


@dataclass(frozen=True)
class Measurement:
    """What one process needs: bytes of live tensors on its GPU; FLOPs, two for a multiplication and an addition.

    weights: {"painter", "reward", "optimizer"}: bytes that stay for the whole run.
    host: bytes of host memory in which an epoch's trajectories wait for the update.
    peak: {stage: bytes}, the most at once during a stage, weights included. The stages are "sampling", "decode",
        "reward", "update" and, if the learning rate is to be calibrated, "calibration".
    flops: {stage: FLOPs per sample}, with all its denoising steps; the stages are "policy", "reference" (if it is
        scored), "decode", "reward" and "update" (once for every pass over the samples).
    gradient_bytes: what an update averages over the processes.
    """

    weights: dict[str, int]
    host: int
    peak: dict[str, int]
    flops: dict[str, float]
    gradient_bytes: int


def measure(config: ConfigDict, num_processes: int) -> Measurement:
    """Measure the run of a validated `config` with `num_processes` processes. Raises ValueError as a run would."""
    check_cameras(config)
    AcceleratorState._reset_state(reset_partial_state=True)  # may hold the precision of an earlier measurement
    with pretend_gpu() as gpu, _one_chunk_of_rays(gpu):
        return _Bench(gpu, config, num_processes).measure()


class _Bench:
    """Everything that a run sets up, and a record of what its stages need above what is there when they begin."""

    def __init__(self, gpu: PretendGPU, config: ConfigDict, num_processes: int):
        self.gpu, self.config, self.num_processes = gpu, config, num_processes
        self.working, self.flops = defaultdict(int), defaultdict(int)
        self.weights = {}
        with self._weights("reward"):
            self.reward_fn = load_reward(config, GPU)
        with self._weights("painter"):
            self.policy = load_painter(config, GPU)
            make_trainable(self.policy, config)
        with self._weights("optimizer"):
            with config.unlocked():
                untracked = copy.deepcopy(config)
            untracked.tracker = "none"
            self.accelerator = start_accelerator(untracked)
            self.optimizer = self.accelerator.prepare(make_optimizer(self.policy, config))
            self._take_an_empty_step()

    @contextlib.contextmanager
    def _weights(self, name):
        before = self.gpu.memory.now
        yield
        gc.collect()
        self.weights[name] = self.gpu.memory.now - before

    def _take_an_empty_step(self):
        """The optimizer makes its state in its first step; from the second on it is there during the backward pass."""
        for parameter in self.policy.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.optimizer.step()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        memory, flops = self.gpu.memory, self.gpu.flops
        memory.reset()
        memory_before, flops_before = memory.now, flops.total
        yield
        self.working[name] = max(self.working[name], memory.peak - memory_before)
        self.flops[name] += flops.total - flops_before

    def during(self, name: str, function: Callable) -> Callable:
        """`function`, as a part of stage `name`."""

        def measured(*args, **kwargs):
            with self.stage("reference" if kwargs.get("reference") else name):
                return function(*args, **kwargs)

        return measured

    def measure(self) -> Measurement:
        config = self.config
        short = copy.deepcopy(config)  # as many denoising steps as one pass of the update takes
        K = short.sample.num_steps = config.train.timesteps_per_forward
        short.train.skip_last_steps, short.train.timestep_fraction = 0, 1.0
        short.train.gradient_accumulation_steps = short.train.num_inner_epochs = 1

        samples, result = self._collect_one_batch(short)
        self._update(short, samples.trajectory)
        calibrates = config.train.kl_per_update > 0
        if calibrates:
            self._calibrate("calibration", short, samples.trajectory)
        with self._painting_nothing(self.views_shape, result) as reward_fn:
            del samples
            with self.stage("a batch of all steps"):
                trajectory = self._collect(config, 1, reward_fn).trajectory
            if calibrates:
                self._calibrate("calibration of all steps", config, trajectory)
        per_sample = _bytes(trajectory) // config.sample.batch_size

        weights, working = sum(self.weights.values()), self.working
        # the network at work on one step, and what is kept of all of them until the batch goes to host memory
        sampling = max(working["policy"], working["reference"]) + working["a batch of all steps"]
        peak = {
            "sampling": weights + sampling,
            "decode": weights + working["decode"] + working["a batch of all steps"],
            "reward": weights + working["reward"] + working["a batch of all steps"],
            "update": weights + working["update"] + per_sample * config.train.batch_size,
        }
        if calibrates:
            peak["calibration"] = weights + working["calibration"] + working["calibration of all steps"]
        B, b, T = config.sample.batch_size, config.train.batch_size, config.sample.num_steps
        flops = {
            "policy": self.flops["policy"] / (B * K) * T,
            "reference": self.flops["reference"] / (B * K) * T,
            "decode": self.flops["decode"] / B,
            "reward": self.flops["reward"] / B,
            "update": self.flops["update"] / (b * K) * trained_steps(config) * config.train.num_inner_epochs,
        }
        gradients = sum(4 * parameter.numel() for parameter in self.policy.trainable_parameters())  # float32
        host = per_sample * samples_per_process(config)
        return Measurement(self.weights, host, peak, {k: v for k, v in flops.items() if v}, gradients)

    # -- the stages ---------------------------------------------------------------------------------------------------

    def _collect(self, config, batches, reward_fn):
        count = batches * config.sample.batch_size
        generators = [make_generator(config.seed, NOISE, i) for i in range(count)]
        score_reference = config.kl_penalty or config.log_kl
        return collect_samples(self.policy, reward_fn, [PROMPT] * count, generators, config, score_reference)

    def _collect_one_batch(self, config):
        """The samples, and what the reward function returned."""
        results = []

        def reward_fn(views, prompts):
            self.views_shape = views.shape[1:]
            results.append(self.during("reward", self.reward_fn)(views, prompts))
            return results[-1]

        with self._replaced("predict", self.during("policy", self.policy.predict)):
            with self._replaced("decode", self.during("decode", self.policy.decode)):
                samples = self._collect(config, 1, reward_fn)
        return samples, results[0]

    def _update(self, config, trajectory):
        b = config.train.batch_size
        trajectory, advantages = _resized(trajectory, b), torch.zeros(b)
        generator = make_generator(config.seed, SHUFFLE_SAMPLES)
        with self.stage("update"):
            update(self.policy, self.optimizer, self.accelerator, trajectory, advantages, config, generator)

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
    def _painting_nothing(self, shape, result):
        """Inside, the painter predicts zeros and decodes views of `shape`. Gives a reward function that returns copies
        of `result`."""

        def reward_fn(views, prompts):
            tensors = {f.name: getattr(result, f.name) for f in fields(result)}
            copies = {name: value.clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            return replace(result, **copies)

        with contextlib.ExitStack() as stack:
            for name, function in {
                "predict": lambda latents, *args, **kwargs: torch.zeros_like(latents),
                "decode": lambda latents: torch.zeros(len(latents), *shape, device=latents.device),
                "full_precision": contextlib.nullcontext,
            }.items():
                stack.enter_context(self._replaced(name, function))
            yield reward_fn


def _resized(trajectory: Trajectory, count: int) -> Trajectory:
    """The first `count` samples, repeated if there are fewer."""
    return trajectory.take(torch.arange(count) % len(trajectory))


def _bytes(trajectory: Trajectory) -> int:
    """Of all its tensors, wherever they are."""
    values = [getattr(trajectory, f.name) for f in fields(Trajectory)]
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def _one_chunk_of_rays(gpu: PretendGPU) -> Iterator[None]:
    """Inside, of the equal chunks of rays of an image one is rendered and the others are copies, at the same FLOPs."""

    def render_one_chunk(render, cameras, size, chunk_size):
        rendered = {}

        def render_once(origins, directions):
            if len(origins) not in rendered:
                before = gpu.flops.total
                rendered[len(origins)] = render(origins, directions), gpu.flops.total - before
                return rendered[len(origins)][0]
            parts, flops = rendered[len(origins)]
            gpu.flops.total += flops
            return tuple(part.clone() for part in parts)

        return render_images(render_once, cameras, size, chunk_size)

    volume_rendering.render_images = render_one_chunk
    yield
    volume_rendering.render_images = render_images
