"""Expert iteration: what is chosen of a painter's samples, and that it is learned."""

import pytest
import torch

from config import tiny
from ddpo.sampling import make_generator
from tests import children
from tests.test_critic import samples_of
from tests.test_exact_gradient import command_line, configuration
from tests.test_training import metrics
from tests.tiny_models import PROMPTS
from tiny.best_of_n import OBJECTS, BestOfN, best_of_each
from tiny.objects import build, fixed_views

NAN = float("nan")


def test_the_best_of_each_prompt_is_kept():
    prompts = ["a", "b", "a", "b", "a", "c", "c"]
    values = torch.tensor([-0.3, NAN, -0.1, -0.9, -0.2, NAN, NAN])
    assert best_of_each(values, prompts).tolist() == [2, 3]


@pytest.fixture
def run(world, tmp_path):
    return BestOfN(configuration(world, tmp_path, "mvdream", train__objective="awm", train__learning_rate=1e-3))


@pytest.mark.parametrize("hold", [True, False])
def test_a_sample_is_not_chosen_for_its_size_where_area_is_held(run, hold):
    run.config.train.hold_foreground = hold
    prompts, areas = ["a", "a", "a", "b", "b", "b"], [-3.0, -2.0, -1.0, -2.0, -1.5, -1.0]
    wanted = torch.tensor([0.1, -0.2, 0.1, 0.05, -0.1, 0.05])  # which no area explains
    rewards = wanted + 0.5 * torch.tensor(areas)  # the largest are rewarded most
    worth = run.worth(0, samples_of(run, (PROMPTS * 2)[:6], rewards.tolist(), areas), prompts)
    if hold:
        torch.testing.assert_close(worth, wanted)
    else:
        assert best_of_each(worth, prompts).tolist() == [2, 5]


def test_a_control_chooses_by_lot(run):
    """Good samples alone, anew in every epoch."""
    samples = samples_of(run, PROMPTS[:4], [-0.3, -0.1, NAN, -0.4], [-2.0, -1.0, NAN, -1.5])
    run.config.shuffle_advantages = True
    chosen = [best_of_each(run.worth(epoch, samples, ["a"] * 4), ["a"] * 4).tolist() for epoch in range(30)]
    assert sorted({one for (one,) in chosen}) == [0, 1, 3]


def test_reversed_rewards_choose_the_worst(world, tmp_path, monkeypatch):
    """While the log keeps the true ones."""
    config = configuration(world, tmp_path, "mvdream", train__objective="awm", num_epochs=1)
    config.per_prompt_stat_tracking.min_count = 2
    seen = {}
    for reverse in (False, True):
        config.run_name = f"reversed_{reverse}"
        run = BestOfN(config, reverse)
        monkeypatch.setattr(run, "update", lambda epoch, samples, prompts, r=reverse: seen.update({r: samples}) or [])
        run.epoch(0)
    assert torch.equal(seen[True].reward, -seen[False].reward) and seen[True].reward.min() > 0
    means = [metrics(tmp_path / f"logs/reversed_{reverse}", "epoch")[0]["reward_mean"] for reverse in (False, True)]
    assert means[0] == means[1] < 0


