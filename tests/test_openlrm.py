"""OpenLRM against what the public implementation computes with small random weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.cameras import (
    Cameras,
    cameras_of_lrm,
    flip_axes,
    instant3d_cameras,
    look_at,
    lrm_source_vectors,
    openlrm_canonical_cameras,
    orbit_cameras,
    project,
    rays,
)
from recon.openlrm import OPTIONS, OpenLRM, resize_input
from recon.openlrm_checkpoint import convert_openlrm, published_name, published_shapes
from recon.volume_rendering import blurred_importance_depths, sample_planes, stratified_depths
from tests.tiny_models import openlrm_config

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "openlrm_manifest.json").read_text())
CAMERAS = load_file(GOLDEN / "openlrm_cameras.safetensors")
RENDER_SIZE, REGION = 10, (slice(3, 8), slice(5, 10))


def golden_weights(data):
    return {key[2:]: value for key, value in data.items() if key.startswith("w/")}


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request):
    """A tiny model and the tensors of its file."""
    data = load_file(GOLDEN / f"openlrm_tiny_{request.param}.safetensors")
    model = OpenLRM(**openlrm_config(request.param)).eval().requires_grad_(False)
    model.load_state_dict(convert_openlrm(golden_weights(data), model))
    return model, data


def far_apart(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


# -- the network --------------------------------------------------------------------------------------------------


def test_image_to_planes(golden):
    model, data = golden
    image, source = data["in/image01"], data["in/source_camera"]
    assert far_apart(model.features(image), data["out/encoder_feats"]) < 2e-5
    assert far_apart(model.camera_embedder(source), data["out/camera_embed"]) < 2e-5
    assert far_apart(model.tokens(image, source), data["out/tokens"]) < 2e-5
    assert far_apart(model.planes(image, source), data["out/planes"]) < 2e-5


def test_points_in_and_outside_the_box(golden):
    """Points outside have features of zero and the decoder's density of that; only rendering empties them."""
    model, data = golden
    features = sample_planes(data["out/planes"], data["in/points"])
    assert far_apart(features, data["out/points_sampled"].transpose(1, 2).flatten(2)) < 2e-5
    density, colour = model.decoder(features)
    assert far_apart(density, data["out/points_sigma"][..., 0]) < 2e-5
    assert far_apart(colour, data["out/points_rgb"]) < 2e-5
    outside = (data["in/points"].abs() > 1).any(-1)
    assert outside.any() and (density[outside] > 0).all()
    assert (model.decoder.density(model.field(data["out/planes"])(data["in/points"])[0])[outside] == 0).all()


# -- rendering ----------------------------------------------------------------------------------------------------


def golden_rays(data):
    """Origins and directions (B, M size^2, 3) of the render cameras."""
    return (x.flatten(1, 2) for x in rays(cameras_of_lrm(data["in/render_cameras"]), RENDER_SIZE))


def as_images(values, views):
    """(B, M S S, channels) -> (B, M, channels, S, S)."""
    return values.unflatten(1, (views, RENDER_SIZE, RENDER_SIZE)).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(
    "name, options",
    [
        ("render_q25", dict(jitter=0.25)),
        ("render_mid", dict(jitter=0.5)),
        ("render_q25_coarse_only", dict(jitter=0.25, fine=False)),
        ("render_mid_coarse_only", dict(jitter=0.5, fine=False)),
        ("render_noise", dict(jitter="in/noise_stratified", u="in/noise_importance")),
        ("render_mid_region5_anchor3_5_bg.25", dict(jitter=0.5, background=0.25)),
    ],
)
def test_renders(golden, name, options):
    model, data = golden
    B, M = data["in/render_cameras"].shape[:2]
    given = {
        key: data[value].unflatten(0, (B, M)).flatten(1, 2) if isinstance(value, str) else value
        for key, value in options.items()
    }
    colour, alpha = model.render_rays(data["out/planes"], *golden_rays(data), **given)
    colour, alpha = as_images(colour, M), as_images(alpha[..., None], M)
    if "region" in name:  # a part of the image is the image of a part of the rays
        colour, alpha = colour[..., *REGION], alpha[..., *REGION]
    assert far_apart(colour, data[f"out/{name}/images_rgb"]) < 1e-4
    assert far_apart(alpha, data[f"out/{name}/images_weight"]) < 1e-4


