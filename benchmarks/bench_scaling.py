"""What an epoch of the small world costs with more samples, steps, views and processes.

    python benchmarks/bench_scaling.py [--repeats N]

Prints seconds of CPU, and what they are of proportional growth: 1.00 = twice the work costs twice as much. For two
processes: of the clock, the share of the speed of two machines that is kept by two processes that share an epoch, and
by two that do not know of each other, which is what this machine allows. Takes about three minutes on two cores.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import epoch, start, stop

SAMPLES, STEPS = 8, 4
VIEWS = (1, 2, 4)


def prepare_epoch(rank, processes):
    """-> a function that runs an epoch, `samples` in every process: painting with gradients, reward and update."""
    from accelerate import Accelerator

    from config import tiny
    from config.validate import validate
    from ddpo.sampling import NOISE, collect_samples, make_generator
    from ddpo.setup import make_optimizer
    from ddpo.update import update_from_gradients
    from diffusers_patch.loading import load_painter, make_trainable
    from mrc.rewards import load_reward

    config = tiny.get_config()
    config.train.skip_last_steps = 0
    validate(config, processes)
    accelerator = Accelerator(cpu=True)
    policy, reward = load_painter(config, "cpu"), load_reward(config, "cpu")
    make_trainable(policy, config)
    optimizer = accelerator.prepare(make_optimizer(policy, config))

    def run(samples=SAMPLES, steps=STEPS):
        config.unlock()
        config.sample.num_steps, config.train.batch_size = steps, min(SAMPLES, samples)
        config.train.gradient_accumulation_steps = samples // config.train.batch_size
        painted = collect_samples(
            policy,
            reward,
            ["a red cube next to a blue cone"] * samples,
            [make_generator(0, NOISE, rank * samples + i) for i in range(samples)],
            config,
            score_reference=True,
            backward=accelerator.backward,
        )
        advantages = torch.linspace(-1, 1, samples)
        update_from_gradients(policy, optimizer, accelerator, painted.gradients, advantages, config)

    return run


def prepare_reward():
    """-> a function that reconstructs objects from their first `count` views and renders them there."""
    from config import tiny
    from config.validate import validate
    from mrc.rewards import load_mrc
    from tiny.objects import build, fixed_views, random_caption

    judge = load_mrc(validate(tiny.get_config(), 1), "cpu")
    generator = torch.Generator().manual_seed(0)
    views = fixed_views(build([random_caption(generator) for _ in range(SAMPLES)], generator))

    def run(count):
        cameras = judge.reconstructor.cameras[:count]
        scene = judge.reconstructor.reconstruct(views[:, :count], cameras)
        judge.reconstructor.render(scene, cameras, views.shape[-1])

    return run


def seconds(run, cases, repeats):
    """{case: the fewest seconds of CPU of run(*case)}, in turns."""
    times = {case: [] for case in cases}
    for _ in range(repeats + 1):  # the first is not counted: what happens once in a process
        for case in cases:
            before = time.process_time()
            run(*case)
            times[case].append(time.process_time() - before)
    return {case: min(found[1:]) for case, found in times.items()}


def print_growth(name, sizes, times):
    """A line for each size: what it costs, and its cost per unit as a share of that of the smallest."""
    print(name)
    for size, found in zip(sizes, times, strict=True):
        print(f"  {size:4d}  {found:6.2f} s  {found / size / (times[0] / sizes[0]):.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="of every case; the fastest counts")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    reward = seconds(prepare_reward(), [(count,) for count in VIEWS], repeats)
    print_growth(f"views, reconstructed and rendered, {SAMPLES} objects", VIEWS, list(reward.values()))
    sizes = [factor * SAMPLES for factor in (1, 2, 4)]
    times = seconds(prepare_epoch(0, 1), [(size, STEPS) for size in sizes], repeats)
    print_growth(f"samples, {STEPS} steps", sizes, list(times.values()))
    sizes = [factor * STEPS for factor in (1, 2, 4)]
    times = seconds(prepare_epoch(0, 1), [(SAMPLES, size) for size in sizes], repeats)
    print_growth(f"steps, {SAMPLES} samples, the reward included", sizes, list(times.values()))

    together, one, other = start(prepare_epoch, 2), start(prepare_epoch, 1), start(prepare_epoch, 1)
    cases = {"one process": [one], "two that share": [together], "two strangers": [one, other]}
    rounds = [{name: epoch(*groups) for name, groups in cases.items()} for _ in range(repeats + 1)][1:]
    alone = min(found["one process"][1] for found in rounds)
    print(f"processes, {SAMPLES} samples each")
    for name in cases:
        cpu, clock = (min(found[name][i] for found in rounds) for i in (0, 1))
        print(f"  {name:<15} {cpu:6.2f} s of CPU  {clock:6.2f} s of the clock  {alone / clock:.2f}", flush=True)
    for workers in (together, one, other):
        stop(workers)


if __name__ == "__main__":
    main()
