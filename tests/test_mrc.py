"""The reward: boxes, crops and scores against the published ones, the closed loophole, the reconstructor's contract."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from config import tiny
from mrc import LPIPS, MRC, compute_bounding_box, crop_box, make_square_bbox, score_views
from mrc.bounding_box import background_is_white, object_is_cut
from mrc.judges import held_out_distance
from mrc.mrc import crop_pairs, view_boxes
from mrc.rewards import load_reward
from mrc.sanity_rewards import jpeg_compressibility, jpeg_incompressibility, tile_views
from recon import RECONSTRUCTORS
from recon.cameras import instant3d_cameras
from tests.tiny_models import SMALL_RECONSTRUCTORS
from tiny.objects import build, render
from tools.validate_mrc import fitted_cameras

TENSORS = load_file(Path(__file__).parent / "golden" / "mrc.safetensors")
GRIDS = TENSORS["mv_images"] / 255
VIEWS = torch.stack([GRIDS[..., y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)], dim=1)
RENDERS = TENSORS["rendered_views"] / 255
WHITE_SAMPLE = 1  # its view 3 is all white


@pytest.fixture(scope="module")
def lpips():
    return LPIPS()


def views_with_square(sizes, image_size=64):
    """One sample of white views, each with a grey square of the given side."""
    views = torch.ones(1, len(sizes), 3, image_size, image_size)
    for view, size in zip(views[0], sizes, strict=True):
        view[:, 10 : 10 + size, 10 : 10 + size] = 0.5
    return views


class PerfectReconstructor:
    """Renders exactly what it was given, so that only the plumbing is tested."""

    num_views, input_size, cameras = 4, 64, "cameras"

    def reconstruct(self, views, cameras):
        assert cameras == self.cameras and views.shape[-1] == self.input_size
        return views

    def render(self, scene, cameras, size):
        assert cameras == self.cameras
        scene = torch.nn.functional.interpolate(scene.flatten(0, 1), size=(size, size)).unflatten(0, scene.shape[:2])
        return scene, scene[:, :, :1]


def test_golden_boxes():
    box = compute_bounding_box(VIEWS)
    square = make_square_bbox(box)
    assert torch.equal(box, TENSORS["bbox"]) and box.dtype == torch.int64
    assert torch.equal(square, TENSORS["square_bbox"])
    assert torch.equal(crop_box(square, 64, 64), TENSORS["crop_box"])
    assert torch.equal(compute_bounding_box(VIEWS[0, 0]), TENSORS["bbox"][0, 0])  # any leading shape


def test_golden_crops():
    flat_views, flat_renders = VIEWS.flatten(0, 1), RENDERS.flatten(0, 1)
    view_crops, render_crops = crop_pairs(flat_views, flat_renders, view_boxes(flat_views))
    torch.testing.assert_close(view_crops, TENSORS["input_crops"].flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(render_crops[:4], TENSORS["rendered_crops"][0], atol=1e-5, rtol=0)


def test_golden_rewards(lpips):
    """As published, with the loophole open."""
    result = score_views(VIEWS, RENDERS, lpips, empty_view_reward=None)
    torch.testing.assert_close(result.lpips, TENSORS["lpips_per_view"], atol=1e-6, rtol=1e-4)
    for key in ("reward", "reward_torchmetrics_1_2_1"):
        torch.testing.assert_close(result.reward, TENSORS[key], atol=1e-6, rtol=1e-4)


def test_an_empty_view_cannot_win(lpips):
    result = score_views(VIEWS, RENDERS, lpips, min_foreground=0)
    assert result.empty.nonzero().tolist() == [[WHITE_SAMPLE, 3]]
    assert result.lpips[WHITE_SAMPLE, 3] == 0  # the best distance there is ...
    assert result.reward[WHITE_SAMPLE] == -1.0  # ... and the worst reward
    others = [0, 2]
    torch.testing.assert_close(result.reward[others], TENSORS["reward"][others], atol=1e-6, rtol=1e-4)


def test_a_dot_is_as_good_as_nothing(lpips):
    """By default a view needs 0.5 % of foreground: views of 1 and of 18 pixels of 4096 count as empty, one of 46 does
    not."""
    result = score_views(VIEWS, RENDERS, lpips)
    assert result.empty.nonzero().tolist() == [[1, 2], [1, 3], [2, 2]]
    assert result.reward[1:].tolist() == [-1.0, -1.0]
    torch.testing.assert_close(result.reward[0], TENSORS["reward"][0], atol=1e-6, rtol=1e-4)


def test_foreground_and_the_threshold(lpips):
    views = views_with_square([64, 8, 4, 0])
    result = score_views(views, views, lpips, min_foreground=16 / 64**2, empty_view_reward=-2.0)
    assert (result.foreground[0] * 64**2).tolist() == [54 * 54, 64, 16, 0]
    assert result.empty.tolist() == [[False, False, False, True]] and result.reward.item() == -2.0
    assert score_views(views, views, lpips, min_foreground=0).empty.tolist() == [[False, False, False, True]]


def test_bbox_lpips_off_compares_whole_views(lpips):
    result = score_views(VIEWS, RENDERS, lpips, bbox_lpips=False, empty_view_reward=None)
    expected = lpips(VIEWS.flatten(0, 1), RENDERS.flatten(0, 1)).view(3, 4)
    assert torch.equal(result.lpips, expected) and torch.equal(result.reward, -expected.mean(dim=1))


def test_square_boxes_of_plain_numbers_and_odd_differences():
    assert make_square_bbox([10, 10, 20, 15]).tolist() == [10, 7, 20, 18]  # difference 5: both ends grow by 3
    assert make_square_bbox([3, 2, 4, 10]).tolist() == [-1, 2, 8, 10]
    assert make_square_bbox([1, 1, 2, 2]).tolist() == [1, 1, 2, 2]
    assert crop_box([0, 2, 30, 39], height=40, width=32).tolist() == [0, 0, 31, 39]


def test_a_perfect_reconstruction_has_reward_zero(lpips):
    views = views_with_square([30, 20, 10, 40]).repeat(3, 1, 1, 1, 1)
    result = MRC(PerfectReconstructor(), lpips)(views)
    assert torch.equal(result.reward, torch.zeros(3)) and torch.equal(result.renders, views)
    assert result.lpips.shape == result.empty.shape == result.foreground.shape == (3, 4)
    assert not result.reward.requires_grad


def test_views_and_renders_of_other_sizes(lpips):
    views = views_with_square([60, 40, 20, 80], image_size=128).half()
    assert MRC(PerfectReconstructor(), lpips)(views).renders.shape == (1, 4, 3, 128, 128)
    result = MRC(PerfectReconstructor(), lpips, render_size=96)(views)
    assert result.renders.shape == (1, 4, 3, 96, 96) and result.reward.item() < 0


def test_options_reach_the_score(lpips):
    views = views_with_square([30, 20, 10, 0])
    assert MRC(PerfectReconstructor(), lpips, empty_view_reward=-3.0)(views).reward.item() == -3.0
    assert MRC(PerfectReconstructor(), lpips, min_foreground=0.05)(views).empty.tolist() == [[False, False, True, True]]


def test_broken_pixels_and_wrong_shapes_are_refused(lpips):
    mrc = MRC(PerfectReconstructor(), lpips)
    views = VIEWS.clone()
    views[1, 2, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 samples have NaN or infinite pixels in the painted views"):
        mrc(views)
    with pytest.raises(ValueError, match="renders of the reconstruction"):
        score_views(VIEWS, views, lpips)
    with pytest.raises(ValueError, match=r"wants \(B, 4, 3, S, S\)"):
        mrc(VIEWS[:, :3])
    with pytest.raises(ValueError, match="their renders"):
        score_views(VIEWS, RENDERS[..., :32], lpips)


def test_tiled_views_are_the_grid():
    assert torch.equal(tile_views(VIEWS), GRIDS)
    assert tile_views(VIEWS[:, :3]).shape == (3, 3, 64, 192)


def test_jpeg_rewards():
    torch.manual_seed(0)
    smooth, noisy = torch.full((1, 4, 3, 64, 64), 0.3), torch.rand(1, 4, 3, 64, 64)
    sizes = jpeg_incompressibility(torch.cat([smooth, noisy]))
    assert sizes.shape == (2,) and 0 < sizes[0] < sizes[1] < 128 * 128 * 3 / 1000
    assert torch.equal(jpeg_compressibility(torch.cat([smooth, noisy])), -sizes)


def test_a_white_view_is_empty_whatever_the_reward():
    config = tiny.get_config()
    config.reward_fn, config.mrc.min_foreground = "jpeg_compressibility", 0.0
    views = VIEWS[:1].clone()
    views[0, 1] = 1
    assert load_reward(config, "cpu")(views, [""]).empty.tolist() == [[False, True, False, False]]


def test_jpeg_rewards_are_sizes_of_files(tmp_path):
    picture = (GRIDS[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(picture).save(tmp_path / "grid.jpg", quality=95)
    size = (tmp_path / "grid.jpg").stat().st_size
    assert jpeg_incompressibility(VIEWS[:1]).item() == pytest.approx(size / 1000)


def test_the_view_that_is_foretold_is_not_seen():
    """Every view is gray in its own tone, and the reconstructor renders the mean of those that it was given."""

    class Averaging:
        input_size, cameras = 32, instant3d_cameras()

        def reconstruct(self, views, cameras):
            assert len(cameras) == views.shape[1]
            return views.mean(1, keepdim=True)

        def render(self, scene, cameras, size):
            return scene, None

    tones = torch.tensor([0.1, 0.2, 0.4, 0.8])
    views = tones.view(1, 4, 1, 1, 1).expand(2, 4, 3, 32, 32)
    expected = sum((tones[i] - (tones.sum() - tones[i]) / 3).abs() for i in range(4)) / 4
    judge = MRC(Averaging(), lambda a, b: (a - b).abs().mean((1, 2, 3)), bbox_lpips=False)
    assert held_out_distance(judge, views).tolist() == pytest.approx([float(expected)] * 2, rel=1e-5)


# -- with real reconstructors ------------------------------------------------------------------------------------------


def difference(a, b):
    return (a - b).abs().mean((1, 2, 3))


@pytest.mark.parametrize("name", list(RECONSTRUCTORS))
def test_mrc_takes_every_reconstructor(name):
    torch.manual_seed(0)
    model = SMALL_RECONSTRUCTORS[name]().eval().requires_grad_(False)
    objects = build(["a red cube", "a blue cone"], torch.Generator().manual_seed(0))
    views = render(objects, fitted_cameras(model.cameras), 40)[0]
    judge = MRC(model, difference, render_size=24)
    first, second = judge(views), judge(views)
    assert first.renders.shape == (2, 4, 3, 24, 24) and first.lpips.shape == (2, 4)
    assert (first.reward < 0).all() and not first.empty.any()
    assert torch.allclose(first.reward, -first.lpips.mean(1))
    for field in ("reward", "lpips", "renders"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    alone = judge(views[1:])
    assert torch.allclose(alone.reward, first.reward[1:], atol=1e-5)  # a sample is scored by itself


def test_a_view_that_was_not_compared_does_not_count():
    """OpenLRM's scene of the first view alone says nothing about that view."""
    torch.manual_seed(0)
    model = SMALL_RECONSTRUCTORS["openlrm"]().eval().requires_grad_(False)
    model.input_views = 1
    views = views_with_square([40, 30, 50, 40])
    result = MRC(model, difference)(views)
    assert result.lpips[0, 0].isnan() and not result.lpips[0, 1:].isnan().any()
    assert torch.allclose(result.reward, -result.lpips[:, 1:].mean(1))