def test_rays_beside_the_box_show_the_background(golden):
    model, data = golden
    beside, away = torch.tensor([[[0.0, -3, 0]]]), torch.tensor([[[0.9, 0.1, 0.4]]])
    colour, alpha = model.render_rays(data["out/planes"][:1], beside, away, background=0.25)
    assert (colour == 0.25).all() and (alpha == 0).all()


def test_depths_in_bins_that_start_at_near():
    depths = stratified_depths(torch.tensor([1.0]), torch.tensor([4.0]), 4, 0.25, bins=3)
    assert torch.allclose(depths, torch.tensor([[1.25, 2.25, 3.25, 4.25]]))


def test_blurred_importance_follows_the_weights_half_an_interval_early():
    """All the weight in the interval 4 to 5 of eight: its neighbours get half of it, and every weight stands in the bin
    between the midpoints before its interval."""
    depths, weights = torch.arange(9.0), torch.zeros(8)
    weights[4] = 100.0
    drawn = blurred_importance_depths(depths, weights, 4001, torch.linspace(0, 1, 4001))
    share = torch.histc(drawn, bins=8, min=-0.5, max=7.5) / 4001  # of the bins before the intervals 0, 1, ...
    assert torch.allclose(share, torch.tensor([0, 0, 0, 0.25, 0.5, 0.25, 0, 0]), atol=1e-3)
    assert drawn[0] == 0.5 and drawn[-1] == 6.5  # the last bin, to 7.5, is never used


# -- the whole reconstructor --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    data = load_file(GOLDEN / "openlrm_tiny_a.safetensors")
    model = OpenLRM(**openlrm_config("a")).eval().requires_grad_(False)
    model.load_state_dict(convert_openlrm(golden_weights(data), model))
    return model


def test_a_view_to_a_scene_to_images():
    """From a view of the default source camera to the golden renders, through the protocol of reconstructors."""
    for name in "ab":
        data = load_file(GOLDEN / f"openlrm_tiny_{name}.safetensors")
        model = OpenLRM(**openlrm_config(name)).eval()
        model.load_state_dict(convert_openlrm(golden_weights(data), model))
        model.input_views = 1
        source = Cameras(look_at((0.0, -2.0, 0.0))[None], torch.tensor([[0.75, 0.75, 0.5, 0.5]]))
        scene = model.reconstruct(data["in/image01"][:1, None], source)
        assert far_apart(scene.planes[:, 0], data["out/planes"][:1]) < 2e-5
        images, alpha = model.render(scene, cameras_of_lrm(data["in/render_cameras"][0]), RENDER_SIZE)
        assert far_apart(images, data["out/render_mid/images_rgb"][:1].clamp(0, 1)) < 1e-4
        assert far_apart(alpha, data["out/render_mid/images_weight"][:1]) < 1e-4


def test_every_view_has_its_own_scene(model):
    views, cameras = torch.rand(2, 4, 3, 56, 56), instant3d_cameras()
    scene = model.reconstruct(views, cameras)
    assert len(scene) == 2 and scene.planes.shape == (2, 4, 3, 8, 12, 12)
    images, alpha = model._render_source(scene, 2, cameras[:3], 6)
    assert images.shape == (2, 3, 3, 6, 6) and alpha.shape == (2, 3, 1, 6, 6)
    alone = model.reconstruct(views[1:, 2:3].expand(-1, 4, -1, -1, -1), cameras[[2, 2, 2, 2]])
    assert torch.allclose(model.render(alone, cameras[:3], 6)[0][0], images[1], atol=1e-4)
    assert torch.equal(model.render(scene, cameras, 6)[0], model._render_source(scene, 0, cameras, 6)[0])


