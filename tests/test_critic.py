"""A critic of states on the way to a picture, and what a painter learns from it."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.loading import load_painter, make_trainable
from diffusers_patch.rollout import Trajectory
from tests import children
from tests.test_exact_gradient import PAINTERS, command_line, configuration
from tests.test_training import metrics
from tests.tiny_models import PROMPTS
from tiny.critic import AREA_WEIGHT, Critic, CriticRun, Memory, Trust, paint_towards_worth, turned


def a_critic_and_its_painter(config):
    """A critic that says something, and a LoRA that has a gradient in all its weights."""
    policy = load_painter(config, "cpu")
    judge = Critic(policy).eval().requires_grad_(False)
    torch.manual_seed(0)
    torch.nn.init.normal_(judge.head[-1].weight)
    make_trainable(policy, config)
    weights = parameters_to_vector(policy.trainable_parameters()).detach()
    weights = weights + 0.1 * torch.randn(len(weights), generator=torch.Generator().manual_seed(0))
    vector_to_parameters(weights, policy.trainable_parameters())
    return judge, policy


def gradients(policy, judge, config, trust, kl_weight=0.0):
    """What an update follows, for two samples, and the numbers that it says."""
    for parameter in policy.trainable_parameters():
        parameter.grad = None
    noise, conditioning = torch.Generator().manual_seed(3), policy.encode(PROMPTS[:2])
    numbers = paint_towards_worth(judge, trust, kl_weight, policy, conditioning, config, noise)
    return parameters_to_vector([parameter.grad for parameter in policy.trainable_parameters()]), numbers


@pytest.mark.parametrize("painter", list(PAINTERS))
def test_gradients_are_those_of_what_the_next_state_is_worth(world, tmp_path, painter):
    """Over the trained steps, at the states that the steps before led to."""
    config = configuration(world, tmp_path, painter, lora__targets="attention+conv", train__skip_last_steps=1)
    judge, policy = a_critic_and_its_painter(config)
    steps, scale = config.sample.num_steps, config.sample.guidance_scale
    trust = torch.rand(steps - 1)
    found, numbers = gradients(policy, judge, config, trust, kl_weight=0.3)

    noise, conditioning = torch.Generator().manual_seed(3), policy.encode(PROMPTS[:2])
    times, x, total, kl = policy.scheduler.timesteps, policy.initial_latents(2, noise), 0.0, 0.0
    for k in range(steps - 1):
        t = times[k].expand(2)
        one, base = (policy.predict(x, t, conditioning, scale, reference=base) for base in (False, True))
        mean, std = ddim_mean_std(policy.scheduler, one, t, x, 1.0)
        usual = Normal(ddim_mean_std(policy.scheduler, base, t, x, 1.0)[0].detach(), std)
        reached = mean + std * torch.randn(x.shape, generator=noise)
        total = total + trust[k] * judge(reached, times[k + 1].expand(2), conditioning)[:, 0].mean()
        kl = kl + kl_divergence(Normal(mean, std), usual).sum() / 2
        x = reached.detach()
    wanted = -parameters_to_vector(torch.autograd.grad(total - 0.3 * kl, policy.trainable_parameters()))
    assert wanted.norm() > 0 and (found - wanted).norm() < 1e-4 * wanted.norm()
    assert numbers == pytest.approx({"loss": float((0.3 * kl - total).detach()), "kl": float(kl.detach())}, rel=1e-4)


@pytest.mark.parametrize("hold", [True, False])
def test_a_reward_for_area_alone_is_none_where_area_is_held(world, tmp_path, monkeypatch, hold):
    """Of every sample by itself."""
    config = configuration(world, tmp_path, "mvdream", train__skip_last_steps=1, train__hold_foreground=hold)
    judge, policy = a_critic_and_its_painter(config)
    monkeypatch.setattr("tiny.critic.AREA_WEIGHT", 0.0)

    def one_wants_it_larger_and_the_other_smaller(*state):
        area = judge(*state)[:, 1]
        return torch.stack([area * torch.tensor([3.0, -1.0]), area], 1)

    trust = torch.ones(config.sample.num_steps - 1)
    found, _ = gradients(policy, one_wants_it_larger_and_the_other_smaller, config, trust)
    plain, _ = gradients(policy, judge, config, trust)
    assert plain.norm() > 0 and bool(found.norm() > 1e-3 * plain.norm()) is not hold


def test_objects_are_pulled_to_their_usual_area(world, tmp_path):
    """By the gradient of the square of what they differ by, of every sample, whatever the critic's word is worth."""
    config = configuration(world, tmp_path, "mvdream", train__hold_foreground=True)
    config.train.skip_last_steps = config.sample.num_steps - 1
    judge, policy = a_critic_and_its_painter(config)
    found, numbers = gradients(policy, judge, config, torch.zeros(1))

    noise, conditioning = torch.Generator().manual_seed(3), policy.encode(PROMPTS[:2])
    x, times = policy.initial_latents(2, noise), policy.scheduler.timesteps
    step = x, times[0].expand(2), conditioning, config.sample.guidance_scale, config.sample.eta
    mean, std = policy.mean_std(*step)
    reached = mean + std * torch.randn(x.shape, generator=noise)
    loss = AREA_WEIGHT / 2 * judge(reached, times[1].expand(2), conditioning)[:, 1].square().mean()
    wanted = parameters_to_vector(torch.autograd.grad(loss, policy.trainable_parameters()))
    assert wanted.norm() > 0 and (found - wanted).norm() < 1e-4 * wanted.norm()
    assert numbers["loss"] == pytest.approx(float(loss.detach()))


