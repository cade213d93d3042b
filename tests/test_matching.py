"""Advantage-weighted matching."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from config import base
from config.errors import UserError
from config.validate import validate
from ddpo.matching import matching_gradients, matching_log_prob
from ddpo.setup import make_optimizer
from ddpo.steps import draw_trained_steps
from ddpo.update import update_from_gradients
from diffusers_patch.ddim_with_logprob import _predict_x0_and_noise, ddim_std, matching_output
from diffusers_patch.rollout import draw_noise, rollout
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
def test_whoever_knew_the_picture_would_foretell_it(policy, kind, monkeypatch):
    scheduler = use_scheduler(policy, kind, monkeypatch)
    picture, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([751, 251])
    known = matching_output(scheduler, picture, noise, t)
    x_t, a_t = scheduler.add_noise(picture, noise, t), scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    for found, wanted in zip(_predict_x0_and_noise(kind, known, x_t, a_t), (picture, noise), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    monkeypatch.setattr(policy, "predict", lambda *_: known)
    assert (matching_log_prob(policy, picture, t, noise, {}, 1.0, 1.0) == 0).all()


def test_the_log_probability_is_the_error_of_the_foretold_picture(policy, monkeypatch):
    """A picture foretold wrongly by delta moves the mean of the DDIM step by a known share of delta."""
    scheduler, delta = use_scheduler(policy, "sample", monkeypatch), 0.3
    picture, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([751])
    monkeypatch.setattr(policy, "predict", lambda *_: picture + delta)
    found = matching_log_prob(policy, picture, t, noise, {}, 1.0, 1.0)
    a_t, a_prev, std = scheduler.alphas_cumprod[751], scheduler.alphas_cumprod[501], ddim_std(scheduler, t, 1.0)
    share = a_prev.sqrt() - (1 - a_prev - std**2).sqrt() * (a_t / (1 - a_t)).sqrt()
    torch.testing.assert_close(found, -((share * delta) ** 2) / (2 * std**2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("cfg", [True, False])
def test_gradients_of_every_sample_are_autograd_s(policy, trajectory, cfg):
    config = configuration(cfg=cfg, timestep_weighting="noise", skip_last_steps=1)
    weights = draw_trained_steps(policy.scheduler, config)
    found = matching_gradients(policy, trajectory, weights, generators(), config, torch.Tensor.backward)
    picture = trajectory.latents[:, -1]
    noises = draw_noise(STEPS - 1, picture, generators())
    parameters = policy.trainable_parameters()
    for n in range(len(PROMPTS)):
        log_probs = [
            weights[k]
            * matching_log_prob(
                policy,
                picture[n : n + 1],
                policy.scheduler.timesteps[k : k + 1],
                noises[k, n : n + 1],
                {name: value[n : n + 1] for name, value in trajectory.conditioning.items()},
                1.0,
                3.0 if cfg else 1.0,
            )
            for k in range(STEPS - 1)
        ]
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(torch.cat(log_probs).sum(), parameters)])
        assert wanted.norm() > 0
        assert (found[n] - wanted).norm() < 1e-4 * wanted.norm()


def test_learning_from_a_picture_makes_it_easier_to_foretell(policy, trajectory):
    """One step with a positive advantage for one sample: its log p_t rises, and falls with a negative one."""
    config = configuration(learning_rate=1e-3)
    weights, noise = draw_trained_steps(policy.scheduler, config), torch.Generator()
    picture, state = trajectory.latents[:1, -1], {k: v.clone() for k, v in policy.trainable_state().items()}
    gradients = matching_gradients(policy, trajectory, weights, generators(), config, torch.Tensor.backward)

    def log_prob():
        noise.manual_seed(1)
        eps = torch.randn(picture.shape, generator=noise)
        conditioning = {name: value[:1] for name, value in trajectory.conditioning.items()}
        with torch.no_grad():
            return float(matching_log_prob(policy, picture, torch.tensor([501]), eps, conditioning, 1.0, 3.0))

    before, accelerator = log_prob(), Accelerator(cpu=True)
    for sign in (1, -1):
        optimizer = make_optimizer(policy, config)
        advantages = sign * torch.eye(len(PROMPTS))[0]
        update_from_gradients(policy, accelerator.prepare(optimizer), accelerator, gradients, advantages, config)
        assert sign * (log_prob() - before) > 0
        policy.load_trainable_state(state)


def test_it_is_refused_without_the_gradients_of_every_sample(tmp_path):
    world = make_world(tmp_path)
    for change in ({"train.gradients_while_painting": False}, {"train.total_batch_size": 4}, {"use_lora": False}):
        config = base.get_config()
        with config.unlocked():
            config.update_from_flattened_dict(settings(world, tmp_path) | {"train.objective": "awm"} | change)
        with pytest.raises(UserError, match=r"config\.train\.objective is .*gradients of every sample"):
            validate(config, 1, "cpu")


def test_a_run(tmp_path):
    """The real script, with renders of another size than the views."""
    values = settings(make_world(tmp_path), tmp_path, train__objective="awm", **FEW_FILES)
    assert children.run(children.train, values | {"train.cfg": False, "recon.render_size": 48}) == 0
    updates = metrics(tmp_path / "run", "update")
    assert len(updates) == 2 and all(line["grad_norm"] > 0 for line in updates)