@pytest.mark.parametrize("sources", [1, 2, 3, 4])
def test_a_scene_is_not_compared_with_the_view_that_it_was_made_of(model, monkeypatch, sources):
    """Against distances of all pairs, one scene and one view at a time."""
    monkeypatch.setattr(model, "input_views", sources)
    views, cameras = torch.rand(2, 4, 3, 56, 56), instant3d_cameras()
    targets = torch.rand(2, 4, 3, 6, 6)

    def distance(renders):
        assert renders.shape == targets.shape
        return (renders - targets).abs().mean((2, 3, 4))

    scene = model.reconstruct(views, cameras)
    distances, renders = model.compare(scene, cameras, 6, distance)
    pairs, expected = [], torch.full((2, 4), torch.nan)
    for j in range(4):
        others = [i for i in range(sources) if i != j]
        rendered = [model._render_source(scene, i, cameras[j], 6)[0][:, 0] for i in range(sources)]
        apart = [(rendered[i] - targets[:, j]).abs().mean((1, 2, 3)) for i in others]
        if others:
            expected[:, j] = torch.stack(apart).mean(0)
        pairs += apart
        assert torch.allclose(renders[:, j], rendered[(j + 1) % sources], atol=1e-6)
    assert torch.allclose(distances, expected, atol=1e-6, equal_nan=True)
    assert distances.isnan().any(0).tolist() == [sources == 1, False, False, False]
    over_views, over_pairs = distances.nanmean(1), torch.stack(pairs).mean(0)
    assert torch.allclose(over_views, over_pairs, atol=1e-6) == (sources in (1, 4))  # views weigh alike, not pairs


def test_distances_that_are_not_finite_are_not_hidden(model):
    """Only pairs that are left out may be NaN without consequence."""
    cameras = instant3d_cameras()
    scene = model.reconstruct(torch.rand(1, 4, 3, 56, 56), cameras)
    broken = iter([torch.tensor([[torch.nan, 1.0, 1.0, torch.nan]]), *[torch.ones(1, 4)] * 3])
    distances, _ = model.compare(scene, cameras, 2, lambda renders: next(broken))
    assert distances.isnan().tolist() == [[False, False, False, True]] and (distances[:, :3] == 1).all()


def test_fewer_input_views_and_smaller_chunks_change_nothing_else(model, monkeypatch):
    views, cameras = torch.rand(1, 4, 3, 56, 56), instant3d_cameras()
    scene = model.reconstruct(views, cameras)
    images = [model._render_source(scene, i, cameras, 6)[0] for i in range(2)]
    monkeypatch.setattr(model, "input_views", 2)
    monkeypatch.setattr(model, "chunk_size", 50)
    monkeypatch.setattr("recon.openlrm.RECONSTRUCT_BATCH", 1)
    monkeypatch.setattr("recon.lrm.POINTS", 64)
    some = model.reconstruct(views, cameras)
    assert some.planes.shape[1] == 2 and len(some.sources) == 2
    for i in range(2):
        assert torch.allclose(model._render_source(some, i, cameras, 6)[0], images[i], atol=1e-4)
    monkeypatch.setattr(model, "input_views", 5)
    with pytest.raises(ValueError, match="recon.input_views = 5, but there are 4 views: choose 1 to 4"):
        model.reconstruct(views, cameras)


def test_rotating_the_world_changes_no_image(model):
    """Only the pose of the target relative to the source matters."""
    views = torch.rand(1, 4, 3, 56, 56)
    images = []
    for rotation in (0.0, 77.0):
        cameras = orbit_cameras(torch.tensor([225.0, 315, 45, 135]) + rotation, 20.0, 2.7, 50.0)
        scene = model.reconstruct(views, cameras)
        images.append(torch.stack([model._render_source(scene, i, cameras, 8)[0] for i in range(4)]))
    assert torch.allclose(*images, atol=1e-3)


def test_input_is_resized_with_aligned_corners(model):
    """28 pixels on 55: every second one is an old one. Nothing leaves [0, 1]."""
    images = (torch.rand(1, 3, 28, 28) > 0.5).float()
    resized = resize_input(images, 55)
    assert torch.allclose(resized[..., ::2, ::2], images, atol=1e-4)
    assert resized.min() == 0 and resized.max() == 1
    views = torch.rand(1, 4, 3, 64, 64)
    small = resize_input(views[0], 56)[None]
    assert torch.equal(model.reconstruct(views, model.cameras).planes, model.reconstruct(small, model.cameras).planes)


