"""A critic of states on the way to a picture, and what a painter learns from it."""

import json

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.loading import load_painter, make_trainable
from diffusers_patch.rollout import rollout
from tests import children
from tests.test_exact_gradient import PAINTERS, configuration
from tests.test_training import metrics
from tests.tiny_models import PROMPTS, make_mvdream, settings
from tiny.critic import ASKED, Critic, critic_gradients, fit


@pytest.mark.parametrize("painter", list(PAINTERS))
def test_gradients_are_those_of_what_the_next_state_is_worth(world, tmp_path, painter):
    """With the noise that was drawn, over the trained steps."""
    config = configuration(world, tmp_path, painter, lora__targets="attention+conv", train__skip_last_steps=1)
    policy = load_painter(config, "cpu")
    critic = Critic(policy).eval().requires_grad_(False)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head[-1].weight)
    make_trainable(policy, config)
    weights = parameters_to_vector(policy.trainable_parameters()).detach()
    weights = weights + 0.1 * torch.randn(len(weights), generator=torch.Generator().manual_seed(0))
    vector_to_parameters(weights, policy.trainable_parameters())
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    steps, scale = config.sample.num_steps, config.sample.guidance_scale
    chains = rollout(policy, PROMPTS[:2], steps, scale, 1.0, generators)
    found = critic_gradients(critic, policy, chains, config)

    total = 0
    for k in range(steps - 1):
        x, t = chains.latents[:, k], chains.timesteps[:, k]
        mean, std = ddim_mean_std(policy.scheduler, policy.predict(x, t, chains.conditioning, scale), t, x, 1.0)
        noise = ((chains.latents[:, k + 1] - mean) / std).detach()
        total = total + critic(mean + std * noise, chains.timesteps[:, k + 1], chains.conditioning).sum(0)
    for n in range(2):
        wanted = parameters_to_vector(torch.autograd.grad(total[n], policy.trainable_parameters(), retain_graph=True))
        assert wanted.norm() > 0 and (found[n] - wanted).norm() < 1e-4 * wanted.norm()


def test_a_critic_foretells_what_can_be_seen(world, tmp_path, capsys):
    """A reward that is the contrast of the latents, whatever the prompt: of unseen prompts, too, and the earlier the
    state the worse. Of shuffled rewards nothing."""
    generator, found = torch.Generator().manual_seed(0), {}
    for shuffled in (False, True):
        config = configuration(world, tmp_path, "mv_sdxl", shuffle_advantages=shuffled)
        prompts = [f"{name} {number}" for number in range(3) for name in PROMPTS]
        shape = load_painter(config, "cpu").latent_shape
        contrast = torch.rand(len(prompts), 24, generator=generator) + 0.5
        latents = contrast.view(*contrast.shape, *[1] * len(shape)) * torch.randn(
            len(prompts), 24, *shape, generator=generator
        )
        fit(config, {"latents": latents.half(), "reward": contrast, "area": -contrast}, prompts, 150, "cpu")
        lines = capsys.readouterr().out.splitlines()
        found[shuffled] = [float(line.rsplit(" ", 1)[1]) for line in lines if "correlation" in line]
    chance = (ASKED * len(prompts) / 8) ** -0.5
    assert len(found[False]) == 3 and found[False][2] > 0.5 and found[False][0] < found[False][2]
    assert all(abs(value) < 3 * chance for value in found[True])


def test_the_command(world, tmp_path):
    """Painted samples and critic are kept, and used again; the painter moves."""
    values = settings(world, tmp_path, **PAINTERS["mvdream"], pretrained__model=str(make_mvdream(world) / "mvdream"))
    values |= {"num_epochs": 2, "sample.num_steps": 2, "train.kl_per_update": 0.01, "train.kl_calibration_updates": 1}
    line = ["--config=config/base.py", *(f"--config.{key}={value}" for key, value in values.items())]
    line += ["--samples=3", "--steps=2", f"--critic={tmp_path / 'critic'}"]
    assert children.command("tiny.critic", line, tmp_path).returncode == 0
    assert {file.name for file in (tmp_path / "critic").iterdir()} == {"samples.safetensors", "critic.safetensors"}
    assert {"reward", "silhouettes"} <= set(json.loads((tmp_path / "run/ascent.json").read_text()))
    assert all(update["kl_of_update"] > 0 for update in metrics(tmp_path / "run", "update")[:1])
    again = children.command("tiny.critic", [*line, "--config.run_name=again"], tmp_path)
    assert again.returncode == 0 and "correlation" not in again.stdout
    assert (
        metrics(tmp_path / "again", "validation")[-1]["rewards"]
        == metrics(tmp_path / "run", "validation")[-1]["rewards"]
    )
    other = children.command(
        "tiny.critic", [*line, "--config.run_name=other", "--config.prompts.num_train=3"], tmp_path
    )
    assert other.returncode == 2 and "has samples of 4 prompts" in other.stderr
