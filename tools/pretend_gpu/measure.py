"""What a run asks of each GPU: memory and FLOPs of every stage, measured with the trainer's own functions.

Each stage runs once at full size, on one batch. What grows with the length of a run, the stored samples, is measured
with all denoising steps and a painter that paints nothing.
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

import recon.openlrm
import recon.tiny_lrm
from config.batches import samples_per_process, trained_steps
from ddpo.calibration import SAMPLES as CALIBRATION_SAMPLES
from ddpo.calibration import StepCalibration
from ddpo.sampling import NOISE, SHUFFLE_SAMPLES, collect_samples, make_generator
from ddpo.setup import make_optimizer, start_accelerator
from ddpo.update import update
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.rollout import Trajectory
from mrc.rewards import load_reward
from recon.volume_rendering import render_images
from tools.pretend_gpu.gpu import GPU, PretendGPU, pretend_gpu

STORED_BATCHES = (2, 3)  # from whose memory that of more batches follows
PROMPT = "a prompt"


@dataclass(frozen=True)
class Measurement:
    """What one process needs: bytes of live tensors on its GPU; FLOPs, two for a multiplication and an addition.

    weights: {"painter", "reward", "optimizer"}: bytes that stay for the whole run.
    kept: bytes that an epoch's samples occupy from their painting to the end of its updates.
    peak: {stage: bytes}, the most at once during a stage, weights and kept samples included. The stages are "sampling",
        "decode", "reward", "joining" (the batches of an epoch become one), "update" and, if the learning rate is to be
        calibrated, "calibration".
    flops: {stage: FLOPs per sample}, with all its denoising steps; the stages are "policy", "reference" (if it is
        scored), "decode", "reward" and "update" (once for every pass over the samples).
    gradient_bytes: what an update averages over the processes.
    """

    weights: dict[str, int]
    kept: int
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
        with self._painting_nothing(samples.trajectory.views, result) as reward_fn:
            del samples
            kept_but_one, kept, joining = self._store(reward_fn)
            if calibrates:
                trajectory = self._collect(config, 1, reward_fn).trajectory
                self._calibrate("calibration of all steps", config, trajectory)

        weights, working = sum(self.weights.values()), self.working
        sampling = max(working["policy"], working["reference"])
        peak = {
            "sampling": weights + kept_but_one + sampling,
            "decode": weights + kept_but_one + working["decode"],
            "reward": weights + kept_but_one + working["reward"],
            "joining": weights + joining,
            "update": weights + kept + working["update"],
        }
        if calibrates:  # the network at work on one step, and what is remembered of all of them
            needs = working["calibration"] + working["calibration of all steps"]
            peak["calibration"] = weights + kept + needs
        B, b, T = config.sample.batch_size, config.train.batch_size, config.sample.num_steps
        flops = {
            "policy": self.flops["policy"] / (B * K) * T,
            "reference": self.flops["reference"] / (B * K) * T,
            "decode": self.flops["decode"] / B,
            "reward": self.flops["reward"] / B,
            "update": self.flops["update"] / (b * K) * trained_steps(config) * config.train.num_inner_epochs,
        }
        gradients = sum(4 * parameter.numel() for parameter in self.policy.trainable_parameters())  # float32
        return Measurement(self.weights, kept, peak, {k: v for k, v in flops.items() if v}, gradients)

    # -- the stages ---------------------------------------------------------------------------------------------------

    def _collect(self, config, batches, reward_fn):
        count = batches * config.sample.batch_size
        generators = [make_generator(config.seed, NOISE, i) for i in range(count)]
        score_reference = config.kl_penalty or config.log_kl
        return collect_samples(self.policy, reward_fn, [PROMPT] * count, generators, config, score_reference)

    def _collect_one_batch(self, config):
        """The samples, and what the reward function returned."""
        results = []

        def reward_fn(*args):
            results.append(self.during("reward", self.reward_fn)(*args))
            return results[-1]

        with self._replaced("predict", self.during("policy", self.policy.predict)):
            with self._replaced("decode", self.during("decode", self.policy.decode)):
                samples = self._collect(config, 1, reward_fn)
        return samples, results[0]

    def _update(self, config, trajectory):
        b = config.train.batch_size
        trajectory, advantages = _resized(trajectory, b), torch.zeros(b, device=GPU)
        generator = make_generator(config.seed, SHUFFLE_SAMPLES)
        with self.stage("update"):
            update(self.policy, self.optimizer, self.accelerator, trajectory, advantages, config, generator)

    def _calibrate(self, stage, config, trajectory):
        trajectory = _resized(trajectory, max(1, CALIBRATION_SAMPLES // self.num_processes))
        calibration = StepCalibration(self.policy, self.optimizer, self.accelerator, config)
        with self.stage(stage):
            calibration.start(trajectory)
            calibration.after_update()

    def _store(self, reward_fn):
        """Bytes: what an epoch's batches but one occupy, what all of them do, and the most until they are joined."""

        def stored(batches):
            gc.collect()
            memory = self.gpu.memory
            before = memory.now
            memory.reset()
            samples = self._collect(self.config, batches, reward_fn)
            gc.collect()
            kept, peak = memory.now - before, memory.peak - before
            del samples
            return kept, peak

        batches = samples_per_process(self.config) // self.config.sample.batch_size
        few, more = (min(batches, count) for count in STORED_BATCHES)
        kept, peak = stored(few)
        if more == few:
            return kept * (batches - 1) // batches, kept, peak
        kept_more, peak_more = stored(more)
        per_batch, peak_per_batch = kept_more - kept, peak_more - peak
        kept += (batches - few) * per_batch
        return kept - per_batch, kept, peak + (batches - few) * peak_per_batch

    # -- stand-ins ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _replaced(self, name, function):
        """Inside, `function` in place of the painter's method `name`."""
        setattr(self.policy, name, function)
        yield
        delattr(self.policy, name)

    @contextlib.contextmanager
    def _painting_nothing(self, views, result):
        """Inside, the painter predicts and decodes zeros. Gives a reward function that returns copies of `result`."""
        shape = views.shape[1:]

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
    trajectory = Trajectory.cat([trajectory] * -(-count // len(trajectory)))

    def cut(value):
        if isinstance(value, dict):
            return {name: entry[:count].clone() for name, entry in value.items()}
        return value if value is None else value[:count].clone()

    return Trajectory(**{f.name: cut(getattr(trajectory, f.name)) for f in fields(Trajectory)})


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

    modules = (recon.openlrm, recon.tiny_lrm)
    for module in modules:
        module.render_images = render_one_chunk
    yield
    for module in modules:
        module.render_images = render_images
