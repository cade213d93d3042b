"""What one UNet pass per micro-batch saves in the update, and what the reference costs in sampling.

    python benchmarks/bench_update.py

Prints ratios of CPU time: the update with all timesteps of a micro-batch in one pass against one pass for each, and
sampling with the reference model against sampling without.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import Accelerator

from config import tiny
from config.batches import trained_steps
from config.validate import validate
from ddpo.sampling import NOISE, make_generator
from ddpo.setup import make_optimizer
from ddpo.update import update
from diffusers_patch.loading import load_painter, make_trainable
from diffusers_patch.rollout import rollout

SAMPLES = 16


def main():
    torch.set_num_threads(1)
    config = validate(tiny.get_config(), 1)
    accelerator = Accelerator(cpu=True)
    policy = load_painter(config, "cpu")
    make_trainable(policy, config)
    optimizer = make_optimizer(policy, config)
    prompts = ["a red cube next to a blue cone"] * SAMPLES

    def sample(score_reference):
        generators = [make_generator(0, NOISE, i) for i in range(SAMPLES)]
        steps, guidance = config.sample.num_steps, config.sample.guidance_scale
        return rollout(policy, prompts, steps, guidance, 1.0, generators, score_reference)

    def learn(steps_together):
        config.train.timesteps_per_forward = steps_together
        config.train.gradient_accumulation_steps = SAMPLES // config.train.batch_size
        update(policy, optimizer, accelerator, trajectory, torch.randn(SAMPLES), config, torch.Generator())

    trajectory = sample(True)
    alone, with_reference = seconds(lambda: sample(False)), seconds(lambda: sample(True))
    print(f"sampling with the reference / without: {with_reference / alone:.2f}")
    single, merged = seconds(lambda: learn(1)), seconds(lambda: learn(trained_steps(config)))
    print(f"update with all timesteps in one pass / one pass each: {merged / single:.2f}")
    print(f"update / sampling: {merged / alone:.2f} ({merged / SAMPLES:.3f} s and {alone / SAMPLES:.3f} s per sample)")


def seconds(function):
    function()
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
