"""An epoch in this repository against an epoch as the published loops are built, side by side.

    python benchmarks/bench_loop.py [--repeats N]

Both paint the same samples with the small grid painter, score every step under the base model, and take one LoRA
update from the same advantages. The published structure: a second UNet as the base model, asked at every step, and an
update that asks the UNet again, one step of a micro-batch at a time. Rewards cost the same in both and are left out.
Every form has processes of its own (which remember their peak memory), on one thread each, and the forms take turns
with their epochs. Prints for float32 and bf16, one and two processes, each form's seconds of CPU, of the clock, and its
memory, as shares of the published. Takes about eleven minutes on two cores.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import epoch, start, stop

SAMPLES, STEPS = 8, 10
PUBLISHED = "published loops"
FORMS = {  # what differs from the plain configuration
    PUBLISHED: None,
    "ours, gradients in the update": {"train.gradients_while_painting": False},
    "ours": {},
    "ours, base model at a quarter of the steps": {"kl_timestep_fraction": 0.25},
    "ours, that and a quarter of the steps trained": {"kl_timestep_fraction": 0.25, "train.timestep_fraction": 0.25},
}


def make_config(precision, processes, changes):
    from config import tiny
    from config.validate import validate

    config = tiny.get_config()
    config.mixed_precision, config.lora.targets = precision, "attention"
    config.sample.num_steps, config.sample.guidance_scale = STEPS, 5.0
    config.sample.total_batch_size = config.train.total_batch_size = SAMPLES
    config.sample.batch_size = config.train.batch_size = SAMPLES // processes
    config.train.timesteps_per_forward, config.train.skip_last_steps, config.train.hold_foreground = 1, 0, False
    config.per_prompt_stat_tracking.min_count = 1
    config.update_from_flattened_dict(changes or {})
    return validate(config, processes)


def published_epoch(policy, reference, optimizer, accelerator, prompts, generators, advantages, config):
    """Sampling and the update as DDPO and Carve3D have them."""
    from ddpo.ppo import ppo_loss
    from ddpo.update import average_gradients
    from diffusers_patch.ddim_with_logprob import ddim_step_with_logprob, gaussian_log_prob
    from diffusers_patch.rollout import draw_noise

    scheduler, guidance = policy.scheduler, config.sample.guidance_scale
    scheduler.set_timesteps(STEPS)
    conditioning = policy.encode(prompts)
    x = policy.initial_latents(len(prompts), generators)
    noises, chain, log_probs = draw_noise(STEPS, x, generators), [x], []
    with torch.no_grad():
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            t = t.expand(len(prompts))
            for model in (policy, reference):
                output = model.predict(chain[-1], t, conditioning, guidance, reference=model is reference)
                mean, std = ddim_mean_std(scheduler, output, t, chain[-1])
                if model is policy:
                    x = mean + std * noise
                    log_probs.append(gaussian_log_prob(x, mean, std))
                else:
                    gaussian_log_prob(x, mean, std)
            chain.append(x)
        policy.decode(x)
    for step in torch.randperm(STEPS).tolist():
        t = scheduler.timesteps[step].expand(len(prompts))
        output = policy.predict(chain[step], t, conditioning, guidance)
        _, log_prob = ddim_step_with_logprob(scheduler, output, t, chain[step], 1.0, prev_sample=chain[step + 1])
        accelerator.backward(ppo_loss(log_prob, log_probs[step], advantages, 1.0, 5.0)[0])
    parameters = policy.trainable_parameters()
    average_gradients(parameters, accelerator, STEPS)
    accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def ddim_mean_std(scheduler, output, t, x):
    from diffusers_patch.ddim_with_logprob import ddim_mean_std

    return ddim_mean_std(scheduler, output, t, x, 1.0)


def our_epoch(policy, optimizer, accelerator, prompts, generators, advantages, config):
    from config.batches import gradients_while_painting
    from ddpo.sampling import STEPS as DRAWN
    from ddpo.sampling import collect_samples, make_generator
    from ddpo.update import update, update_from_gradients
    from mrc.rewards import ImageResult

    def nothing(views, prompts):
        share = torch.ones(views.shape[:2])
        return ImageResult(share[:, 0], share, share < 0)

    painting = gradients_while_painting(config)
    learner = policy, optimizer, accelerator
    samples = collect_samples(
        policy,
        nothing,
        prompts,
        generators,
        config,
        score_reference=True,
        step_generator=make_generator(0, DRAWN),
        backward=accelerator.backward if painting else None,
    )
    if painting:
        update_from_gradients(*learner, samples.gradients, advantages, config)
    else:
        update(*learner, samples.trajectory, advantages, config, torch.Generator().manual_seed(0))


def prepare(rank, processes, form, precision):
    """-> a function that runs an epoch of a form."""
    from accelerate import Accelerator

    from ddpo.sampling import NOISE, make_generator
    from ddpo.setup import make_optimizer
    from diffusers_patch.loading import load_painter, make_trainable

    config = make_config(precision, processes, FORMS[form])
    accelerator = Accelerator(cpu=True)
    policy = load_painter(config, "cpu")
    make_trainable(policy, config)
    torch.manual_seed(0)
    for parameter in policy.trainable_parameters():  # so that the policy is not the base model
        parameter.data += 0.01 * torch.randn(parameter.shape)
    models = (policy, copy.deepcopy(policy)) if form == PUBLISHED else (policy,)
    run = published_epoch if form == PUBLISHED else our_epoch
    optimizer = accelerator.prepare(make_optimizer(policy, config))
    count = SAMPLES // processes
    local = range(rank * count, (rank + 1) * count)
    advantages = torch.linspace(-1, 1, SAMPLES)[local.start : local.stop]
    prompts = ["a red cube next to a blue cone"] * count

    def one_epoch():
        generators = [make_generator(0, NOISE, i) for i in local]
        run(*models, optimizer, accelerator, prompts, generators, advantages, config)

    return one_epoch


def measure(precision, processes, repeats):
    """{form: the smallest of each of its numbers}, from epochs of all forms in turns."""
    forms = {form: start(prepare, processes, form, precision) for form in FORMS}
    rounds = [{form: epoch(workers) for form, workers in forms.items()} for _ in range(repeats + 1)]
    for workers in forms.values():
        stop(workers)
    counted = rounds[1:]  # not what happens once in a process
    return {form: [min(values) for values in zip(*(found[form] for found in counted), strict=True)] for form in FORMS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4, help="epochs of every form; the fastest counts")
    repeats = parser.parse_args().repeats
    cases = [(precision, processes) for precision in ("no", "bf16") for processes in (1, 2)]
    print(f"CPU, clock and memory as shares of {PUBLISHED}", flush=True)
    for precision, processes in cases:
        name = "float32" if precision == "no" else precision
        print(f"\n{name}, processes: {processes}", flush=True)
        found = measure(precision, processes, repeats)
        for form, values in found.items():
            ratios = "  ".join(f"{a / b:5.2f}" for a, b in zip(values, found[PUBLISHED], strict=True))
            print(f"  {form:<46} {ratios}   ({values[0]:.1f} s, {values[1]:.1f} s, {values[2]:.0f} MiB)", flush=True)


if __name__ == "__main__":
    main()