# -- views as no reconstructor expects them ----------------------------------------------------------------------------


def gray_views():
    """Two samples, the second on gray."""
    views = torch.ones(2, 4, 3, 32, 32)
    views[1] = 0.6
    views[..., 8:24, 8:24] = 0.2
    return views


def test_a_gray_background_is_noticed_once():
    views = gray_views()
    assert background_is_white(views).tolist() == [True, False]
    judge = MRC(PerfectReconstructor(), difference)
    with pytest.warns(UserWarning, match="1 of 2 samples are not on white.*config.recon.remove_background"):
        judge(views)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(views)
        MRC(PerfectReconstructor(), difference)(views[:1])


def test_an_object_that_leaves_a_view_is_noticed():
    views = torch.ones(2, 4, 3, 32, 32)
    views[:, :, :, 8:24, 8:24] = 0.2
    views[1, 2, :, 8:24, 20:] = 0.2  # touches the right border of one view
    assert object_is_cut(views).tolist() == [False, True] and background_is_white(views).all()
    assert not object_is_cut(gray_views()).any()  # which is the other warning
    with pytest.warns(UserWarning, match="1 of 2 samples show an object that leaves its view"):
        MRC(PerfectReconstructor(), difference)(views)


def test_the_background_is_removed_before_the_reward(monkeypatch):
    """With a stand-in for rembg that takes everything lighter than 0.4 for background."""

    def remove(image, session):
        image = image.convert("RGBA")
        image.putalpha(image.convert("L").point(lambda value: 255 * (value < 0.4 * 255)))
        return image

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=lambda: "session", remove=remove))
    config = tiny.get_config()
    config.recon.remove_background = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards = load_reward(config, "cpu")(gray_views(), ["a box"] * 2).reward
    assert torch.allclose(rewards[0], rewards[1], atol=1e-3)  # they differ by their backgrounds alone
