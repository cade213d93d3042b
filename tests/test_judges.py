"""The judges beside the reward: near zero on exact views, rising with distortions that are known."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ddpo.evaluation import BASE, doubtful, paid
from mrc.judges import diversity, held_out_distance, judge_views, silhouette_disagreement, visual_hull
from mrc.lpips import LPIPS
from mrc.met3r_distance import SIZE, MEt3RDistance
from mrc.mrc import MRC
from recon.cameras import instant3d_cameras, mvdream_cameras, rays
from recon.grm import GRM
from recon.tiny_lrm import TinyLRM
from tiny.objects import build, fixed_views, random_caption
from tiny.training import WEIGHTS


@pytest.fixture(scope="module")
def views():
    generator = torch.Generator().manual_seed(0)
    return fixed_views(build([random_caption(generator) for _ in range(4)], generator))


@pytest.fixture(scope="module")
def judge():
    return MRC(TinyLRM.from_pretrained(WEIGHTS / "lrm"), LPIPS(), render_size=64)


def shrink(views):
    views = views.clone()
    small = F.interpolate(views[:, 3], scale_factor=0.5, mode="bilinear", antialias=True)
    views[:, 3] = 1
    views[:, 3, :, 16:48, 16:48] = small
    return views


def shift(views, pixels):
    views = views.clone()
    views[:, 2] = views[:, 2].roll(pixels, -1)
    return views


def recolour(views):
    views = views.clone()
    views[:, 1] = views[:, 1, [1, 2, 0]]
    return views


def test_silhouettes_of_one_object_have_a_hull_and_others_have_not(views):
    cameras = instant3d_cameras()
    exact = silhouette_disagreement(views, cameras)
    assert (exact < 0.08).all()  # what cells and pixels leave
    further = [silhouette_disagreement(shift(views, pixels), cameras) for pixels in (3, 8)]
    assert (exact < further[0]).all() and (further[0] < further[1]).all()
    assert (silhouette_disagreement(shrink(views), cameras) > 0.2).all()
    assert torch.equal(silhouette_disagreement(recolour(views), cameras), exact)  # colours are not its business
    assert silhouette_disagreement(views[:, [1, 0, 2, 3]], cameras).mean() > 3 * exact.mean()  # the cameras are
    nothing = torch.ones_like(views)
    assert (silhouette_disagreement(nothing, cameras) == 1).all()


def test_the_hull_of_a_sphere_is_a_little_larger_than_the_sphere():
    cameras = mvdream_cameras(elevation=0.0)
    origins, directions = rays(cameras, 64)
    closest = (origins - (origins * directions).sum(-1, keepdim=True) * directions).norm(dim=-1)
    hull = visual_hull((closest < 0.4).float().view(1, 4, 64, 64), cameras)[0]
    centre = (torch.arange(64) + 0.5) / 32 - 1
    radius = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij")).norm(dim=0)
    assert hull[radius < 0.36].all()
    assert not hull[radius > 0.65].any()  # a square whose sides touch the circle reaches sqrt(2) as far


def test_a_held_out_view_is_foretold_by_the_others_if_they_show_one_object(views, judge):
    views = views[:2]
    exact = held_out_distance(judge, views)
    assert exact.mean() < 0.1
    for distorted in (shrink(views), recolour(views), shift(views, 8)):
        assert held_out_distance(judge, distorted).mean() > 2 * exact.mean()


def test_the_second_reconstructor_sees_what_contradicts(views):
    """It blurs, so exact views are far from its renders, but of every object every distorted copy is farther."""
    second = MRC(GRM.from_pretrained(WEIGHTS / "grm"), LPIPS(), render_size=64)
    exact = -second(views).reward
    assert exact.mean() < 0.18
    for distorted in (shrink(views), recolour(views), shift(views, 8), views[:, [1, 0, 2, 3]]):
        assert (-second(distorted).reward > exact).all()


class PairDistance(torch.nn.Module):
    """What the package met3r is called with, and returns, but of pixels: mean difference of dark places."""

    def __init__(self, img_size, **settings):
        super().__init__()
        assert img_size == SIZE and settings["backbone"] == "mast3r" and settings["distance"] == "cosine"

    def forward(self, images, return_overlap_mask):
        B, *shape = images.shape
        assert shape == [2, 3, SIZE, SIZE] and images.min() < -0.5 and images.max() <= 1 and return_overlap_mask
        overlap = (images < -0.5).any(2).all(1).float()
        difference = (images[:, 0] - images[:, 1]).abs().mean(1)
        return (difference * overlap).sum((1, 2)) / (overlap.sum((1, 2)) + 1e-5), overlap


def test_met3r_is_asked_about_neighbours_and_never_calls_nothing_in_common_perfect(monkeypatch):
    monkeypatch.setitem(sys.modules, "met3r", SimpleNamespace(MEt3R=PairDistance))
    distance = MEt3RDistance("cpu")
    views = torch.ones(2, 4, 3, 64, 64)
    for v, shade in enumerate((0.0, 0.1, 0.2, 0.0)):
        views[:, v, :, 16:48, 16:48] = shade
    views[1, 2, :, 16:48, 16:48] = 1.0  # nothing is seen in it, nor in common with its two neighbours
    expected = [(0.2 + 0.2 + 0.4 + 0.0) / 4, (0.2 + 1 + 1 + 0.0) / 4]
    assert distance(views).tolist() == pytest.approx(expected, abs=0.02)  # edges are between the shades
    views = views[:1]
    assert distance(views[:, [0, 3, 1, 2]]) < distance(views[:, [0, 2, 3, 1]])  # the order of the views counts


def test_all_judges_that_apply(views, judge, monkeypatch):
    assert list(judge_views(judge, views[:1])) == ["silhouettes", "held_out"]
    monkeypatch.setattr(TinyLRM, "takes_fewer_views", False)
    assert list(judge_views(judge, views[:1])) == ["silhouettes"]


def test_a_reward_that_rises_alone_is_named():
    def result(mrc, silhouettes, held_out):
        values = {"mrc": mrc, "silhouettes": silhouettes, "held_out": held_out}
        return {name: {"difference": value} for name, value in values.items()}

    summary = {
        BASE: {},
        "honest": result(-0.1, -0.1, 0.1),
        "deceived": result(-0.1, 0.0, 0.1),
        "worse": result(0.1, 0.1, 0.1),
    }
    assert doubtful(summary) == {"deceived": ["silhouettes", "held_out"]}


def test_what_a_better_reward_was_paid_with_is_named():
    def result(mrc, diversity, p, clip=0.0):
        values = {"mrc": mrc, "diversity": diversity, "clip": clip}
        return {name: {"difference": value, "difference_se": None, "p": p} for name, value in values.items()}

    summary = {
        BASE: {},
        "free": result(-0.1, 0.02, 1e-4, 0.1),
        "by chance": result(-0.1, -0.02, 0.4),
        "of one prompt": result(-0.1, -0.02, None),
        "worse": result(0.1, -0.02, 1e-4),
        "alike": result(-0.1, -0.02, 1e-4),
        "anything": result(-0.1, -0.02, 0.0, -0.1),
    }
    assert paid(summary) == {"alike": ["diversity (-0.020)"], "anything": ["diversity (-0.020)", "clip (-0.100)"]}
    del summary["anything"]["diversity"]  # each caption was painted once
    assert paid(summary)["anything"] == ["clip (-0.100)"]


def test_diversity_falls_when_a_painter_collapses(views, judge):
    prompts = ["a", "b", "a", "a"]
    found = diversity(views, prompts, judge.lpips)
    assert torch.isnan(found[1]) and (found[[0, 2, 3]] > 0.1).all()
    pairs = {(a, b): judge.lpips(views[a], views[b]).mean() for a, b in ((0, 2), (0, 3), (2, 3))}
    torch.testing.assert_close(found[0], (pairs[0, 2] + pairs[0, 3]) / 2)
    torch.testing.assert_close(found[3], (pairs[0, 3] + pairs[2, 3]) / 2)
    nearer = torch.lerp(views, views[:1], 0.5)  # every sample half of the first
    assert (diversity(nearer, prompts, judge.lpips) < found)[[0, 2, 3]].all()
    assert (diversity(views[:1].expand_as(views), prompts, judge.lpips)[[0, 2, 3]] == 0).all()
