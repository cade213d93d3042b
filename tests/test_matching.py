"""Advantage-weighted matching."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from config import base
from config.errors import UserError
from config.validate import validate
from ddpo.matching import matching_transitions
from ddpo.setup import make_optimizer
from ddpo.update import micro_batch_losses, update
from diffusers_patch.ddim_with_logprob import ddim_mean_std, ddim_std, gaussian_log_prob
from diffusers_patch.rollout import rollout
from tests import children
from tests.test_training import metrics
from tests.tiny_models import FEW_FILES, GOLDEN_CONFIG, golden_policy, make_world, settings

PROMPTS = GOLDEN_CONFIG["prompts"]
STEPS = 4


@pytest.fixture(scope="module")
def policy():
    policy = golden_policy()
    policy.add_lora(rank=2)
    torch.manual_seed(0)
    for layer in policy._lora_layers:  # a LoRA of zeros would have no gradient in its first factor
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    policy.scheduler.set_timesteps(STEPS)
    return policy


@pytest.fixture(scope="module")
def trajectory(policy):
    with torch.no_grad():
        return rollout(policy, PROMPTS, STEPS, 3.0, 1.0, generators())


def generators():
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def noise_generator():
    return torch.Generator().manual_seed(1)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def configuration(**train):
    config = base.get_config()
    config.sample.num_steps, config.sample.guidance_scale, config.train.objective = STEPS, 3.0, "awm"
    config.train.update(train)
    return config


def use_scheduler(policy, kind, monkeypatch):
    scheduler = DDIMScheduler.from_config(policy.scheduler.config, prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    monkeypatch.setattr(policy, "scheduler", scheduler)
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_step_is_that_of_a_model_which_knows_the_picture(policy, trajectory, kind, monkeypatch):
    scheduler = use_scheduler(policy, kind, monkeypatch)
    steps = torch.tensor([[0, 2], [1, 1]])
    found = matching_transitions(scheduler, trajectory.take(torch.tensor([0, 1])), steps, 1.0, noise_generator())
    old = trajectory.take(torch.tensor([0, 1])).transitions(steps)
    assert torch.equal(found.timesteps, old.timesteps)
    assert all(torch.equal(found.conditioning[name], value) for name, value in old.conditioning.items())
    noise = torch.randn(found.latents.shape, generator=noise_generator())
    picture = trajectory.latents[[0, 0, 1, 1], -1]
    a_t, a_prev = (scheduler.alphas_cumprod[found.timesteps - t].view(-1, 1, 1, 1) for t in (0, 1000 // STEPS))
    std = ddim_std(scheduler, found.timesteps, 1.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(found.latents, a_t.sqrt() * picture + (1 - a_t).sqrt() * noise)
    wanted = a_prev.sqrt() * picture + (1 - a_prev - std**2).sqrt() * noise
    torch.testing.assert_close(found.next_latents, wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("cfg", [True, False])
def test_the_loss_is_how_wrongly_the_picture_is_foretold(policy, trajectory, cfg):
    """For each sample and step, times the advantage; with the guidance of the sampling, or none."""
    config = configuration(cfg=cfg, timesteps_per_forward=2)
    advantages, steps = torch.tensor([1.5, -0.5]), torch.tensor([[2, 0, 1], [1, 0, 2]])
    trajectory = trajectory.take(torch.tensor([0, 1]))
    parameters = policy.trainable_parameters()
    losses = micro_batch_losses(policy, trajectory, advantages, steps, config, noise_generator())
    found = flat(torch.autograd.grad(sum(loss for loss, _ in losses), parameters))
    generator, total = noise_generator(), 0
    for part in (steps[:, :2], steps[:, 2:]):
        old = matching_transitions(policy.scheduler, trajectory, part, 1.0, generator)
        output = policy.predict(old.latents, old.timesteps, old.conditioning, 3.0 if cfg else 1.0)
        mean, std = ddim_mean_std(policy.scheduler, output, old.timesteps, old.latents, 1.0)
        error = ((old.next_latents - mean) ** 2 / (2 * std**2)).flatten(1).mean(1)
        total = total + (advantages.repeat_interleave(part.shape[1]) * error).sum() / 2
    wanted = flat(torch.autograd.grad(total, parameters))
    assert wanted.norm() > 0 and (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("inner", [1, 2])
def test_learning_from_a_picture_makes_it_easier_to_foretell(policy, trajectory, inner):
    """With a positive advantage of one sample its log p_t rises, and falls with a negative one."""
    config = configuration(learning_rate=1e-3, batch_size=len(PROMPTS), num_inner_epochs=inner)
    config.train.gradient_accumulation_steps = 1
    state, accelerator = {k: v.clone() for k, v in policy.trainable_state().items()}, Accelerator(cpu=True)

    @torch.no_grad()
    def log_prob():
        old = matching_transitions(
            policy.scheduler, trajectory.take(torch.tensor([0])), torch.tensor([[1]]), 1.0, noise_generator()
        )
        output = policy.predict(old.latents, old.timesteps, old.conditioning, 3.0)
        mean, std = ddim_mean_std(policy.scheduler, output, old.timesteps, old.latents, 1.0)
        return float(gaussian_log_prob(old.next_latents, mean, std))

    before = log_prob()
    for sign in (1, -1):
        optimizer = accelerator.prepare(make_optimizer(policy, config))
        advantages = sign * torch.eye(len(PROMPTS))[0]
        update(policy, optimizer, accelerator, trajectory, advantages, config, noise_generator())
        assert sign * (log_prob() - before) > 0
        policy.load_trainable_state(state)


def test_a_kl_in_the_loss_needs_the_closed_form(tmp_path):
    config = base.get_config()
    changes = {"train.objective": "awm", "kl_in_reward": False}
    with config.unlocked():
        config.update_from_flattened_dict(settings(make_world(tmp_path), tmp_path) | changes)
    with pytest.raises(UserError, match=r"config\.kl_estimator is 'log_ratio'.* set kl_estimator to 'analytic'"):
        validate(config, 1, "cpu")


def test_a_run(tmp_path):
    """The real script, with renders of another size than the views."""
    values = settings(make_world(tmp_path), tmp_path, train__objective="awm", **FEW_FILES)
    values |= {"train.cfg": False, "recon.render_size": 48, "kl_in_reward": False, "kl_estimator": "analytic"}
    assert children.run(children.train, values) == 0
    updates = metrics(tmp_path / "run", "update")
    assert len(updates) == 2 and all(line["grad_norm"] > 0 for line in updates)
    assert updates[0]["kl"] == 0 and updates[1]["kl"] > 0