def test_turned_objects_keep_their_views_in_order():
    x = torch.arange(4.0).repeat(50, 1)[:, :, None, None, None] + 10 * torch.arange(50.0)[:, None, None, None, None]
    found = turned(x.expand(-1, -1, 2, 3, 3), torch.Generator().manual_seed(0))[..., 0, 0, 0]
    steps = (found.roll(-1, 1) - found) % 4
    assert found.shape == (50, 4) and bool((steps == 1).all()) and len(found[:, 0].remainder(10).unique()) == 4
    assert torch.equal((found / 10).floor()[:, 0], torch.arange(50.0))
    grids = torch.rand(3, 4, 8, 8)
    assert torch.equal(turned(grids, torch.Generator()), grids)


def chains_to(policy, finished, num_steps):
    """Chains that lead to finished latents (B, ...): those noised, with one noise."""
    policy.scheduler.set_timesteps(num_steps)
    times = policy.scheduler.timesteps
    noise = torch.randn(finished.shape, generator=torch.Generator().manual_seed(1))
    noised = [policy.scheduler.add_noise(finished, noise, times[k].expand(len(finished))) for k in range(num_steps)]
    conditioning = policy.encode([PROMPTS[i % 2] for i in range(len(finished))])
    latents = torch.stack([*noised, finished], 1)
    empty = dict.fromkeys(("log_probs", "log_probs_reference", "kl_analytic", "views"))
    return Trajectory(latents, times.repeat(len(finished), 1), conditioning=conditioning, **empty)