def test_half_precision_stops_at_the_planes():
    model = OpenLRM(**openlrm_config("b")).eval()
    decoder = [parameter.clone() for parameter in model.decoder.parameters()]
    model = model.set_dtype(torch.bfloat16)
    assert {key for key, value in model.state_dict().items() if value.dtype != torch.bfloat16} == {
        key for key in model.state_dict() if key.startswith("decoder.")
    }
    assert all(map(torch.equal, decoder, model.decoder.parameters()))
    scene = model.reconstruct(torch.rand(1, 4, 3, 70, 70), model.cameras)
    images, _ = model.render(scene, model.cameras, 4)
    assert scene.planes.dtype == images.dtype == torch.float32 and images.isfinite().all()


# -- cameras ------------------------------------------------------------------------------------------------------


def poses(name):
    """Golden poses (V, 3, 4) with OpenGL axes as (V, 4, 4)."""
    bottom = torch.tensor([0.0, 0, 0, 1]).expand(len(CAMERAS[name]), 1, 4)
    return torch.cat([CAMERAS[name], bottom], 1)


def test_poses_are_those_of_the_public_code():
    assert (flip_axes(look_at(CAMERAS["lookat/positions"])) - poses("lookat/c2w")).abs().max() < 1e-6
    for views, radius, height in (5, 1.7, 0.2), (8, 2.0, 0.8):
        azimuth = torch.linspace(-90, 270, views)
        orbit = orbit_cameras(azimuth, math.degrees(math.asin(height / radius)), radius, 60.0)
        assert (flip_axes(orbit.c2w) - poses(f"surround/n{views}_r{radius}_h{height}")).abs().max() < 1e-6


@pytest.mark.parametrize("distance", [None, 1.5, 2.0])
def test_the_source_is_moved_to_its_place(distance):
    cameras = Cameras(look_at(CAMERAS["lookat/positions"]), torch.tensor([0.75, 0.75, 0.5, 0.5]).expand(5, 4))
    moved = openlrm_canonical_cameras(cameras, cameras[0], distance)
    name = "auto" if distance is None else distance
    assert (flip_axes(moved.c2w) - poses(f"normalized/{name}")).abs().max() < 1e-6
    points = torch.rand(20, 3) - 0.5  # move with the cameras: every camera sees them where it saw them before
    transform = CAMERAS[f"normalized/{name}_transform"]
    there = points @ transform[:3, :3].T + transform[:3, 3]
    for before, after in zip(project(points, cameras), project(there, moved), strict=True):
        assert torch.allclose(before, after, atol=1e-5)


def test_the_object_stays_at_the_origin_and_distances_stay():
    cameras = instant3d_cameras()
    for source in range(4):
        moved = openlrm_canonical_cameras(cameras, cameras[source])
        pixels, depth = project(torch.zeros(1, 3), moved)
        assert torch.allclose(pixels, torch.full((4, 1, 2), 0.5), atol=1e-5)
        assert torch.allclose(depth, torch.full((4, 1), 2.7), atol=1e-5)
        up_in_view = project(torch.tensor([[0.0, 0, 0.3], [0.3, 0, 0]]), moved[source])[0][0]
        assert up_in_view[0, 1] < 0.45 and abs(up_in_view[0, 0] - 0.5) < 1e-5  # z is up in the source view
        assert up_in_view[1, 0] > 0.55 and abs(up_in_view[1, 1] - 0.5) < 1e-5  # and x to its right


def test_camera_vectors_there_and_back():
    focal, centre, size = CAMERAS["intrinsics/in"][0]
    intrinsics = torch.cat([focal / size, centre / size])
    camera = Cameras(look_at(CAMERAS["lookat/positions"][:1]), intrinsics[None])
    assert (lrm_source_vectors(camera) - CAMERAS["intrinsics/principle"]).abs().max() < 1e-6
    read = cameras_of_lrm(CAMERAS["intrinsics/standard"])
    assert (read.c2w - camera.c2w).abs().max() < 1e-6 and (read.fxfycxcy - camera.fxfycxcy).abs().max() < 1e-6
    default = Cameras(look_at((0.0, -2.0, 0.0))[None], torch.tensor([[0.75, 0.75, 0.5, 0.5]]))
    assert torch.equal(lrm_source_vectors(default), CAMERAS["default/source_camera"])