def test_what_was_chosen_becomes_likelier(run):
    """The model foretells its picture better than before, and gains more of it than of one that was left."""
    run.config.train.num_inner_epochs = 40
    samples = samples_of(run, PROMPTS[:1] * 2, [-0.3, -0.1], [-2.0, -2.0])
    pictures = samples.trajectory.latents[:, -1].repeat(50, *[1] * 4)
    conditioning = run.policy.encode(PROMPTS[:1] * 100)

    @torch.no_grad()
    def errors():
        scheduler, generator = run.policy.scheduler, torch.Generator().manual_seed(0)
        scheduler.set_timesteps(run.config.sample.num_steps)
        t = scheduler.timesteps[torch.arange(100) // 2 % len(scheduler.timesteps)]
        noise = torch.randn(pictures.shape, generator=generator)
        said = run.policy.predict(
            scheduler.add_noise(pictures, noise, t), t, conditioning, run.config.sample.guidance_scale
        )
        return (said - noise).square().flatten(1).mean(1).view(-1, 2).mean(0)

    before = errors()
    updates = run.update(0, samples, PROMPTS[:1] * 2)
    left, chosen = before - errors()
    assert len(updates) == 40
    assert chosen > 0 and chosen > left, (chosen, left)


@pytest.mark.parametrize("name", ["grid", "best"])
def test_exact_views_are_those_of_the_caption(tmp_path, name):
    """What is learned of them decodes to them, in place of what was painted, and anew in every epoch."""
    config = tiny.get_config(name)
    config.logdir, config.mixed_precision = str(tmp_path), "no"
    run = BestOfN(config, exact_views=True)
    captions = ["a red cube on top of a blue sphere", "a green cone"]
    painted = run.paint(run.reward_fn, captions, 0).trajectory
    epochs = [run.with_exact_views(epoch, painted, captions) for epoch in (0, 0, 1)]
    views = fixed_views(build(captions, make_generator(config.seed, OBJECTS, 0)))
    with torch.no_grad():
        decoded = run.policy.decode(epochs[0].latents[:, -1])
    assert (decoded - views).abs().mean() < 0.02 < (decoded - views.flip(0)).abs().mean()
    assert torch.equal(epochs[0].latents, epochs[1].latents) and not torch.equal(epochs[0].latents, epochs[2].latents)
    assert torch.equal(epochs[0].latents[:, :-1], painted.latents[:, :-1])


def test_exact_views_are_what_is_learned(run, monkeypatch):
    """Once of each prompt."""
    seen, train = [], run.prompts.train_set
    drawn = run.draw_prompts(0)
    assert len(drawn) > len(train) and set(drawn) == set(train)
    monkeypatch.setattr(run, "exact_views", True)
    run.config.sample.batch_size = len(train)
    assert run.draw_prompts(0) == run.draw_prompts(1) == train
    monkeypatch.setattr(run, "with_exact_views", lambda *given: seen.append(given) or "exact")
    monkeypatch.setattr("tiny.best_of_n.update", lambda policy, optimizer, accelerator, *given, **_: given)
    pictures, *_ = run.update(3, samples_of(run, PROMPTS[:2] * 2, [-0.3, -0.1, -0.2, -0.2], [-2.0] * 4), ["a", "b"] * 2)
    assert pictures == "exact" and seen[0][0] == 3 and sorted(seen[0][2]) == ["a", "b"]


def test_the_command(world, tmp_path):
    changes = dict(
        num_epochs=2,
        per_prompt_stat_tracking__min_count=2,
        sample__num_steps=2,
        train__objective="awm",
        train__hold_foreground=True,
        train__num_inner_epochs=3,
        kl_estimator="analytic",
    )
    line = command_line(world, tmp_path, **changes)
    done = children.command("tiny.best_of_n", line, tmp_path)
    assert done.returncode == 0, done.stderr
    epochs, updates = metrics(tmp_path / "run", "epoch"), metrics(tmp_path / "run", "update")
    assert [one["epoch"] for one in epochs] == [0, 1] and {one["epoch"] for one in updates} == {0, 1}
    assert all(one["grad_norm"] > 0 for one in updates) and epochs[1]["kl_mean"] > 0 == epochs[0]["kl_mean"]
    assert done.stdout.count("best of each: ") == 2
    for flag, said in (
        ("train.objective=ddpo", "config.train.objective is 'ddpo', but"),
        ("per_prompt_stat_tracking.min_count=1", "config.per_prompt_stat_tracking.min_count must be 2 or more"),
    ):
        refused = children.command("tiny.best_of_n", [*line, f"--config.{flag}"], tmp_path)
        assert refused.returncode == 2 and said in refused.stderr
    (tmp_path / "other.txt").write_text("a red cube\na corgi\n")
    other = ["--exact_views", "--config.prompts.num_train=0", f"--config.prompts.train_file={tmp_path}/other.txt"]
    refused = children.command("tiny.best_of_n", [*line, *other], tmp_path)
    assert refused.returncode == 2 and "Caption 'a corgi' does not describe" in refused.stderr
