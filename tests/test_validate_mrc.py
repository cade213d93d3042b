"""The sanity experiment: distortions do what they say, and MRC of the small reconstructor rises with them."""

import torch

from config import tiny
from config.validate import resolve
from mrc.rewards import load_mrc
from tools.validate_mrc import TRIALS, VIEW, blur, draw, experiment, rotate_hue, table, with_distorted_view


def test_hue():
    red, white, gray = (torch.tensor(c)[:, None, None] for c in ((1.0, 0, 0), (1.0, 1, 1), (0.3, 0.3, 0.3)))
    assert torch.allclose(rotate_hue(red, 120.0), torch.tensor([0.0, 1, 0])[:, None, None], atol=1e-6)
    for colour in (white, gray):
        assert torch.allclose(rotate_hue(colour, 77.0), colour, atol=1e-6)


def test_blur():
    assert torch.allclose(blur(torch.full((1, 3, 64, 64), 0.4), 2.0), torch.tensor(0.4))
    step = (torch.arange(64) >= 32).float().expand(1, 3, 64, 64)
    expected = 0.5 * (1 + torch.erf((torch.arange(64) - 31.5) / (2.0 * 2**0.5)))
    assert (blur(step, 2.0)[0, 0, 30] - expected).abs().max() < 5e-3  # a sampled Gaussian cut at three sigmas


def test_one_view_is_distorted():
    views = torch.rand(2, 4, 3, 64, 64)
    for kind, strength in TRIALS:
        distorted = with_distorted_view(views, kind, strength, lambda degrees: views[:, 0], views.roll(1, 0))
        assert torch.equal(distorted[:, :VIEW], views[:, :VIEW]) and not torch.equal(distorted[:, VIEW], views[:, VIEW])


def test_mrc_rises_with_what_contradicts(tmp_path):
    config = resolve(tiny.get_config(), 1)
    results = experiment(load_mrc(config, "cpu"), 4, 64, [("rotation", 40.0), ("another object", 1.0)])

    def mean(kind, strength):
        return sum(results[kind][strength]) / 4

    assert mean("none", 0.0) < 0.05
    assert 1.5 * mean("none", 0.0) < mean("rotation", 40.0) < mean("another object", 1.0)


def test_table_and_plot(tmp_path):
    results = {"none": {0.0: [0.1, 0.2]}}
    for kind, strength in TRIALS:
        results.setdefault(kind, {})[strength] = [0.2, 0.4]
    assert "| rotation 5 degrees | 0.3000 ± 0.1000 | +0.1500 ± 0.0500 |" in table(results)
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
