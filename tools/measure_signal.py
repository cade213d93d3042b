"""How much could one update learn? The signal in a batch of samples, before a run is paid for.

    python -m tools.measure_signal --config config/tiny.py [--config.KEY=VALUE ...]

--captions  file with prompts, one per line (config.prompts.train_file); at least four
--samples   how often each is painted (16), at least two
--out       folder for the results (logs/measure_signal)

The base painter paints every caption several times, and the gradient of every sample is taken, for both objectives of
config.train.objective. An update is made of the samples of one half of the captions, as a run would make it but for
Adam's memory, and its effect foretold on the samples of the other half: to first order, a small step changes the mean
of any quantity by its covariance with <gradient of the path's log-probability, step>. That is done for many random
halves. In --out there are afterwards signal.json with all numbers and table.md, the table that is printed:
    learned from   whose gradients make the step: of the paths ("ddpo"), or of matching the pictures ("awm"), with the
                   guidance of the sampling or without; "held" = from rewards without what they pay for
                   area, see config.train.hold_foreground
    reward         correlation, within captions, of the reward and the log-probability that the step adds to a sample:
                   0 = nothing is learned, 1 = all there is to learn. One update of K nats changes the mean reward by
                   about correlation x spread x sqrt(2 K)
    area           the same of the objects' area; it should be near 0
    held-out, silhouettes   the same of the judges, see mrc/judges.py, turned so that more is better
All are means over the random halves ± the standard deviation of what halves of shuffled rewards give: a correlation is
seen if it is well outside.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from absl import flags
from ml_collections import ConfigDict

from config import cli
from config.batches import trainable_steps
from config.errors import UserError
from config.validate import check_folder, validate
from ddpo.area import log_area, without
from ddpo.chance import as_adam_scales
from ddpo.files import write_whole
from ddpo.matching import matching_transitions
from ddpo.progress import Progress
from ddpo.sampling import EVALUATION, make_generator
from ddpo.setup import set_arithmetic, start_accelerator
from ddpo.steps import draw_trained_steps
from diffusers_patch.ddim_with_logprob import gaussian_log_prob
from diffusers_patch.loading import check_cameras, load_painter, make_trainable
from diffusers_patch.policy import MultiViewPolicy
from diffusers_patch.rollout import Trajectory, rollout
from mrc.rewards import load_reward
from prompts.dataset import load_prompts

HALVES = 24  # random halves of the captions
SCALE = 2.0**16  # of losses, as a loss scaler's: in half precision gradients would underflow


def backward(loss: torch.Tensor) -> None:
    (SCALE * loss).backward()


def sample_gradients(
    policy: MultiViewPolicy,
    trajectory: Trajectory,
    weights: torch.Tensor,
    eta: float,
    guidance_scale: float,
    generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """The gradient of every sample's sum over steps of weight times log-probability: (B, P).

    weights: (num_steps,), see `draw_trained_steps`; generators: B, of the noise of matching; None = of the path."""
    scheduler = policy.scheduler
    with policy.sample_gradients(len(trajectory), guidance_scale) as gradients:
        for k, weight in enumerate(weights.tolist()):
            if weight == 0:
                continue
            step = torch.full((len(trajectory), 1), k, device=policy.device)
            if generators:
                old = matching_transitions(scheduler, trajectory, step, eta, generators)
            else:
                old = trajectory.transitions(step)
            gaussian = policy.mean_std(old.latents, old.timesteps, old.conditioning, guidance_scale, eta)
            backward(weight * gaussian_log_prob(old.next_latents, *gaussian).sum())
        return gradients.flatten() / SCALE


def paint(config: ConfigDict, captions: Sequence[str], samples: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Paint every caption `samples` times: {name: (N, ...)} in host memory.

    "caption" (N,) its number; "reward", "area" and each judge (N,), more is better; "path" (N, P) gradients of the
    log-probability of the trained steps, and "ddpo", "awm guided", "awm" (N, P) those that a run would learn from.
    Raises UserError if a gradient is not finite."""
    policy, reward_fn = load_painter(config, device), load_reward(config, device)
    make_trainable(policy, config)
    sample, found = config.sample, {}
    policy.scheduler.set_timesteps(sample.num_steps, device=device)
    learned, every = draw_trained_steps(policy.scheduler, config), torch.zeros(sample.num_steps)
    every[: trainable_steps(config)] = 1
    work = [(c, s) for s in range(samples) for c in range(len(captions))]
    parts = [work[first : first + config.train.batch_size] for first in range(0, len(work), config.train.batch_size)]
    for part in Progress("painting", len(parts), "batches").over(parts):
        prompts = [captions[c] for c, _ in part]
        generators = [make_generator(0, EVALUATION, c, s) for c, s in part]
        texts = [prompt + sample.prompt_suffix for prompt in prompts]
        steps = sample.num_steps, sample.guidance_scale, sample.eta
        trajectory = rollout(policy, texts, *steps, generators, gradient_weights=learned, backward=backward)
        of = policy, trajectory, learned, sample.eta
        result = getattr(reward_fn, "judged", reward_fn)(trajectory.views, prompts)
        columns = {
            "caption": torch.tensor([c for c, _ in part]),
            "reward": result.reward,
            "foreground": result.foreground,
            **{name: -value for name, value in result.judges.items()},
            "path": sample_gradients(policy, trajectory, every, sample.eta, sample.guidance_scale),
            "ddpo": trajectory.gradients / SCALE,
            "awm guided": sample_gradients(*of, sample.guidance_scale, generators),
            "awm": sample_gradients(*of, 1.0, generators),
        }
        for name, value in columns.items():
            found.setdefault(name, []).append(value.detach().cpu())
    found = {name: torch.cat(values) for name, values in found.items()}
    broken = [name for name in ("path", "ddpo", "awm guided", "awm") if not found[name].isfinite().all()]
    if broken:
        raise UserError(
            f"gradients ({', '.join(broken)}) are not finite with config.mixed_precision = "
            f"{config.mixed_precision!r}: set it to 'bf16' or 'no'"
        )
    area = torch.from_numpy(log_area(found.pop("foreground").numpy()))
    return {"caption": found.pop("caption"), "reward": found.pop("reward"), "area": area, **found}