@pytest.mark.parametrize("painter", list(PAINTERS))
def test_a_critic_foretells_what_no_place_shows_alone(world, tmp_path, painter):
    """Whether two halves of the latents, each of either sign, have the same: of new samples, the better the later."""
    config = configuration(world, tmp_path, painter, train__skip_last_steps=0)
    run = CriticRun(config, first_steps=100, steps=5, updates=1, kl_weight=0.0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for count, steps in ((400, 100), (200, 0)):
        x = torch.randn(count, *run.policy.latent_shape, generator=generator)
        signs = torch.randint(0, 2, (2, count), generator=generator) * 2.0 - 1
        one, other = x.flatten(1).split(x[0].numel() // 2, 1)
        x = torch.cat([one.abs() * signs[0, :, None], other.abs() * signs[1, :, None]], 1).view_as(x)
        chains, truth = chains_to(run.policy, x, config.sample.num_steps), signs.prod(0)
        said = run.foretold(chains)
        found.append(Trust(said.shape[1]).observe(said, truth))
        run.memory.add(chains, torch.stack([truth, -truth], 1))
        if steps:
            run.learn(0, steps)
    known = [found[1][f"foretold_{k + 1}"] for k in range(config.sample.num_steps)]
    assert max(map(abs, found[0].values())) < 1e-6  # it starts with a last layer of zeros
    assert known[-1] > 0.8 and known[0] < known[-1]


def test_trust_is_the_slope_of_new_samples():
    """Over all epochs, each around its own mean, less two standard errors; none for a critic that is wrong."""
    generator = torch.Generator().manual_seed(0)
    trust, said, rewards = Trust(3), [], []
    for epoch in range(4):
        word = torch.randn(50, 3, generator=generator, dtype=torch.float64)
        reward = word @ torch.tensor([0.8, 2.5, -1.0], dtype=torch.float64) + epoch
        found = trust.observe(word, reward)
        both = torch.cat([word.T, reward[None]])
        assert list(found.values())[:3] == pytest.approx(torch.corrcoef(both)[3, :3].tolist())
        said.append(word - word.mean(0)), rewards.append(reward - reward.mean())
    x, y, wanted = torch.cat(said), torch.cat(rewards), []
    for k in range(3):
        slope = torch.linalg.lstsq(x[:, k, None], y[:, None]).solution.squeeze()
        error = ((y - slope * x[:, k]).square().sum() / (4 * 49 - 1) / x[:, k].square().sum()).sqrt()
        wanted.append(float((slope - 2 * error).clamp(0, 1)))
    assert 0 < wanted[0] < 1 and wanted[1:] == [1, 0]
    assert trust().tolist() == pytest.approx(wanted)


def test_chance_is_not_trusted():
    """The slopes of words that say nothing, and hardly differ, are large."""
    generator = torch.Generator().manual_seed(0)
    trust = Trust(1000)
    trust.observe(0.1 * torch.randn(64, 1000, generator=generator), torch.randn(64, generator=generator))
    assert (trust.together / trust.alone > 0.5).float().mean() > 0.3
    assert (trust() > 0).float().mean() < 0.05 and Trust(1)() == 0


def samples_of(run, prompts, reward, area):
    """What an epoch painted, with these rewards and areas (N,)."""
    samples = run.paint(run.reward_fn, prompts, 0)
    return replace(samples, reward=torch.tensor(reward), foreground=torch.tensor(area).exp()[:, None].expand(-1, 4))


OF = ["a", "a", "b", "b"], torch.arange(4)  # prompts of four samples, and which of them are good


@pytest.fixture
def run(world, tmp_path):
    """Of a critic that learns next to nothing."""
    return CriticRun(configuration(world, tmp_path, "mvdream"), first_steps=1, steps=1, updates=1, kl_weight=0.0)


def test_the_same_picture_is_worth_the_same_later_on(run):
    """What the first epoch's samples of a prompt were is the measure."""
    prompts = PROMPTS[:4]
    first = run.truth(0, samples_of(run, prompts, [-0.3, -0.1, -0.6, -0.4], [-2.0, -1.0, -1.0, 0.0]), *OF)
    torch.testing.assert_close(first, torch.tensor([[-1.0, -1.0], [1, 1], [-1, -1], [1, 1]]) * 0.75**0.5)
    later = run.truth(1, samples_of(run, prompts, [-0.1, 0.1, -0.4, -0.4], [-1.0, -1.0, -1.0, -1.0]), *OF)
    torch.testing.assert_close(later, torch.tensor([[1.0, 1.0], [3, 1], [1, -1], [1, -1]]) * 0.75**0.5)


def test_shuffled_rewards_say_nothing_of_their_samples(run):
    values = [0.1, 0.2, 0.3, 0.4], [-1.0, -2.0, -3.0, -4.0]
    run.truth(0, samples_of(run, PROMPTS[:4], *values), *OF)
    better = [0.3, 0.6, 0.7, 0.5], values[1]
    plain = run.truth(1, samples_of(run, PROMPTS[:4], *better), *OF)
    run.config.shuffle_advantages = True
    shuffled = run.truth(1, samples_of(run, PROMPTS[:4], *better), *OF)
    assert torch.equal(plain[:, 1], shuffled[:, 1])
    wanted = plain[:, 0] - plain[:, 0].mean()  # nor of their epoch, by which one would tell the painter from the base
    assert wanted.abs().max() > 0.1 and not torch.allclose(wanted, shuffled[:, 0])
    torch.testing.assert_close(wanted.sort()[0], shuffled[:, 0].sort()[0])


def test_a_critic_keeps_up_with_its_painter(run):
    """Half of what it learns from is what was painted since."""
    memory, generator = Memory(), torch.Generator().manual_seed(0)
    samples = samples_of(run, PROMPTS[:4], [-0.3, -0.1, -0.6, -0.4], [-2.0, -1.0, -1.0, 0.0])
    for later, share in ((False, 0), (True, 0.5 + 0.5 / 5)):
        memory.add(samples.trajectory.take([0] if later else [0, 1, 2, 3]), torch.zeros(1 if later else 4, 2))
        drawn = memory.draw(4000, generator)
        assert drawn.min() == 0 and len(drawn) == 4000
        assert float((drawn >= 4).float().mean()) == pytest.approx(share, abs=0.03)


def test_nothing_is_learned_from_bad_samples_and_nothing_forgotten(run):
    samples = samples_of(run, PROMPTS[:4], [-0.3, -0.1, float("nan"), -0.4], [-2.0, -1.0, float("nan"), -1.5])
    for _ in range(2):
        assert run.update(0, samples, OF[0]) == []
    latents, conditioning, truth = run.memory.samples()
    assert torch.equal(latents, samples.trajectory.latents[[0, 1, 3, 0, 1, 3], -1]) and truth.isfinite().all()
    for name, value in conditioning.items():
        assert torch.equal(value, samples.trajectory.conditioning[name][[0, 1, 3, 0, 1, 3]])


def test_a_prompt_whose_first_samples_are_all_bad_is_left_out(run):
    bad = float("nan")
    run.update(0, samples_of(run, PROMPTS[:4], [bad, bad, -0.2, -0.4], [bad, bad, -2.0, -1.5]), OF[0])
    (statistics,) = run.update(
        1, samples_of(run, PROMPTS[:4], [-0.3, -0.1, -0.2, -0.4], [-2.0, -1.0, -2.0, -1.5]), OF[0]
    )
    assert len(run.memory.samples()[2]) == 4 and statistics["grad_norm"] > 0


def test_the_command(world, tmp_path):
    """Critic and painter learn, and the run repeats itself."""
    changes = dict(
        num_epochs=3, per_prompt_stat_tracking__min_count=2, sample__num_steps=2, train__hold_foreground=True
    )
    line = command_line(world, tmp_path, **changes)
    line += ["--first_steps=3", "--steps=2", "--updates=2"]
    done = children.command("tiny.critic", line, tmp_path)
    assert done.returncode == 0, done.stderr
    updates = metrics(tmp_path / "run", "update")
    assert [update["epoch"] for update in updates] == [1, 1, 2, 2]
    assert updates[0]["kl"] == 0 < updates[1]["kl"] and all(update["critic_loss"] > 0 for update in updates)
    rates = [update["learning_rate"] / updates[0]["learning_rate"] for update in updates]
    assert rates == pytest.approx([1.0, 1.5, 1.5, 1.0])  # it rises, and falls to nothing
    again = children.command("tiny.critic", [*line, "--config.run_name=again"], tmp_path)
    assert again.returncode == 0
    assert metrics(tmp_path / "again", "update") == updates
    for flag, said in (
        (f"resume_from={tmp_path / 'run'}", "config.resume_from is set"),
        ("mixed_precision=fp16", "config.mixed_precision is 'fp16', but this study learns in 'bf16' or 'no' only"),
        ("per_prompt_stat_tracking.min_count=1", "config.per_prompt_stat_tracking.min_count must be 2 or more"),
    ):
        refused = children.command("tiny.critic", [*line, f"--config.{flag}"], tmp_path)
        assert refused.returncode == 2 and said in refused.stderr
