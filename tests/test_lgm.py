"""LGM against what the public implementation computes with small random weights, and reading files of weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import recon.lgm
from config import base, dgx
from recon import load_reconstructor, reconstructor_cameras, weights
from recon.cameras import camera_disagreement, from_lgm_axes, lgm_pluecker, mvdream_cameras
from recon.lgm import LGM, OPTIONS, PUBLISHED
from tests.tiny_models import move_by_an_ulp

GOLDEN = Path(__file__).parent / "golden"
MANIFESTS = json.loads((GOLDEN / "lgm_manifests.json").read_text())
NOT_OF_THE_NETWORK = ("fovy", "cam_radius")


def golden(name):
    """The small model called `name`, its options, and the tensors of its golden file."""
    file = GOLDEN / f"lgm_tiny_{name}.safetensors"
    with safe_open(file, "pt") as handle:
        options = json.loads(handle.metadata()["options"])
    tensors = load_file(file)
    model = LGM(**{key: value for key, value in options.items() if key not in NOT_OF_THE_NETWORK})
    state = {key.removeprefix("w/"): value.float() for key, value in tensors.items() if key.startswith("w/")}
    model.load_state_dict(state)
    return model.eval(), tensors


@pytest.mark.parametrize("name", ["a", "b"])
@torch.no_grad()
def test_small_models(name):
    model, tensors = golden(name)
    x = tensors["in/x"]
    assert (model.network_input(tensors["in/image01"], model.cameras) - x).abs().max() < 1e-5

    def outputs():
        features = model.unet(x.flatten(0, 1))
        return {"unet": features, "conv": model.conv(features), "gaussians": model.gaussians(x)}

    computed = outputs()
    move_by_an_ulp(model, seed=0)
    for key, moved in outputs().items():
        # what rounding does: here the weights' last bit moves the results by up to 2e-5, most in short quaternions
        tolerance = 8 * float((computed[key] - moved).abs().max())
        assert tolerance < 3e-4 and (computed[key] - tensors[f"out/{key}"]).abs().max() < tolerance, key


@pytest.mark.parametrize("shape", [(1, 3, 3, 32, 32), (1, 4, 3, 33, 33), (4, 3, 32, 32)])
def test_views_of_another_number_or_size_are_refused(shape):
    model = golden("b")[0]
    with pytest.raises(ValueError, match=r"LGM was given views of shape .* but takes \(B, 4, 3, 32, 32\)"):
        model.reconstruct(torch.ones(shape), model.cameras)


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_the_full_sizes_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        state = LGM(**OPTIONS[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == MANIFESTS[name]


def test_cameras_and_rays_are_those_of_the_public_code():
    tensors, cameras = load_file(GOLDEN / "lgm_cameras.safetensors"), LGM.input_cameras()
    rays = lgm_pluecker(cameras, 256)
    assert (lgm_pluecker(cameras, 20) - tensors["elev0/plucker20"]).abs().max() < 1e-6
    assert (rays[..., ::16, ::16] - tensors["elev0/plucker256_sub16"]).abs().max() < 1e-6
    assert (
        rays.double().sum((-1, -2)) - tensors["elev0/plucker256_sum"]
    ).abs().max() < 0.02  # of 65536 float32 numbers


def test_axes():
    """A camera is a position and a rotation, as a Gaussian is: the public code's, in LGM's axes, must become ours."""
    theirs, ours = load_file(GOLDEN / "lgm_cameras.safetensors")["elev0/c2w_opencv"], LGM.input_cameras().c2w
    positions, turned = from_lgm_axes(theirs[:, :3, 3], quaternions(theirs[:, :3, :3]))
    assert (positions - ours[:, :3, 3]).abs().max() < 1e-6
    expected = quaternions(ours[:, :3, :3])
    assert ((turned * expected).sum(-1).abs() - 1).abs().max() < 1e-6  # q and -q are one rotation


def quaternions(matrices):
    """Rotations (N, 3, 3) -> (N, 4), w first: the eigenvector of a symmetric matrix (Bar-Itzhack 2000)."""
    m = matrices.double()
    skew = torch.stack([m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], -1)
    trace = m.diagonal(dim1=1, dim2=2).sum(-1)
    k = torch.zeros(len(m), 4, 4, dtype=torch.float64)
    k[:, 0, 0], k[:, 0, 1:], k[:, 1:, 0] = trace, skew, skew
    k[:, 1:, 1:] = m + m.transpose(1, 2) - trace[:, None, None] * torch.eye(3)
    return torch.linalg.eigh(k).eigenvectors[..., -1].float()


@torch.no_grad()
def test_the_scene_lies_where_the_cameras_look():
    """Gaussians that LGM puts in front of its first camera are seen by the first camera, and by the others where they
    should be: a blob on the axis of view 0, near it, is left of the centre for view 1, behind for 2, right for 3."""
    model = golden("a")[0]
    packed = torch.zeros(1, 1, 14)
    packed[..., 2], packed[..., 3], packed[..., 4:7], packed[..., 7], packed[..., 11] = 0.5, 0.9, 0.05, 1.0, 1.0
    model.gaussians = lambda x: packed  # 0.5 towards LGM's first camera, red
    scene = model.reconstruct(torch.ones(1, 4, 3, 32, 32), model.cameras)
    images, alpha = model.render(scene, model.cameras, 32)
    assert images.shape == (1, 4, 3, 32, 32) and alpha.shape == (1, 4, 1, 32, 32)
    column = (alpha[0, :, 0].sum(1) * torch.arange(32)).sum(-1) / alpha[0].sum((1, 2, 3))
    assert column[[0, 2]].sub(15.5).abs().max() < 0.1 and column[1] < 11 and column[3] > 20
    assert alpha[0, 0].sum() > 1.5 * alpha[0, 2].sum()  # nearer is larger
    assert images[0, 0, 0].min() > 0.99 and images[0, 0, 1].min() < 0.3  # red on white


def test_loading(tmp_path, monkeypatch):
    model, tensors = golden("a")
    options = dict(
        down_channels=(32, 64, 64),
        down_attention=(False, True, True),
        up_channels=(64, 64),
        up_attention=(True, False),
        splat_size=16,
        input_size=32,
    )
    monkeypatch.setitem(recon.lgm.OPTIONS, "golden", options)
    file = tmp_path / "weights.safetensors"
    save_file({key: value.half() for key, value in model.state_dict().items()}, file)
    config = base.get_config().recon
    config.name, config.checkpoint, config.dtype = "lgm", str(file), "fp32"
    loaded = load_reconstructor(config)
    assert loaded.input_size == 32
    views = tensors["in/image01"]
    scenes = [one.reconstruct(views, one.cameras).means for one in (loaded, model)]
    assert torch.equal(*scenes)
    loaded.set_dtype(torch.bfloat16)
    assert (loaded.reconstruct(views, loaded.cameras).means - scenes[0]).abs().mean() < 0.02

    whole = file.read_bytes()
    refused(config, tmp_path / "half.safetensors", whole[: len(whole) // 2], ValueError, "download it again")
    refused(config, tmp_path / PUBLISHED, whole, ValueError, "the published file has 744d63")
    config.checkpoint = str(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_reconstructor(config)
    monkeypatch.delitem(recon.lgm.OPTIONS, "golden")
    refused(config, tmp_path / "other.safetensors", whole, ValueError, "none of LGM's models big, small, tiny")


def refused(config, file, content, error, words):
    file.write_bytes(content)
    config.checkpoint = str(file)
    with pytest.raises(error, match=words):
        load_reconstructor(config)


def test_the_public_pair_fits():
    config = dgx.get_config("mvdream_lgm")
    wanted = reconstructor_cameras(config.recon)
    assert not camera_disagreement(mvdream_cameras(config.painter.elevation, config.painter.azimuth_start), wanted)
    assert camera_disagreement(mvdream_cameras(15.0, config.painter.azimuth_start), wanted) == [
        "elevations are 15/15/15/15 for the painter, 0/0/0/0 for the reconstructor"
    ]


def test_a_hub_id_is_downloaded_and_a_path_is_not(tmp_path, monkeypatch):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        raise OSError("no network\nat all")

    monkeypatch.setattr(weights, "hf_hub_download", download)
    monkeypatch.setattr(weights, "hub_trouble", lambda source: "")
    with pytest.raises(FileNotFoundError, match=r"ashawkey/LGM.* could not be downloaded \(no network\): give"):
        LGM.from_pretrained("ashawkey/LGM")
    assert asked == [("ashawkey/LGM", PUBLISHED)]
    for path in (tmp_path, tmp_path / "missing", "weights/missing.safetensors"):
        with pytest.raises(FileNotFoundError, match="does not exist or has no model_fp16_fixrot.safetensors"):
            LGM.from_pretrained(path)
    assert len(asked) == 1


def test_files_that_hold_no_weights_are_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "nested.pth")
    assert torch.equal(weights.read_weights(tmp_path / "nested.pth")["a"], torch.ones(2))
    with pytest.raises(ValueError, match="list.pth could not be read as a file of weights .*download it again"):
        weights.read_weights(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="nothing.pth does not exist: give a file of weights"):
        weights.read_weights(tmp_path / "nothing.pth")