def within(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """values (N, ...) minus the mean of their group; groups: (N,) integers."""
    values = values.float().clone()
    for group in groups.unique():
        values[groups == group] -= values[groups == group].mean(0)
    return values


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two vectors (N,) of mean 0; 0 if one of them is 0."""
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))


def update_step(gradients: torch.Tensor, advantages: torch.Tensor, area: torch.Tensor | None) -> torch.Tensor:
    """The direction (P,) of an update from gradients (N, P), as Adam scales it; area: (N,), None = not held."""
    step = (advantages if area is None else without(advantages, area)) @ gradients
    square = gradients.square().mean(0)
    return as_adam_scales(step, square, square.mean())


def foretell(
    found: dict[str, torch.Tensor], name: str, hold: bool, rewards: torch.Tensor, quantities: Sequence[str]
) -> dict[str, float]:
    """{quantity: mean over random halves of the correlation that a step foretells for the other half}.

    found: columns of `paint`, gradients and quantities minus the means of their captions; name: whose gradients make
    the step; rewards: (N,) what it is made for."""
    captions, results = found["caption"].unique(), {quantity: [] for quantity in quantities}
    for n in range(HALVES // 2):
        order = captions[torch.randperm(len(captions), generator=torch.Generator().manual_seed(n))]
        half = torch.isin(found["caption"], order[: len(order) // 2])
        for train, test in ((half, ~half), (~half, half)):
            area = found["area"][train] if hold else None
            added = found["path"][test] @ update_step(found[name][train], rewards[train], area)
            for quantity in quantities:
                results[quantity].append(correlation(found[quantity][test], added))
    return {quantity: sum(values) / len(values) for quantity, values in results.items()}


def signal(found: dict[str, torch.Tensor], shuffles: int = 8) -> dict[str, dict[str, tuple[float, float]]]:
    """{what is learned from: {quantity: (correlation, standard deviation of it if rewards are shuffled)}}."""
    quantities = [name for name in found if name not in ("caption", "path", "ddpo", "awm", "awm guided")]
    centred = {name: value if name == "caption" else within(value, found["caption"]) for name, value in found.items()}
    results = {}
    for name in ("ddpo", "awm guided", "awm"):
        for hold in (False, True):
            seen = foretell(centred, name, hold, centred["reward"], quantities)
            chance = []
            for n in range(shuffles):
                order = torch.randperm(len(found["caption"]), generator=torch.Generator().manual_seed(n))
                chance.append(foretell(centred, name, hold, centred["reward"][order], quantities))
            results[name + (", held" if hold else "")] = {
                quantity: (seen[quantity], float(torch.tensor([one[quantity] for one in chance]).std()))
                for quantity in quantities
            }
    return results


def table(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown: one row for each way to learn."""
    quantities = list(next(iter(results.values())))
    lines = [["learned from", *quantities], ["---"] * (len(quantities) + 1)]
    lines += [[name, *(f"{a:+.3f} ± {b:.3f}" for a, b in row.values())] for name, row in results.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def define_flags() -> None:
    flags.DEFINE_string("captions", "", "File with prompts; config.prompts.train_file if empty.")
    flags.DEFINE_integer("samples", 16, "How often each prompt is painted.", lower_bound=2)
    flags.DEFINE_string("out", "logs/measure_signal", "Folder for the results.")


def main(args) -> None:
    """args: the parsed flags."""
    config, out = args.config, Path(args.out)
    config.tracker = "none"
    check_folder("--out", out)
    set_arithmetic(config)
    device = start_accelerator(config).device
    validate(config, 1, device.type)
    check_cameras(config)
    if not config.use_lora:
        raise UserError("config.use_lora is False, but gradients of every sample are those of a LoRA: set it to True")
    captions = load_prompts(args.captions or config.prompts.train_file)
    if len(captions) < 4:
        raise UserError(f"--captions has {len(captions)} prompts: give four or more, half of them are learned from")
    found = paint(config, captions, args.samples, device)
    results = signal(found)
    spread = float(within(found["reward"], found["caption"]).std())
    about = (
        f"{len(captions)} captions x {args.samples} samples; reward {found['reward'].mean():.4f}, spread {spread:.4f}"
    )
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"reward": float(found["reward"].mean()), "spread": spread, "correlations": results}
    write_whole(out / "signal.json", json.dumps(numbers, indent=1))
    write_whole(out / "table.md", table(results))
    print(f"{table(results)}\n\n{about}\nwrote {out / 'signal.json'}")


if __name__ == "__main__":
    cli.run("measure_signal", main, "config/tiny.py", define_flags)
