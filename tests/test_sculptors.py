"""What every sculptor has in common: MRC's way through it, its name in the configuration, what views must look like."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from config import base, tiny
from config.validate import validate
from ddpo.setup import load_reward
from mrc import MRC, score_views
from mrc.bounding_box import background_is_white, object_is_cut
from mrc.validate import fitted_cameras
from recon import RECONSTRUCTORS, background_remover, load_reconstructor
from recon.grm import GRM
from recon.lgm import LGM
from recon.openlrm import OpenLRM
from recon.tiny_lrm import TinyLRM
from tests.test_grm import SMALL
from tests.test_openlrm import golden_config
from tiny.objects import build, render

SMALL_LGM = dict(
    input_size=32,
    down_channels=(32, 64),
    down_attention=(False, True),
    up_channels=(64, 32),
    up_attention=(True, False),
    splat_size=32,
)
SCULPTORS = {
    "tiny_lrm": lambda: TinyLRM(width=8, volume=8, voxel_channels=4, plane_width=32, plane_channels=4, hidden=16),
    "lgm": lambda: LGM(**SMALL_LGM),
    "grm": lambda: GRM(**SMALL),
    "openlrm": lambda: OpenLRM(**golden_config("a")),
}


def difference(a, b):
    return (a - b).abs().mean((1, 2, 3))


@pytest.mark.parametrize("name", list(RECONSTRUCTORS))
def test_mrc_goes_through_every_sculptor_and_comes_out_the_same_twice(name):
    torch.manual_seed(0)
    model = SCULPTORS[name]().eval().requires_grad_(False)
    objects = build(["a red cube", "a blue cone"], torch.Generator().manual_seed(0))
    views = render(objects, fitted_cameras(model.cameras), 40)[0]
    judge = MRC(model, difference, render_size=24)
    first, second = judge(views), judge(views)
    assert first.renders.shape == (2, 4, 3, 24, 24) and first.lpips.shape == (2, 4)
    assert (first.reward < 0).all() and not first.empty.any()
    for field in ("reward", "lpips", "renders"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    alone = judge(views[1:])
    assert torch.allclose(alone.reward, first.reward[1:], atol=1e-5)  # a sample is judged by itself


def test_sculptors_follow_their_device():
    for make in SCULPTORS.values():
        with torch.device("meta"):
            assert make().cameras.c2w.device.type == "meta"


def test_grm_by_name(tmp_path):
    GRM(**SMALL).save_pretrained(tmp_path)
    config = base.get_config().recon
    config.name, config.checkpoint, config.dtype = "grm", str(tmp_path), "bf16"
    model = load_reconstructor(config)
    assert model.out_layer_depth.weight.dtype == torch.bfloat16 and not model.training
    views = torch.rand(1, 4, 3, model.input_size, model.input_size)
    scene = model.reconstruct(views, model.cameras)
    assert scene.means.dtype == torch.float32 and scene.means.shape == (1, 4 * model.input_size**2, 3)


# -- scenes of single views --------------------------------------------------------------------------------------------


def test_a_scene_is_not_asked_about_the_view_it_was_made_of():
    views, renders = torch.rand(2, 4, 3, 16, 16), torch.rand(2, 4, 4, 3, 16, 16)
    verdict = score_views(views, renders, difference, bbox_lpips=False)
    apart = (views[:, None] - renders).abs().mean((3, 4, 5))
    expected = [apart[:, [i for i in range(4) if i != j], j].mean(1) for j in range(4)]
    assert torch.allclose(verdict.lpips, torch.stack(expected, 1))
    assert torch.allclose(verdict.reward, -verdict.lpips.mean(1))
    assert torch.equal(verdict.renders[:, 0], renders[:, 1, 0])

    cheap = score_views(views, renders[:, :1], difference, bbox_lpips=False)  # the first view's scene alone
    assert torch.allclose(cheap.reward, -apart[:, 0, 1:].mean(1)) and cheap.lpips[:, 0].isnan().all()
    assert torch.allclose(cheap.lpips[:, 1:], apart[:, 0, 1:])


def test_the_number_of_input_views_is_openlrms():
    config = tiny.get_config()
    config.recon.input_views = 1
    with pytest.raises(ValueError, match="config.recon.input_views is 1, which only the sculptor 'openlrm'"):
        validate(config, 1, check_files=False)
    config.recon.name = "openlrm"
    validate(config, 1, check_files=False)


# -- backgrounds -------------------------------------------------------------------------------------------------------


def gray_views():
    """Two samples, the second on gray."""
    views = torch.ones(2, 4, 3, 32, 32)
    views[1] = 0.6
    views[..., 8:24, 8:24] = 0.2
    return views


def test_a_gray_background_is_noticed_once():
    views = gray_views()
    assert background_is_white(views).tolist() == [True, False]
    model = SCULPTORS["tiny_lrm"]().eval()
    judge = MRC(model, difference)
    with pytest.warns(UserWarning, match="1 of 2 samples are not on white.*config.recon.remove_background"):
        judge(views)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(views)
        MRC(model, difference)(views[:1])


def test_an_object_that_leaves_a_view_is_noticed():
    views = torch.ones(2, 4, 3, 32, 32)
    views[:, :, :, 8:24, 8:24] = 0.2
    views[1, 2, :, 8:24, 20:] = 0.2  # touches the right border of one view
    assert object_is_cut(views).tolist() == [False, True] and background_is_white(views).all()
    assert not object_is_cut(gray_views()).any()  # that is another complaint
    with pytest.warns(UserWarning, match="1 of 2 samples show an object that leaves its view"):
        MRC(SCULPTORS["tiny_lrm"]().eval(), difference)(views)


def test_the_background_is_removed_before_judging(monkeypatch):
    """With a stand-in for rembg that calls everything lighter than 0.4 background."""

    def cut(picture, session):
        assert session == "session"
        picture = picture.convert("RGBA")
        picture.putalpha(picture.convert("L").point(lambda value: 255 * (value < 0.4 * 255)))
        return picture

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=lambda: "session", remove=cut))
    views = background_remover()(gray_views())
    assert background_is_white(views).all() and torch.allclose(views[:, :, :, 8:24, 8:24], torch.tensor(0.2))
    config = tiny.get_config()
    config.recon.remove_background = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards = load_reward(config, "cpu")(gray_views(), ["a box"] * 2).reward
    assert torch.allclose(rewards[0], rewards[1], atol=1e-3)  # they differ by their backgrounds alone


def test_without_rembg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ValueError, match="config.recon.remove_background is True, but rembg is not installed"):
        background_remover()
