"""OpenLRM against what the public implementation computes with small random weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recon.cameras import (
    Cameras,
    cameras_of_openlrm,
    flip_axes,
    instant3d_cameras,
    look_at,
    openlrm_canonical_cameras,
    openlrm_source_vectors,
    orbit_cameras,
    project,
    rays,
)
from recon.openlrm import OPTIONS, OpenLRM, resize_input
from recon.openlrm_checkpoint import convert_openlrm, published_name, published_shapes
from recon.volume_rendering import blurred_importance_depths, sample_planes, stratified_depths

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "openlrm_manifest.json").read_text())
CAMERAS = load_file(GOLDEN / "openlrm_cameras.safetensors")
RENDER_SIZE, REGION = 10, (slice(3, 8), slice(5, 10))


def golden_config(name):
    """config.json of the tiny model `name`, in the words of the published ones."""
    with safe_open(GOLDEN / f"openlrm_tiny_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    encoder = config.pop("enc")
    overrides = dict(
        hidden_size=encoder["dim"], num_hidden_layers=encoder["depth"], num_attention_heads=encoder["heads"],
        image_size=encoder["img_size"])
    return dict(config, encoder_model_name="dinov2_vits14_reg", encoder_feat_dim=encoder["dim"],
                input_size={"a": 56, "b": 70}[name], encoder_overrides=overrides)


def golden_weights(data):
    return {key[2:]: value for key, value in data.items() if key.startswith("w/")}


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request):
    """A tiny model and the tensors of its file."""
    data = load_file(GOLDEN / f"openlrm_tiny_{request.param}.safetensors")
    model = OpenLRM(**golden_config(request.param)).eval().requires_grad_(False)
    model.load_state_dict(convert_openlrm(golden_weights(data), model))
    return model, data


def far_apart(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


# -- the network --------------------------------------------------------------------------------------------------


def test_image_to_planes(golden):
    model, data = golden
    image, source = data["in/image01"], data["in/source_camera"]
    assert far_apart(model.features(image), data["out/encoder_feats"]) < 5e-5
    assert far_apart(model.camera_embedder(source), data["out/camera_embed"]) < 5e-5
    assert far_apart(model.tokens(image, source), data["out/tokens"]) < 5e-5
    assert far_apart(model.planes(image, source), data["out/planes"]) < 5e-5


def test_points_in_and_outside_the_box(golden):
    """Points outside have features of zero, and the decoder's density and colour of that; only rendering empties them."""
    model, data = golden
    features = sample_planes(data["out/planes"], data["in/points"])
    assert far_apart(features, data["out/points_sampled"].transpose(1, 2).flatten(2)) < 5e-5
    density, colour = model.decoder(features)
    assert far_apart(density, data["out/points_sigma"][..., 0]) < 5e-5
    assert far_apart(colour, data["out/points_rgb"]) < 5e-5
    outside = (data["in/points"].abs() > 1).any(-1)
    assert outside.any() and (density[outside] > 0).all()
    assert (model.decoder.density(model.field(data["out/planes"])(data["in/points"])[0])[outside] == 0).all()


# -- rendering ----------------------------------------------------------------------------------------------------


def golden_rays(data):
    """Origins and directions (B, M size^2, 3) of the render cameras."""
    return (x.flatten(1, 2) for x in rays(cameras_of_openlrm(data["in/render_cameras"]), RENDER_SIZE))


def as_images(values, views):
    """(B, M S S, channels) -> (B, M, channels, S, S)."""
    return values.unflatten(1, (views, RENDER_SIZE, RENDER_SIZE)).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("name, options", [
    ("render_q25", dict(jitter=0.25)),
    ("render_mid", dict(jitter=0.5)),
    ("render_q25_coarse_only", dict(jitter=0.25, fine=False)),
    ("render_mid_coarse_only", dict(jitter=0.5, fine=False)),
    ("render_noise", dict(jitter="in/noise_stratified", u="in/noise_importance")),
    ("render_mid_region5_anchor3_5_bg.25", dict(jitter=0.5, background=0.25)),
])
def test_renders(golden, name, options):
    model, data = golden
    B, M = data["in/render_cameras"].shape[:2]
    given = {key: data[value].unflatten(0, (B, M)).flatten(1, 2) if isinstance(value, str) else value
             for key, value in options.items()}
    colour, alpha = model.render_rays(data["out/planes"], *golden_rays(data), **given)
    colour, alpha = as_images(colour, M), as_images(alpha[..., None], M)
    if "region" in name:  # a part of the picture is the picture of a part of the rays
        colour, alpha = colour[..., *REGION], alpha[..., *REGION]
    assert far_apart(colour, data[f"out/{name}/images_rgb"]) < 2e-4
    assert far_apart(alpha, data[f"out/{name}/images_weight"]) < 2e-4
