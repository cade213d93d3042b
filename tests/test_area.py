"""Advantages that do not pay for larger objects."""

import json
import math

import numpy as np
import pytest
import torch

from ddpo.area import AreaControl, log_area, without
from tests import children
from tests.test_training import metrics
from tests.tiny_models import FEW_FILES, make_world, settings

GOOD = np.ones(4, bool)


def views_of(areas):
    """Foreground of two views that agree."""
    return np.repeat(np.asarray(areas, np.float32)[:, None], 2, 1)


def test_an_object_is_as_large_as_most_of_its_views_show_it():
    foreground = np.array([[0.1, 0.3, 0.2], [0.4, 0.0, 0.3], [0.0, 0.0, 0.5]])
    np.testing.assert_allclose(log_area(foreground), np.log([0.2, 0.3, 1e-3]))


def test_what_is_left_is_at_right_angles():
    vector, direction = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).unbind()
    left = without(vector, direction)
    assert abs(left @ direction) < 1e-4 and left @ vector > 0
    torch.testing.assert_close(vector - left, (vector @ direction) / (direction @ direction) * direction)
    assert torch.equal(without(vector, torch.zeros(50)), vector)


def test_advantages_that_pay_for_area_alone_pay_for_nothing():
    """Within their prompts, whatever these differ in: "a" is small, "b" is large."""
    areas, prompts = views_of([0.1, 0.2, 0.4, 0.8]), ["a", "a", "b", "b"]
    found = AreaControl()(torch.tensor([-1.0, 1, -1, 1]), areas, prompts, GOOD)
    torch.testing.assert_close(found, torch.zeros(4), atol=1e-4, rtol=0)
    other = torch.tensor([1.0, 1, -1, -1])
    torch.testing.assert_close(AreaControl()(other, areas, prompts, GOOD), other, atol=1e-4, rtol=0)


def test_what_has_grown_is_penalised():
    one, nothing, prompts = AreaControl(), torch.zeros(4), ["a", "a", "b", "b"]
    start = np.array([0.1, 0.2, 0.3, 0.4])
    first = one(nothing, views_of(start), prompts, GOOD)
    torch.testing.assert_close(first, nothing, atol=1e-5, rtol=0)
    grown = one(nothing, views_of(start * math.exp(0.02)), prompts, GOOD)
    assert one.growth == pytest.approx([0, 0.02], abs=1e-6)
    assert one.penalty() == pytest.approx(15 * 0.01 + 0.02, abs=1e-5)
    assert (grown.sign() == torch.tensor([1, -1, 1, -1])).all()  # the larger of a prompt lose
    for _ in range(2):
        shrunk = one(nothing, views_of(start * math.exp(-0.03)), prompts, GOOD)
    assert one.penalty() == pytest.approx(-15 * 0.03 + 0.02 - 0.06, abs=1e-5)
    assert (shrunk.sign() == torch.tensor([-1, 1, -1, 1])).all()
    for _ in range(40):
        one(nothing, views_of(start * 2), prompts, GOOD)
    assert one.penalty() == 2 and len(one.growth) == 32


def test_growth_is_counted_from_the_first_epoch_of_a_prompt():
    one, nothing = AreaControl(), torch.zeros(4)
    one(nothing, views_of([0.1, 0.2, 0.3, 0.4]), ["a", "a", "a", "a"], GOOD)
    one(nothing, views_of([0.5, 0.6, 0.7, 0.8]), ["b", "b", "b", "b"], GOOD)
    assert one.growth == pytest.approx([0, 0], abs=1e-6)
    one(nothing, views_of([0.55, 0.66, 0.77, 0.88]), ["b", "b", "b", "b"], GOOD)
    assert one.growth[-1] == pytest.approx(math.log(1.1), abs=1e-5)


def test_bad_samples_are_not_counted():
    one, good = AreaControl(), np.array([True, True, False, True])
    areas = np.array([[0.1, 0.1], [0.2, 0.2], [np.nan, np.nan], [0.3, 0.3]])
    found = one(torch.tensor([1.0, -1, 0, 0.5]), areas, ["a"] * 4, good)
    assert found[2] == 0 and found.isfinite().all()
    assert one.start["a"] == pytest.approx(float(np.log([0.1, 0.2, 0.3]).mean()))


def test_objects_keep_their_size():
    """A painter of two prompts that learns by REINFORCE how large its objects are, whose reward grows with them, and
    which grows by 1 % in an epoch without being asked."""
    generator, sizes = np.random.default_rng(0), {}
    for held in (True, False):
        one, size = AreaControl(), 0.0
        for epoch in range(40):
            noise = generator.normal(size=64)
            area = np.exp(np.repeat([-1.5, -1.0], 32) + size + 0.09 * noise)
            advantages = torch.as_tensor(0.3 * noise + generator.normal(size=64), dtype=torch.float32)
            if held:
                advantages = one(advantages, views_of(area), ["small"] * 32 + ["large"] * 32, np.ones(64, bool))
            if epoch:
                size += 0.01 + 0.03 * float(advantages @ torch.as_tensor(noise, dtype=torch.float32)) / 64
        sizes[held] = size
    assert abs(sizes[True]) < 0.03 and sizes[False] > 0.5


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    one, other, prompts = AreaControl(), AreaControl(), ["a", "a", "b", "b"]
    generator = torch.Generator().manual_seed(0)
    epochs = [(torch.randn(4, generator=generator), views_of(torch.rand(4, generator=generator))) for _ in range(4)]
    for advantages, areas in epochs[:2]:
        one(advantages, areas, prompts, GOOD)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for advantages, areas in epochs[2:]:
        assert torch.equal(one(advantages, areas, prompts, GOOD), other(advantages, areas, prompts, GOOD))
    assert other.state_dict() == one.state_dict()


def test_runs_with_and_without(tmp_path):
    """The real script: area changes what is learned, in an ordinary update too, and its state is in the checkpoint."""
    world, norms = make_world(tmp_path), {}
    for held in (True, False):
        values = settings(world, tmp_path, train__hold_foreground=held, train__gradients_while_painting=False)
        assert children.run(children.train, values | FEW_FILES | {"run_name": str(held)}) == 0
        norms[held] = [line["grad_norm"] for line in metrics(tmp_path / str(held), "update")]
        (*_, checkpoint) = sorted((tmp_path / str(held)).glob("checkpoint_*"))
        state = json.loads((checkpoint / "run.json").read_text())["area"]
        assert (state is not None) == held
        if held:
            assert len(state["growth"]) == 3 and state["start"]
    assert norms[True] != norms[False]
