"""The gradient of MRC through the whole chain is held to differences of what a rollout is worth."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_patch.loading import load_painter, make_trainable
from diffusers_patch.rollout import rollout
from mrc.rewards import load_mrc
from tests import children
from tests.test_run import config_of
from tests.test_training import metrics
from tests.tiny_models import PROMPTS, flags, make_mvdream
from tiny.exact_gradient import ExactGradient, exact_gradients, reward_and_area

PAINTERS = {
    "mv_sdxl": {},
    "mvdream": dict(painter__name="mvdream", painter__elevation=20.0, painter__azimuth_start=315.0),
}


def configuration(world, tmp_path, painter, **changes):
    changes |= PAINTERS[painter]
    if painter == "mvdream":
        changes["pretrained__model"] = str(make_mvdream(world) / "mvdream")
    return config_of(world, tmp_path / "logs", **changes)


def command_line(world, tmp_path, **changes):
    """What starts a study of the small MVDream."""
    changes = {**PAINTERS["mvdream"], "pretrained__model": str(make_mvdream(world) / "mvdream"), **changes}
    return ["--config=config/base.py", *flags(world, tmp_path, **changes)]


def learner(world, tmp_path, painter):
    """(policy away from its base model, its weights, judge, configuration)."""
    config = configuration(world, tmp_path, painter, lora__targets="attention+conv")
    policy, judge = load_painter(config, "cpu"), load_mrc(config, "cpu")
    make_trainable(policy, config)
    weights = parameters_to_vector(policy.trainable_parameters()).detach()
    weights = weights + 0.1 * torch.randn(len(weights), generator=torch.Generator().manual_seed(0))
    vector_to_parameters(weights, policy.trainable_parameters())
    policy.pipeline.vae.decoder.conv_out.bias.data -= 0.06  # darker: more of a view is foreground
    return policy, weights, judge, config


def paint(policy, config):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return rollout(policy, PROMPTS[:2], config.sample.num_steps, config.sample.guidance_scale, 1.0, generators)


@pytest.mark.parametrize(("painter", "steps_back"), [("mv_sdxl", 1000), ("mvdream", 1000), ("mvdream", 2)])
def test_gradients_are_those_of_what_is_painted(world, tmp_path, monkeypatch, painter, steps_back):
    """Along themselves, and along a random direction; with `steps_back` the weights of earlier steps do not move.

    Every step is so small that no box and no occupied cell changes, which would be a jump."""
    policy, weights, judge, config = learner(world, tmp_path, painter)
    found = exact_gradients(policy, judge, paint(policy, config), config, steps_back).double()
    predict, first = policy.predict, policy.scheduler.timesteps[-min(steps_back, config.sample.num_steps)]

    def values(moved):
        def predict_with_late_steps_moved(x, t, *args, **kwargs):
            vector_to_parameters(moved if t[0] <= first else weights, policy.trainable_parameters())
            return predict(x, t, *args, **kwargs)

        monkeypatch.setattr(policy, "predict", predict_with_late_steps_moved)
        with torch.no_grad():
            return torch.stack([value.double().sum() for value in reward_and_area(judge, paint(policy, config).views)])

    def slopes(direction, size):
        step = (size * F.normalize(direction, dim=0)).float()
        return (values(weights + step) - values(weights - step)) / (2 * size)

    norms = found.norm(dim=1)
    for n in range(2):
        assert float(slopes(found[n], 3e-4)[n]) == pytest.approx(float(norms[n]), rel=0.05)
    anywhere = F.normalize(torch.randn(len(weights), generator=torch.Generator().manual_seed(1)).double(), dim=0)
    error = (slopes(anywhere, 2e-2) - found @ anywhere).abs()
    assert (error < 0.2 * norms / len(weights) ** 0.5).all()


def test_the_reward_is_that_of_mrc_and_the_area_nearly_the_foreground(world, tmp_path):
    policy, _, judge, config = learner(world, tmp_path, "mvdream")
    views = paint(policy, config).views
    views[..., 8:20, 8:20] = 0.5
    reward, area = reward_and_area(judge, views)
    result = judge(views)
    torch.testing.assert_close(reward, result.reward)
    torch.testing.assert_close(area, result.foreground.mean(1), atol=0.02, rtol=0)


@pytest.mark.parametrize("hold", [True, False])
def test_the_direction_raises_the_reward_and_can_hold_the_area(world, tmp_path, monkeypatch, hold):
    """It leaves the area as it is, and takes back what has grown."""
    run = ExactGradient(configuration(world, tmp_path, "mvdream", train__hold_foreground=hold), 1000)
    samples = run.paint(run.reward_fn, PROMPTS[:2], 0)
    area = torch.randn(sum(p.numel() for p in run.parameters), generator=torch.Generator().manual_seed(0))
    reward = torch.randn(len(area), generator=torch.Generator().manual_seed(1)) + area
    monkeypatch.setattr(run, "gradients", lambda chains: len(chains) * torch.stack([reward, area]))

    def alike(vector):
        return float(F.cosine_similarity(run.direction(samples.trajectory), vector, dim=0))

    assert alike(reward) > 0.4
    assert abs(alike(area)) < 1e-4 if hold else alike(area) > 0.4
    if hold:
        run.area_control.growth = [0.02, 0.02]
        assert alike(area) < -0.1


def test_the_direction_is_a_mean_over_updates(world, tmp_path, monkeypatch):
    """Of the gradients, but what stops growth acts at once."""
    run = ExactGradient(configuration(world, tmp_path, "mvdream", train__hold_foreground=True), 1000)
    trajectory = run.paint(run.reward_fn, PROMPTS[:2], 0).trajectory
    one, other, area = torch.eye(sum(p.numel() for p in run.parameters))[:3]
    monkeypatch.setattr(run, "gradients", lambda chains: len(chains) * torch.stack([one, area]))
    torch.testing.assert_close(run.direction(trajectory), one)
    monkeypatch.setattr(run, "gradients", lambda chains: len(chains) * torch.stack([other, area]))
    run.area_control.growth = [0.02, 0.02]
    wanted = 0.9 * one + 0.1 * other
    expected = wanted - run.area_control.penalty() * wanted.norm() * area
    torch.testing.assert_close(run.direction(trajectory), expected)


def test_an_update_climbs(world, tmp_path, monkeypatch):
    """And not in the first epoch."""
    run = ExactGradient(configuration(world, tmp_path, "mvdream", train__learning_rate=1e-4), 1000)
    samples = run.paint(run.reward_fn, PROMPTS[:2], 0)
    before = parameters_to_vector(run.parameters).detach()
    upwards = torch.randn(len(before), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(run, "direction", lambda trajectory: upwards)
    assert run.update(0, samples, PROMPTS[:2]) == [] and torch.equal(before, parameters_to_vector(run.parameters))
    (statistics,) = run.update(1, samples, PROMPTS[:2])
    assert statistics["loss"] == pytest.approx(-float(samples.reward.mean()))
    step = parameters_to_vector(run.parameters).detach() - before
    assert F.cosine_similarity(step, upwards, dim=0) > 0.4


def test_the_command(world, tmp_path):
    changes = dict(num_epochs=2, sample__num_steps=2, train__kl_per_update=0.01, train__kl_calibration_updates=1)
    line = command_line(world, tmp_path, **changes)
    done = children.command("tiny.exact_gradient", line, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [(line["kind"], line["epoch"]) for line in lines if line["kind"] != "validation"] == [
        ("epoch", 0), ("epoch", 1), ("update", 1)
    ]  # fmt: skip
    assert lines[0]["kind"] == lines[-1]["kind"] == "validation"
    (update,) = metrics(tmp_path / "run", "update")
    assert update["kl_of_update"] > 0 and update["grad_norm"] > 0
    kept = sorted((tmp_path / "run").glob("lora/*/*"))  # of every validation, but for the first
    assert [file.parent.name for file in kept] == ["epoch_0002"]
    assert kept[0].read_bytes() == (tmp_path / "run/final" / kept[0].name).read_bytes()


def test_what_is_not_differentiated_is_refused(world, tmp_path):
    line = ["--config=config/base.py", *flags(world, tmp_path, reward_fn="jpeg_compressibility")]
    done = children.command("tiny.exact_gradient", line, tmp_path)
    assert done.returncode == 2 and "config.reward_fn = 'jpeg_compressibility'" in done.stderr
