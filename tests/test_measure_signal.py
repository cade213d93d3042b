"""What one update could learn is foretold from gradients of every sample."""

import json

import pytest
import torch

from config import base
from config.errors import UserError
from ddpo.matching import matching_transitions
from ddpo.steps import draw_trained_steps
from diffusers_patch.ddim_with_logprob import ddim_mean_std, gaussian_log_prob
from diffusers_patch.rollout import rollout
from tests import children
from tests.test_matching import PROMPTS, STEPS, configuration, flat, generators
from tests.test_matching import policy as policy  # a fixture
from tests.tiny_models import flags, make_world, settings
from tools import measure_signal
from tools.measure_signal import correlation, sample_gradients, signal, table, update_step, within


def planted(strength, grown=0.0, captions=20, samples=16, size=40):
    """Samples whose path gradients foretell `strength` of their reward, which grows with their area by `grown`."""
    generator = torch.Generator().manual_seed(0)
    count = captions * samples
    path, direction = torch.randn(count, size, generator=generator), torch.randn(size, generator=generator)
    growth = torch.randn(size, generator=generator)
    noise = torch.randn(2, count, generator=generator)
    area = path @ growth / growth.norm() + 0.1 * noise[0]
    foretold = path @ direction / direction.norm()
    caption = torch.arange(captions).repeat(samples)
    reward = strength * foretold + grown * area + (1 - strength**2) ** 0.5 * noise[1] + caption
    columns = {"caption": caption, "reward": reward, "area": area, "path": path}
    return columns | {name: path + 0.1 for name in ("ddpo", "awm guided", "awm")}


def test_a_planted_signal_is_seen_and_no_other():
    seen, chance = signal(planted(0.7))["ddpo"]["reward"]
    assert 0.4 < seen < 0.75 and seen > 5 * chance
    nothing, chance = signal(planted(0.0))["ddpo"]["reward"]
    assert abs(nothing) < 3 * chance < 0.3


def test_growth_is_seen_and_can_be_held():
    results = signal(planted(0.5, grown=1.0))
    assert results["ddpo"]["area"][0] > 0.5
    assert abs(results["ddpo, held"]["area"][0]) < 0.2 and results["ddpo, held"]["reward"][0] > 0.15


def test_values_are_taken_within_captions():
    groups = torch.tensor([0, 1, 0, 1])
    assert within(torch.tensor([1.0, 10.0, 3.0, 30.0]), groups).tolist() == [-1, -10, 1, 10]
    assert correlation(torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])) == pytest.approx(1)
    assert correlation(torch.zeros(2), torch.ones(2)) == 0


def test_a_step_is_scaled_as_adam_scales_it():
    """A weight whose gradients are a hundred times larger moves as far."""
    gradients = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(50, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1.0, 1.0, 0.1, 1.0])
    plain, scaled = (update_step(gradients * by, advantages, None) for by in (torch.ones(4), scale))
    torch.testing.assert_close(plain, scaled, rtol=0.1, atol=0)


def test_gradients_of_paths_are_those_taken_while_painting(policy):
    config = configuration(objective="ddpo", timestep_weighting="noise", skip_last_steps=1)
    weights = draw_trained_steps(policy.scheduler, config)
    trajectory = rollout(policy, PROMPTS, STEPS, 3.0, 1.0, generators(), gradient_weights=weights)
    found = sample_gradients(policy, trajectory, weights, 1.0, 3.0)
    assert (found - trajectory.gradients).norm() < 1e-4 * found.norm()


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_gradients_of_matching_are_autograd_s(policy, scale):
    weights = draw_trained_steps(policy.scheduler, configuration(skip_last_steps=1))
    trajectory = rollout(policy, PROMPTS, STEPS, 3.0, 1.0, generators())
    found = sample_gradients(policy, trajectory, weights, 1.0, scale, generators())
    drawn, log_probs = generators(), 0
    for k in range(STEPS - 1):
        steps = torch.full((len(PROMPTS), 1), k)
        old = matching_transitions(policy.scheduler, trajectory, steps, 1.0, drawn)
        output = policy.predict(old.latents, old.timesteps, old.conditioning, scale)
        mean, std = ddim_mean_std(policy.scheduler, output, old.timesteps, old.latents, 1.0)
        log_probs = log_probs + weights[k] * gaussian_log_prob(old.next_latents, mean, std)
    for log_prob, gradient in zip(log_probs, found, strict=True):
        wanted = flat(torch.autograd.grad(log_prob, policy.trainable_parameters(), retain_graph=True))
        assert wanted.norm() > 0 and (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_gradients_do_not_underflow_in_half_precision(policy, monkeypatch):
    """Losses as small as those of a large latent are scaled up for the backward pass alone."""
    config = configuration(objective="ddpo", skip_last_steps=1)
    weights = draw_trained_steps(policy.scheduler, config)
    trajectory = rollout(policy, PROMPTS, STEPS, 3.0, 1.0, generators())
    wanted = sample_gradients(policy, trajectory, weights, 1.0, 3.0)
    seen = []

    def backward(loss):
        seen.append(loss.item())
        torch.autograd.backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    found = sample_gradients(policy, trajectory, weights, 1.0, 3.0)
    monkeypatch.setattr(measure_signal, "SCALE", 1.0)
    sample_gradients(policy, trajectory, weights, 1.0, 3.0)
    steps = len(seen) // 2
    assert seen[:steps] == pytest.approx([65536 * loss for loss in seen[steps:]]) and torch.equal(found, wanted)


def test_gradients_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(settings(world, tmp_path, sample__num_steps=2))
    monkeypatch.setattr(measure_signal, "SCALE", float("inf"))
    with pytest.raises(UserError, match="gradients .path, ddpo, awm guided, awm. are not finite .* set it to 'bf16'"):
        measure_signal.paint(config, PROMPTS, 1, torch.device("cpu"))


def test_the_command(tmp_path):
    """On a random painter, which it does not train: every number is there, and finite."""
    world = make_world(tmp_path)
    line = ["--config=config/base.py", *flags(world, tmp_path, sample__num_steps=2), "--samples=2"]
    line += [f"--captions={world / 'train.txt'}", f"--out={tmp_path / 'out'}"]
    done = children.command("tools.measure_signal", line, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/signal.json").read_text())
    assert set(found["correlations"]) == {
        name + held for name in ("ddpo", "awm guided", "awm") for held in ("", ", held")
    }
    assert set(found["correlations"]["awm"]) == {"reward", "area", "silhouettes", "held_out"}
    assert all(-1 <= a <= 1 for row in found["correlations"].values() for a, _ in row.values())
    assert (tmp_path / "out/table.md").read_text().strip() == table(found["correlations"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["signal.json", "table.md"]


def test_too_few_captions_are_refused(tmp_path):
    world = make_world(tmp_path)
    line = ["--config=config/base.py", *flags(world, tmp_path), f"--captions={world / 'test.txt'}"]
    done = children.command("tools.measure_signal", line, tmp_path)
    assert done.returncode == 2 and "--captions has 1 prompts: give four or more" in done.stderr