def test_rays_are_those_of_the_public_code(golden):
    _, data = golden
    origins, directions = rays(cameras_of_lrm(data["in/render_cameras"][0]), RENDER_SIZE)
    assert far_apart(origins, data["out/ray_origins_0"]) < 1e-6
    assert far_apart(directions, data["out/ray_dirs_0"]) < 1e-6


# -- published files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_the_full_size_has_the_published_keys_and_shapes(size):
    with torch.device("meta"):
        model = OpenLRM(**OPTIONS[size])
    published = {key: tuple(shape) for key, shape in MANIFEST[size]["tensors"].items()}
    assert OPTIONS[size] == MANIFEST[size]["config"] and model.input_size == MANIFEST[size]["input_size"]
    assert published_shapes(model) == published
    weights = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    converted = convert_openlrm(weights, model)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert sum(value.numel() for value in converted.values()) == sum(math.prod(shape) for shape in published.values())


def test_names():
    assert published_name("encoder.encoder.layer.3.attention.k_proj.bias") == "encoder.model.blocks.3.attn.qkv.bias"
    assert published_name("encoder.encoder.layer.0.layer_scale2.lambda1") == "encoder.model.blocks.0.ls2.gamma"
    assert published_name("transformer.layers.1.mlp.2.weight") == "transformer.layers.1.mlp.3.weight"


@pytest.fixture
def folder(tmp_path):
    """The tiny model a as it would be published, and its weights."""
    weights = golden_weights(load_file(GOLDEN / "openlrm_tiny_a.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(openlrm_config("a")))
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path, weights


def test_a_published_folder(folder, model):
    for path in (folder[0], folder[0] / "model.safetensors"):
        loaded = OpenLRM.from_pretrained(path)
        assert not loaded.training and loaded.input_size == 56
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def replace_weights(change):
    def spoil(path, weights):
        save_file(change(weights), path / "model.safetensors")

    return spoil


def truncate(path, _):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def configure(**entries):
    def spoil(path, _):
        (path / "config.json").write_text(json.dumps(dict(openlrm_config("a"), **entries)))

    return spoil


@pytest.mark.parametrize(
    "spoil, error, sentence",
    [
        (lambda path, _: (path / "config.json").unlink(), FileNotFoundError, "has no config.json: give"),
        (lambda path, _: (path / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors: give"),
        (lambda path, _: (path / "config.json").write_text("{"), ValueError, "config.json could not be read as JSON"),
        (configure(num_views=4), ValueError, "config.json is not the configuration of .*num_views"),
        (configure(encoder_type="dino"), ValueError, "encoder is 'dino' .* give a model of version 1.1"),
        (configure(encoder_feat_dim=384), ValueError, "encoder_feat_dim = 384 must be the width of its encoder, 24"),
        (configure(triplane_high_res=64), ValueError, "triplane_high_res = 64 must be twice triplane_low_res = 6"),
        (configure(input_size=None), ValueError, "not for 32: give input_size"),
        (truncate, ValueError, "model.safetensors could not be read .* download it again"),
        (
            replace_weights(lambda weights: dict(list(weights.items())[: len(weights) // 2])),
            ValueError,
            r"not the weights of this OpenLRM: \d+ missing .* Give the model.safetensors",
        ),
        (replace_weights(lambda _: {"conv_in.weight": torch.zeros(2)}), ValueError, r"1 unknown \(conv_in.weight\)"),
        (configure(triplane_dim=4), ValueError, r"of another shape .*upsampler.bias: \(8,\) instead of \(4,\)"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_sentence(folder, spoil, error, sentence):
    spoil(*folder)
    with pytest.raises(error, match=sentence):
        OpenLRM.from_pretrained(folder[0])
