"""Which steps are drawn: as many as asked, spread evenly, and without bias."""

import pytest
import torch

from config import base
from ddpo.steps import draw_reference_steps, draw_steps, draw_trained_steps
from tests.tiny_models import golden_policy

WEIGHTS = {
    "equal": torch.ones(12),
    "falling": torch.linspace(2.0, 0.1, 12),
    "one large": torch.tensor([9.0, 1, 1, 1, 1, 1]),  # drawn always: 3 * 9 / 14 > 1
    "zeros": torch.tensor([1.0, 0, 2, 0, 3]),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("count", [1, 3])
def test_sums_over_drawn_steps_keep_their_expectation(weights, count):
    values = torch.arange(1.0, len(weights) + 1).square()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_steps(weights, count, generator) for _ in range(4000)])
    assert ((draws > 0).sum(1) == min(count, int((weights > 0).sum()))).all()
    sums = draws @ values
    error = sums.std() / len(sums) ** 0.5
    assert (sums.mean() - weights @ values).abs() <= 4 * error + 1e-4 * (weights @ values)


def test_all_steps_are_taken_as_they_are():
    for weights in WEIGHTS.values():
        assert torch.equal(draw_steps(weights, len(weights), None), weights)


def test_equal_steps_are_drawn_at_equal_distances():
    generator = torch.Generator().manual_seed(0)
    firsts = set()
    for _ in range(50):
        (steps,) = draw_steps(torch.ones(12), 3, generator).nonzero(as_tuple=True)
        assert steps.diff().tolist() == [4, 4]
        firsts.add(int(steps[0]))
    assert firsts == {0, 1, 2, 3}


def test_steps_of_a_run():
    config, scheduler = base.get_config(), golden_policy().scheduler
    config.sample.num_steps, config.train.skip_last_steps = 20, 4
    scheduler.set_timesteps(20)
    weights = draw_trained_steps(scheduler, config)
    assert torch.allclose(weights[:16], torch.tensor(1 / 16)) and (weights[16:] == 0).all()
    config.train.timestep_weighting = "noise"
    everything = draw_trained_steps(scheduler, config)
    assert everything.sum() == pytest.approx(1, rel=1e-5) and (everything[:16].diff() < 0).all()  # less and less noise
    config.train.timestep_fraction = 0.25
    drawn = draw_trained_steps(scheduler, config, torch.Generator().manual_seed(0))
    assert (drawn > 0).sum() == 4 and (drawn[16:] == 0).all()
    config.kl_timestep_fraction = 0.25
    assert draw_reference_steps(config).sum() == 16  # in validation
    asked = draw_reference_steps(config, torch.Generator().manual_seed(0))
    assert asked.sum() == 4 and not asked[16:].any()
