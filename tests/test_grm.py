"""GRM against what the public implementation computes with small random weights, and the reading of its files."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from recon.cameras import Cameras, project
from recon.grm import GRM, Attention
from recon.grm_checkpoint import convert
from tests import children
from tools import convert_grm
from tools.rehearsal.checkpoints import GRM_PARAMS, grm_checkpoint, save_with_easydicts

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5


def golden_grm(name):
    """The tiny GRM `name`, the file's other tensors, and the stride of the rows that it keeps. File "a" has no encoder:
    its tokens stand in for it."""
    file = GOLDEN / f"grm_tiny_{name}.safetensors"
    with safe_open(file, "pt") as header:
        visual, render = (json.loads(header.metadata()[key]) for key in ("visual_params", "act_params"))
        stride = int(header.metadata()["stride"].split(":")[0])
    del render["rows"]
    data = load_file(file)
    model = GRM(render=render, **visual).eval()
    problems = model.load_state_dict(
        {key[2:]: value.float() for key, value in data.items() if key.startswith("w/")}, strict=name == "b"
    )
    assert not problems.unexpected_keys
    assert all(key.startswith("transformer_encoder.") for key in problems.missing_keys)
    if name == "a":
        data["in/images"] = torch.zeros(2, 4, 3, 32, 32)
        model.transformer_encoder.forward = lambda x: data["out/tokens"]
    return model.requires_grad_(False), data, stride


def run(model, data):
    return model.encode(data["in/images"], data["in/c2w"], data["in/fxfycxcy"])


@pytest.mark.parametrize("name, batch, width", [("a", 2, 128), ("b", 1, 64)])
def test_raw_gaussians(name, batch, width):
    model, data, stride = golden_grm(name)
    ours = run(model, data)
    assert {key: tuple(value.shape) for key, value in ours.items()} == {
        "plucker": (batch, 4, 6, 32, 32),
        "tokens": (batch, 4, 16, width),
        "depth": (batch, 4, 32, 32),
        "xyz": (batch, 4096, 3),
        "feature": (batch, 4096, 3),
        "opacity": (batch, 4096, 1),
        "scaling": (batch, 4096, 3),
        "rotation": (batch, 4096, 4),
    }
    kept = {key: value[:, ::stride] for key, value in ours.items()}
    kept.update(
        tokens=ours["tokens"],
        depth=ours["depth"].flatten(1)[:, ::stride],
        plucker=ours["plucker"].flatten(-2)[..., ::stride],
    )
    for key, value in kept.items():
        assert (value - data[f"out/{key}"]).abs().max() < TOLERANCE, key


@pytest.mark.parametrize("name", ["a", "b"])
def test_activated_gaussians(name):
    model, data, _ = golden_grm(name)
    gaussians = model.gaussians((data["in/images"] + 1) / 2, Cameras(data["in/c2w"], data["in/fxfycxcy"]))
    position, opacity, scale, rotation, colour = gaussians.split([3, 1, 3, 4, 3], -1)
    assert (position - run(model, data)["xyz"]).abs().max() < TOLERANCE
    ours = {"opacity": opacity, "scaling": scale, "rotation": rotation, "rgb": colour}
    inside = (position.abs() < 1).all(-1, keepdim=True)
    assert 0.1 < inside.float().mean() < 0.9
    data["act/opacity"] = data["act/opacity"] * inside[0, :256]
    for key, value in ours.items():
        assert (value[0, :256] - data[f"act/{key}"]).abs().max() < TOLERANCE, key
    assert torch.equal(opacity > 0, inside)


def test_one_set_of_cameras_serves_all_objects():
    model, cameras = GRM(**GRM_PARAMS).eval(), GRM.input_cameras()
    views = torch.rand(2, 4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.gaussians(views, cameras), model.gaussians(views, cameras.expand(2)))


def test_attention_has_the_heads_of_multihead_attention():
    ours, theirs = Attention(192), nn.MultiheadAttention(192, 3, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 192)
    assert (ours(x) - theirs(x, x, x, need_weights=False)[0]).abs().max() < 1e-6


def test_input_cameras():
    golden = load_file(GOLDEN / "grm_tiny_a.safetensors")
    cameras, model = GRM.input_cameras(), GRM(**GRM_PARAMS)
    assert (cameras.c2w - golden["cameras/c2w"]).abs().max() < 1e-6
    assert (cameras.fxfycxcy - golden["cameras/fxfycxcy"]).abs().max() < 1e-6
    assert (model.num_views, model.input_size, len(model.cameras)) == (4, 16, 4)


def test_points_lie_on_the_rays_through_a_grid_from_corner_to_corner():
    model, data, _ = golden_grm("b")
    ours = run(model, data)
    points = ours["xyz"].unflatten(1, (4, -1))
    grid = torch.linspace(0, 1, 32)
    expected = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).flatten(0, 1)
    for v in range(4):
        pixels, depth = project(points[:, v], Cameras(data["in/c2w"], data["in/fxfycxcy"])[v])
        assert (pixels[0, 0] - expected).abs().max() < 1e-5
        assert (depth[0, 0] - ours["depth"][0, v].flatten()).abs().max() < 1e-5


def test_pluecker_rays_start_with_the_optical_axis():
    model, data, _ = golden_grm("b")
    moment, direction = run(model, data)["plucker"].split(3, 2)
    assert (direction[..., 0, 0] - data["in/c2w"][..., :3, 2]).abs().max() < 1e-6
    assert (moment * direction).sum(2).abs().max() < 1e-6


def test_the_network_may_be_in_half_precision():
    model, data, _ = golden_grm("b")
    exact = run(model, data)
    for dtype in (torch.float16, torch.bfloat16):
        ours = run(model.set_dtype(dtype), data)
        assert all(value.dtype == torch.float32 for value in ours.values())
        assert torch.equal(ours["plucker"], exact["plucker"])  # geometry is not rounded
        for key in ("tokens", "xyz", "depth", "feature", "opacity", "scaling", "rotation"):
            error = (ours[key] - exact[key]).abs().mean() / exact[key].std()
            assert 1e-5 < error < 0.03, (dtype, key)


def test_half_size_inputs_without_an_upsampler():
    """The encoder sees 16 pixels, the heads make up for it and for the patches."""
    params = {**GRM_PARAMS, "decoder_ratio": 0, "input_res": 32, "half_res_input": True}
    model = GRM(**params).requires_grad_(False)
    assert not any(key.startswith("gaussian_upsampler") for key in model.state_dict())
    assert model.out_layer_rotation.weight.shape == (4 * 16 * 16, 64, 1, 1)
    cameras, images = GRM.input_cameras().expand(1), torch.rand(1, 4, 3, 32, 32) * 2 - 1
    ours = model.encode(images, cameras.c2w, cameras.fxfycxcy)
    assert ours["plucker"].shape == (1, 4, 6, 16, 16) and ours["xyz"].shape == (1, 4 * 32 * 32, 3)
    full = GRM(**{**params, "half_res_input": False, "input_res": 16}).requires_grad_(False)
    full.transformer_encoder = model.transformer_encoder
    small = F.avg_pool2d(images.flatten(0, 1), 2).unflatten(0, (1, 4))
    assert (ours["tokens"] - full.encode(small, cameras.c2w, cameras.fxfycxcy)["tokens"]).abs().max() < 1e-5


def test_softplus_scales_are_clipped_and_multiplied():
    render = {"scaling_activation_type": "softplus", "scale_multi_act": 0.02}
    model = GRM(
        render=render, **GRM_PARAMS, scaling_activation_type="softplus", scale_max=-0.01, scale_offset=5.0
    ).eval()
    views, cameras = torch.rand(1, 4, 3, 16, 16), GRM.input_cameras()
    with torch.no_grad():
        raw = model._heads(model.encode(views * 2 - 1, *vars(cameras.expand(1)).values())["tokens"])["scaling"]
        scales = model.gaussians(views, cameras)[..., 4:7]
    assert (raw > -0.01).any() and (raw < -0.01).any()
    assert torch.allclose(scales, 0.02 * F.softplus(raw.clamp(max=-0.01)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 96}, "width is 96: it must be a multiple of 64"),
        ({"patch_size": 4, "decoder_ratio": 3}, "decoder_ratio is 3"),
        ({"input_res": 20}, "input_res is 20: it must be a multiple of 8"),
        ({"half_res_input": True, "input_res": 24}, "input_res is 24: it must be a multiple of 16"),
        ({"bwindow_size": 5}, "bwindow_size is 5: it must be null or divide the sequence of 16 tokens"),
        ({"window_size": 3}, "window_size is 3: it must be null or divide the sequence of 64 tokens"),
        ({"scaling_activation_type": "relu"}, "exp, softplus, sigmoid"),
        ({"num_input_views": 6}, "num_input_views is 6: it must be 4"),
        ({"layers": 0}, "layers is 0"),
        ({"render": {"sh_degree": 1}}, "sh_degree is 1: it must be 0"),
    ],
)
def test_impossible_parameters_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        GRM(**{**GRM_PARAMS, **change})


def test_views_of_another_size_or_number_are_refused():
    model, cameras = GRM(**GRM_PARAMS), GRM.input_cameras()
    with pytest.raises(ValueError, match=r"images of shape \(1, 4, 3, 32, 32\) but takes \(1, 4, 3, 16, 16\)"):
        model.gaussians(torch.zeros(1, 4, 3, 32, 32), cameras)
    with pytest.raises(ValueError, match=r"c2w of shape \(1, 3, 4, 4\)"):
        model.gaussians(torch.zeros(1, 4, 3, 16, 16), cameras[:3])


# -- published files ------------------------------------------------------------------------------------------------

VISUAL = {**GRM_PARAMS, "checkpointing": True, "num_input_views": 4}


class Code:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def save(tmp_path):
    """Saves a file with objects of the module `easydict`, which cannot be imported afterwards."""

    def save(content, name="grm_u.pth"):
        save_with_easydicts(content, tmp_path / name)
        with pytest.raises(ImportError):
            __import__("easydict")
        return tmp_path / name

    return save


@pytest.mark.parametrize("parallel", [True, False])
def test_a_published_file_becomes_a_folder(save, tmp_path, monkeypatch, capsys, parallel):
    model = GRM(**GRM_PARAMS)
    content = grm_checkpoint(model)
    if not parallel:
        content["model"] = {key.removeprefix("module."): value for key, value in content["model"].items()}
    source = save(content)
    monkeypatch.setattr("sys.argv", ["convert_grm", str(source), str(tmp_path / "grm")])
    convert_grm.main()
    assert "visual.checkpointing, render.render_type, render.img_height" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "grm").iterdir()) == ["config.json", "model.safetensors"]
    loaded = GRM.from_pretrained(tmp_path / "grm")
    assert loaded.visual == model.visual and loaded.render_params.scale_max_act == 0.3 and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        assert loaded.gaussians(torch.rand(1, 4, 3, 16, 16), loaded.cameras).isfinite().all()


def test_half_precision_files_stay_small_and_run_in_float32(save, tmp_path):
    convert(save(grm_checkpoint(GRM(**GRM_PARAMS).half())), tmp_path / "grm")
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "grm" / "model.safetensors").values())
    assert all(value.dtype == torch.float32 for value in GRM.from_pretrained(tmp_path / "grm").state_dict().values())


def test_without_a_smallest_scale_the_other_constants_are_the_published_ones(save, tmp_path):
    render = {"sh_degree": 0, "scaling_activation_type": "softplus", "scale_max_act": 7.0, "scale_multi_act": 7.0}
    convert(save(grm_checkpoint(GRM(**GRM_PARAMS), render=render)), tmp_path / "grm")
    params = GRM.from_pretrained(tmp_path / "grm").render_params
    assert (params.scale_min_act, params.scale_max_act, params.scale_multi_act) == (1.0, 1.0, 0.1)


@pytest.mark.parametrize("place", ["model", "config", "other", "alone"])
@pytest.mark.parametrize("function, what", [(os.system, "system"), (eval, "eval"), (subprocess.getoutput, "getoutput")])
def test_code_is_refused_and_never_runs(save, tmp_path, place, function, what):
    trace = tmp_path / "ran"
    code = Code(function, f"open({str(trace)!r}, 'w')" if function is eval else f"touch {trace}")
    content = grm_checkpoint(GRM(**GRM_PARAMS))
    if place == "alone":
        content = code
    elif place == "config":
        content["config"].model_config.visual.params.layers = code
    else:
        content.setdefault(place, {})["transformer_encoder.conv.weight"] = code
    source = save(content)
    with pytest.raises(ValueError, match=rf"refused, and no code in it was run, because it holds \S*{what}"):
        convert(source, tmp_path / "grm")
    assert not trace.exists() and not (tmp_path / "grm").exists()
    if place == "alone":  # the code would have run
        torch.load(source, weights_only=False)
        assert trace.exists()


def test_newer_pickles_that_hide_their_names_are_refused(tmp_path):
    torch.save(Code(os.system, f"touch {tmp_path / 'ran'}"), tmp_path / "grm_u.pth", pickle_protocol=4)
    with pytest.raises(ValueError, match="refused"):
        convert(tmp_path / "grm_u.pth", tmp_path / "grm")
    assert not (tmp_path / "ran").exists()


def without(dictionary, key):
    return {name: value for name, value in dictionary.items() if name != key}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: {"state_dict": file["model"]}, "is not a file of GRM, which holds 'model' and 'config'"),
        (lambda file: [1, 2], "is not a file of GRM"),
        (lambda file: {**file, "model": "weights"}, "'model' that is not a dictionary of tensors"),
        (lambda file: {**file, "config": {"lr": 0.1}}, "has no config.model_config.visual.params"),
        (
            lambda file: {**file, "model": without(file["model"], "module.visual_encoder.out_layer_depth.weight")},
            r"1 missing \(out_layer_depth.weight\); give",
        ),
        (
            lambda file: {**file, "model": {**file["model"], "lpips.weight": torch.ones(2)}},
            r"1 unknown \(lpips.weight\); give",
        ),
        (
            lambda file: {**file, "model": {**file["model"], "out_layer_depth.weight": torch.ones(2)}},
            r"1 of another shape \(out_layer_depth.weight: \(2,\) instead of \(16, 64, 1, 1\)\); give",
        ),
        (
            lambda file: grm_checkpoint(GRM(**GRM_PARAMS), visual={**VISUAL, "layers": 3}),
            r"12 missing \(transformer_encoder.transformer.resblocks.2.attn.in_proj_bias, .*, ...\); give",
        ),
        (lambda file: grm_checkpoint(GRM(**GRM_PARAMS), visual={**VISUAL, "width": 128}), r"of another shape"),
        (lambda file: grm_checkpoint(GRM(**GRM_PARAMS), visual={**VISUAL, "window_size": 7}), "window_size is 7"),
        (
            lambda file: grm_checkpoint(GRM(**GRM_PARAMS), visual=without(VISUAL, "width")),
            "no complete configuration of a GRM .*'width'",
        ),
    ],
)
def test_other_files_get_one_sentence(save, tmp_path, change, message):
    source = save(change(grm_checkpoint(GRM(**GRM_PARAMS))))
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "grm")
    assert "\n" not in str(error.value) and not (tmp_path / "grm").exists()


def test_unreadable_files_get_one_sentence(save, tmp_path):
    source = save(grm_checkpoint(GRM(**GRM_PARAMS)))
    source.write_bytes(source.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="grm_u.pth could not be read .* download it again") as error:
        convert(source, tmp_path / "grm")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="give grm_u.pth"):
        convert(tmp_path / "nothing.pth", tmp_path / "grm")


def test_the_command_ends_with_one_sentence(tmp_path):
    done = children.command("tools.convert_grm", [tmp_path / "nothing.pth", tmp_path / "grm"], tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "tools.convert_grm: " in done.stderr and "nothing.pth does not exist: give grm_u.pth" in done.stderr
    assert not (tmp_path / "grm").exists()


def test_a_full_disk_leaves_nothing_half_written(save, tmp_path, monkeypatch, capsys):
    def fail(weights, file):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    source = save(grm_checkpoint(GRM(**GRM_PARAMS)))
    convert(source, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    monkeypatch.setattr("recon.grm.save_file", fail)
    for out in ("new", "old"):
        monkeypatch.setattr("sys.argv", ["convert_grm", str(source), str(tmp_path / out)])
        with pytest.raises(SystemExit, match="2"):
            convert_grm.main()
        assert re.match(rf"tools.convert_grm: .*{out} could not be written .No space left", capsys.readouterr().err)
    assert {file.name for file in tmp_path.iterdir()} == {"old", source.name}
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


# -- converted folders ----------------------------------------------------------------------------------------------


def test_a_published_file_itself_is_not_loaded(save, tmp_path):
    source = save({"model": Code(os.system, f"touch {tmp_path / 'ran'}")})
    with pytest.raises(ValueError, match=rf"`python -m tools.convert_grm {source} OUT`"):
        GRM.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match="no config.json: .*`python -m tools.convert_grm SOURCE OUT`"):
        GRM.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_folders_get_one_sentence(tmp_path):
    GRM(**GRM_PARAMS).save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message) as error:
            GRM.from_pretrained(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    save_file({**without(weights, "out_layer_depth.weight"), "extra": torch.ones(1)}, tmp_path / "model.safetensors")
    refused(r"1 missing \(out_layer_depth.weight\); 1 unknown \(extra\)")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    refused("could not be read as a file of weights")
    save_file(weights, tmp_path / "model.safetensors")
    for changed in ({**config["visual"], "scale_ofset": 1.0}, without(config["visual"], "layers"), None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "visual": changed}))
        refused("no complete configuration of a GRM")
    (tmp_path / "config.json").write_text("{")
    refused("could not be read")
