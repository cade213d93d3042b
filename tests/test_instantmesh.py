"""InstantMesh against what the public implementation computes with small random weights, its files, and its cameras."""

import json
import math
import os
import sys
import warnings
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from config import base, dgx, tiny
from config.validate import validate
from diffusers_patch.loading import check_cameras
from mrc import LPIPS, MRC
from mrc.mrc import resize_views
from recon import load_reconstructor, reconstructor_cameras, volume_rendering
from recon.cameras import (
    RIGS,
    Cameras,
    cameras_of_lrm,
    flip_axes,
    look_at,
    lrm_source_vectors,
    orbit_cameras,
    rays,
    zero123plus_cameras,
)
from recon.instantmesh import InstantMesh, far_from_training
from recon.instantmesh_checkpoint import (
    OPTIONS,
    PREFIX,
    configuration,
    convert_instantmesh,
    published_name,
    published_weights,
)
from recon.volume_rendering import box_interval, composite, sample_planes
from tests.tiny_models import GOLDEN, SMALL_RECONSTRUCTORS
from tools.convert_instantmesh import main as convert_main
from tools.plan import complete
from tools.rehearsal.checkpoints import INSTANTMESH, save_as_lightning
from tools.validate_mrc import DISTANCE, experiment, fitted_cameras

MANIFEST = json.loads((GOLDEN / "instantmesh_manifest.json").read_text())
CAMERAS = load_file(GOLDEN / "instantmesh_cameras.safetensors")
SIZE = 12  # of the golden renders


def golden_weights(data):
    return {PREFIX + key[2:]: value for key, value in data.items() if key.startswith("w/")}


def golden_model(name, data):
    with safe_open(GOLDEN / f"instantmesh_tiny_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = InstantMesh(
        **config["model"],
        input_size=data["in/images"].shape[-1],
        colour_mean=config["preprocess"]["mean"],
        colour_std=config["preprocess"]["std"],
        encoder_overrides=config["vit"],
    )
    model.load_state_dict(convert_instantmesh(golden_weights(data), model))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request):
    """A tiny model and the tensors of its file."""
    data = load_file(GOLDEN / f"instantmesh_tiny_{request.param}.safetensors")
    return golden_model(request.param, data), data


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SMALL_RECONSTRUCTORS["instantmesh"]().eval().requires_grad_(False)


def far_apart(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


# -- the network --------------------------------------------------------------------------------------------------


def test_a_view_to_features(golden):
    model, data = golden
    views, sources = data["in/images"], data["in/cameras"].flatten(0, 1)
    assert far_apart(model.camera_embedder(data["in/cameras"]), data["out/camera_embed"]) < 5e-6
    pixels = model.network_input(views.flatten(0, 1))
    assert far_apart(pixels[:1], data["out/pixel_values_00"]) < 1e-6
    embeddings = model.encoder.embed(pixels)
    assert far_apart(embeddings, data["out/vit_embeddings"]) < 5e-6
    first = model.encoder.layer(0, embeddings, model.camera_embedder(sources))
    assert far_apart(first, data["out/vit_layer0"]) < 5e-6
    assert far_apart(model.features(views.flatten(0, 1), sources), data["out/encoder_feats"]) < 5e-5
    wide = data["in/images_alt"].flatten(0, 1)  # not square, and not of the encoder's own size
    assert far_apart(model.features(wide, sources), data["out/encoder_feats_alt"]) < 5e-5


def test_views_to_planes(golden):
    model, data = golden
    given, seen = (data["in/images"], data["in/cameras"]), []
    hook = model.transformer.layers[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    assert far_apart(model.tokens(*given), data["out/tokens"]) < 5e-5
    hook.remove()
    assert far_apart(seen[0], data["out/layer0_tokens"]) < 5e-5
    assert far_apart(model.planes(*given), data["out/planes"]) < 5e-5


def test_planes_in_float64():
    for name in "ab":
        data = load_file(GOLDEN / f"instantmesh_tiny_{name}.safetensors")
        model = golden_model(name, data).double()
        assert (
            far_apart(model.planes(data["in/images"].double(), data["in/cameras"].double()), data["out64/planes"])
            < 5e-6
        )


def test_points_in_and_outside_the_box(golden):
    """Points outside have features of zero and the decoder's density of that; only rendering empties them."""
    model, data = golden
    features = sample_planes(data["out/planes"], data["in/points"])
    assert far_apart(features, data["out/points_sampled"].transpose(1, 2).flatten(2)) < 5e-5
    raw, colour = model.decoder.raw(features)
    assert far_apart(raw, data["out/points_sigma_raw"][..., 0]) < 3e-4
    assert far_apart(model.decoder.density(raw), data["out/points_sigma"][..., 0]) < 3e-4
    assert far_apart(colour, data["out/points_rgb"]) < 5e-5
    outside = (data["in/points"].abs() > 1).any(-1)
    assert outside.any() and (model.field(data["out/planes"])(data["in/points"])[0][outside] == -math.inf).all()


def test_the_grid_of_a_mesh(golden):
    """The radiance field of a scene, on the grid that the public code extracts meshes from."""
    model, data = golden
    axis = torch.linspace(-1, 1, 5)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(1, -1, 3)
    for b in range(len(data["out/planes"])):
        scene = volume_rendering.Triplane(data["out/planes"][b : b + 1])
        density, colour = model.radiance_field(scene)(points)
        assert far_apart(density[0], data["out/grid5_sigma"][b].flatten()) < 3e-4
        assert far_apart(colour[0], data["out/grid5_rgb"][b].flatten(0, 2)) < 5e-5


# -- rendering ----------------------------------------------------------------------------------------------------


def per_scene(values, data):
    """(B M, rays, ...) -> (B, M rays, ...)"""
    return values.unflatten(0, data["in/render_cameras"].shape[:2]).flatten(1, 2)


def golden_rays(data):
    """Origins and directions (B, M SIZE^2, 3), of which the third camera is skewed."""
    return per_scene(data["out/ray_origins"], data), per_scene(data["out/ray_dirs"], data)


def as_images(values):
    """(B, M SIZE^2, channels) -> (B, M, channels, SIZE, SIZE)"""
    return values.unflatten(1, (-1, SIZE, SIZE)).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(
    "name, options",
    [
        ("render_q25", dict(jitter=0.25)),
        ("render_mid", dict()),
        ("render_mid_coarse_only", dict(fine=False)),
        ("render_noise", dict(jitter="in/noise_stratified", u="in/noise_importance")),
        ("render_mid_crop_2_3_5_7", dict()),
    ],
)
def test_renders(golden, name, options, monkeypatch):
    """Colour and alpha; and depths and weights, through the depth images that the public code makes of them."""
    model, data = golden
    options = {key: per_scene(data[value], data) if isinstance(value, str) else value for key, value in options.items()}
    passes = record_passes(monkeypatch)
    colour, alpha = model.render_rays(data["out/planes"], *golden_rays(data), **options)
    depths, weights = passes[-1]
    depth = (weights * (depths[..., 1:] + depths[..., :-1]) / 2).sum(-1)
    empty = data[f"out/{name}/images_depth"].min()  # the smallest depth of the call's samples, shown where nothing is
    images = {
        "images_rgb": as_images(colour),
        "images_weight": as_images(alpha[..., None]),
        "images_depth": as_images(depth[..., None]).clamp(min=empty),
    }
    if "crop" in name:  # of an image is the image of a part of the rays
        images = {key: value[..., 2:7, 3:10] for key, value in images.items()}
    for key, tolerance in (("images_rgb", 5e-4), ("images_weight", 5e-4), ("images_depth", 2e-3)):
        assert far_apart(images[key], data[f"out/{name}/{key}"]) < tolerance, key


def record_passes(monkeypatch):
    """A list to which every pass of rendering adds its depths (B, R, D) and weights (B, R, D - 1)."""
    passes = []

    def record(depths, *args, **kwargs):
        composited = composite(depths, *args, **kwargs)
        passes.append((depths, composited[2]))
        return composited

    monkeypatch.setattr(volume_rendering, "composite", record)
    return passes


def test_depths_and_weights_of_both_passes(golden, monkeypatch):
    model, data = golden
    passes = record_passes(monkeypatch)
    model.render_rays(data["out/planes"], *golden_rays(data))
    (coarse, weights), (both, _) = passes
    near, far = (per_scene(data[f"out/{key}"], data)[..., 0] for key in ("near", "far"))
    hit = near > -1  # -1 and -2 are those of a ray that misses the box
    ours = box_interval(*golden_rays(data))
    assert hit.any() and not hit.all() and torch.equal(ours[0] < ours[1], hit)
    assert far_apart(ours[0][hit], near[hit]) < 2e-4 and far_apart(ours[1][hit], far[hit]) < 2e-4
    golden_coarse, golden_weights, fine = (
        per_scene(data[f"out/render_mid/{key}"], data)[hit]
        for key in ("depths_coarse", "weights_coarse", "depths_fine")
    )
    assert far_apart(coarse[hit], golden_coarse) < 2e-4 and far_apart(weights[hit], golden_weights) < 5e-4
    assert far_apart(both[hit], torch.cat([golden_coarse, fine], -1).sort(-1)[0]) < 5e-4
    assert (weights[~hit] == 0).all()


@pytest.mark.parametrize("name", "ab")
def test_views_to_a_scene_to_images(name):
    """The golden renders through the protocol of reconstructors, without the skewed camera."""
    data = load_file(GOLDEN / f"instantmesh_tiny_{name}.safetensors")
    model = golden_model(name, data)
    vectors = data["in/cameras"]
    c2w = torch.cat(
        [vectors[..., :12].unflatten(-1, (3, 4)), torch.tensor([0.0, 0, 0, 1]).expand(*vectors.shape[:2], 1, 4)], -2
    )
    sources = Cameras(flip_axes(c2w), vectors[..., 12:])
    assert torch.equal(lrm_source_vectors(sources), vectors)
    scene = model.reconstruct(data["in/images"], sources)
    assert far_apart(scene.planes, data["out/planes"]) < 5e-5
    seen = cameras_of_lrm(data["in/render_cameras"][:, :2])
    images, alpha = model.render(scene, seen, SIZE)
    assert far_apart(images, data["out/render_mid/images_rgb"][:, :2].clamp(0, 1)) < 5e-4
    assert far_apart(alpha, data["out/render_mid/images_weight"][:, :2]) < 5e-4


def test_half_precision_stops_at_the_planes():
    data = load_file(GOLDEN / "instantmesh_tiny_a.safetensors")
    views, cameras = data["in/images"], zero123plus_cameras()
    exact = golden_model("a", data).reconstruct(views, cameras)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        model = golden_model("a", data).set_dtype(dtype)
        kinds = Counter(value.dtype for key, value in model.state_dict().items() if not key.startswith("decoder."))
        assert list(kinds) == [dtype] and model.decoder.net[0].weight.dtype == torch.float32
        scene = model.reconstruct(views, cameras)
        images, _ = model.render(scene, cameras, 4)
        assert scene.planes.dtype == images.dtype == torch.float32
        assert 0 < (scene.planes - exact.planes).abs().mean() < tolerance


# -- cameras ------------------------------------------------------------------------------------------------------


def test_poses_are_those_of_the_public_code():
    assert far_apart(flip_axes(look_at(CAMERAS["lookat/position"])), CAMERAS["lookat/c2w"]) < 1e-6
    azimuth, elevation = CAMERAS["spherical/azimuth_deg"], CAMERAS["spherical/elevation_deg"]
    orbit = orbit_cameras(azimuth, elevation, CAMERAS["spherical/radius"].item(), 30.0)
    assert far_apart(flip_axes(orbit.c2w), CAMERAS["spherical/c2w"]) < 1e-6
    for degrees, K in zip(CAMERAS["intrinsics/fov_deg"], CAMERAS["intrinsics/K"], strict=True):
        assert orbit_cameras([0.0], 0.0, 1.0, degrees.item()).fxfycxcy[0, 0] == pytest.approx(K[0, 0].item(), rel=1e-6)


def test_the_rig_that_it_was_trained_for():
    vectors = lrm_source_vectors(RIGS["zero123plus"](0.0))
    assert far_apart(vectors, CAMERAS["zero123plus/r4.0_fov30"][0]) < 1e-6
    four = CAMERAS["zero123plus/four_views_index"]
    assert far_apart(vectors[four], CAMERAS["zero123plus/r4.0_fov30_four_views"][0]) < 1e-6


def test_rays_and_their_ranges_are_those_of_the_public_code(golden):
    _, data = golden
    for size in (6, 9):
        origins, directions = rays(cameras_of_lrm(CAMERAS["rays/cameras"]), size)
        square = [0, 1]  # the third camera is skewed
        assert far_apart(origins[square], CAMERAS[f"rays/size{size}_origins"][square]) < 1e-6
        assert far_apart(directions[square], CAMERAS[f"rays/size{size}_dirs"][square]) < 1e-6
    inside, *parallel, missing = zip(CAMERAS["rays/special_origins"][0], CAMERAS["rays/special_dirs"][0], strict=True)
    near, far = CAMERAS["rays/special_near"][0, :, 0], CAMERAS["rays/special_far"][0, :, 0]
    for i, ray in enumerate(parallel, 1):
        ours = box_interval(*ray)
        assert ours[0].item() == pytest.approx(near[i].item(), abs=2e-4)
        assert ours[1].item() == pytest.approx(far[i].item(), abs=2e-4)
    # unlike there, what lies behind a camera is not shown
    assert near[0] < 0 and box_interval(*inside)[0] == 0 and box_interval(*inside)[1] == pytest.approx(far[0].item())
    assert box_interval(*missing)[0] >= box_interval(*missing)[1]


def test_views_are_resized_as_in_training():
    for size in (14, 32):
        assert far_apart(resize_views(CAMERAS["resize/in"], size), CAMERAS[f"resize/out{size}"]) < 1e-5


def recon_config(**entries):
    config = base.get_config().recon
    with config.unlocked():
        config.update(name="instantmesh", **entries)
    return config


@pytest.fixture
def checkpoint(model, tmp_path):
    save_as_lightning(model, tmp_path / "small.ckpt")
    return tmp_path / "small.ckpt"


@pytest.mark.parametrize("cameras, views", [("instant3d", 4), ("mvdream", 4), ("zero123plus", 6)])
def test_every_rig_is_judged(cameras, views, checkpoint, monkeypatch):
    """MRC of views of a rig, known before weights are loaded and near what the model was trained on."""
    config = recon_config(cameras=cameras, elevation=10.0, checkpoint=str(checkpoint))
    wanted = reconstructor_cameras(config)
    assert len(wanted) == views and not far_from_training(wanted).any()
    if cameras == "mvdream":
        assert torch.allclose(wanted.elevation, torch.tensor(10.0))
    model = load_reconstructor(config)
    model.samples = 8
    assert model.num_views == views and torch.equal(model.cameras.c2w, wanted.c2w) and model.input_size == 320
    monkeypatch.setattr(model, "input_size", 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="InstantMesh was given")
        results = experiment(MRC(model, LPIPS(), render_size=32), 2, 32, [("hue", 60.0)])
    assert all(len(scores) == 2 and min(scores) > 0 for kind in results.values() for scores in kind.values())


def test_objects_of_the_sanity_experiment_look_alike_in_every_rig():
    """The half width of a view at the object is the same whatever the field of view."""
    for rig in RIGS.values():
        fitted = fitted_cameras(rig(15.0))
        assert torch.allclose(
            fitted.radius / fitted.fxfycxcy[:, 0], DISTANCE / orbit_cameras([0.0], 0, 1, 50.0).fxfycxcy[0, 0]
        )
    assert torch.allclose(fitted_cameras(RIGS["instant3d"](0.0)).c2w, RIGS["instant3d"](0.0).c2w)


def test_cameras_far_from_the_training_are_warned_of_once(model, monkeypatch):
    monkeypatch.setattr(model, "_warned", False)
    views = torch.rand(1, 4, 3, 32, 32)
    far = orbit_cameras([0.0, 90.0, 180.0, 270.0], 0.0, 1.5, 30.0)
    with pytest.warns(
        UserWarning, match=r"view of 30 degrees, 1.50 from the object, but was trained near 50 and 1.4 to"
    ):
        model.reconstruct(views, far)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.reconstruct(views, far)
    for radius, fov, expected in ((2.7, 50.0, False), (4.0, 30.0, False), (5.0, 50.0, True), (2.7, 70.0, True)):
        assert far_from_training(orbit_cameras([0.0], 0.0, radius, fov)).item() is expected


@pytest.mark.parametrize("run", ["mvdream_instantmesh", "instant3d_instantmesh", "mvdream_instantmesh(24)"])
def test_runs_of_the_paper_with_it(run):
    config = validate(complete(dgx.get_config(run)), 8, "cuda", check_files=False)
    check_cameras(config)
    assert config.recon.name == "instantmesh" and config.recon.remove_background == run.startswith("mvdream")
    config.recon.cameras = "zero123plus"
    with pytest.raises(
        ValueError, match="paints 4 views and the reconstructor takes 6; set it to '(mvdream|instant3d)'"
    ):
        check_cameras(config)


def test_the_painter_is_compared_with_the_rig_chosen():
    config = dgx.get_config("mvdream_instantmesh")
    config.painter.elevation = 25.0
    words = r"recon.cameras = 'mvdream': elevations are 25/.*set it to 'mvdream' and config.recon.elevation to 25$"
    with pytest.raises(ValueError, match=words):
        check_cameras(config)
    config.recon.elevation, config.painter.azimuth_start = 25.0, 90.0
    check_cameras(config)


def test_rigs_are_refused_where_nobody_reads_them():
    config = tiny.get_config()
    config.recon.cameras = "mvdream"
    with pytest.raises(
        ValueError, match="config.recon.cameras is 'mvdream', which only the reconstructor 'instantmesh'"
    ):
        validate(config, 1, check_files=False)
    config.recon.name, config.recon.cameras, config.recon.elevation = "instantmesh", "instant3d", 20.0
    with pytest.raises(ValueError, match="config.recon.elevation is 20.0, which only config.recon.cameras = 'mvdream'"):
        validate(config, 1, check_files=False)


# -- published files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, count, numbers", [("base", 431, 313_249_004), ("large", 495, 378_477_332)])
def test_the_full_size_has_the_published_keys_and_shapes(size, count, numbers):
    """Both ways, and the size is recognised by its shapes."""
    published = {key: torch.empty(shape, device="meta") for key, shape in MANIFEST[size]["tensors"].items()}
    assert len(published) == count and sum(value.numel() for value in published.values()) == numbers
    assert configuration(published) == OPTIONS[size] == MANIFEST[size]["_meta"]["model_config"]
    with torch.device("meta"):
        model = InstantMesh(**OPTIONS[size])
    ours = published_weights(model)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in published.items()}
    model.load_state_dict(convert_instantmesh(published, model), assign=True)
    vit = MANIFEST[size]["_meta"]["vit_config"]
    assert {key: getattr(model.encoder.vit.config, key) for key in vit} == vit and model.input_size == 320


def test_names():
    assert published_name("encoder.vit.layers.3.attention.k_proj.bias") == (
        "lrm_generator.encoder.model.encoder.layer.3.attention.attention.key.bias"
    )
    assert published_name("encoder.modulations.10.weight") == (
        "lrm_generator.encoder.model.encoder.layer.10.adaLN_modulation.1.weight"
    )
    assert published_name("transformer.layers.1.mlp.2.weight") == "lrm_generator.transformer.layers.1.mlp.3.weight"


def test_a_small_file_is_understood(model, checkpoint):
    """From its shapes alone, but for the samples of a ray and the size of the views, which are the published ones."""
    loaded = InstantMesh.from_pretrained(checkpoint)
    assert not loaded.training and (loaded.samples, loaded.input_size) == (96, 320)
    assert configuration(published_weights(model)) == {
        **{key: value for key, value in INSTANTMESH.items() if key != "input_size"},
        "encoder_model_name": "facebook/dino-vitb16",
        "encoder_freeze": False,
        "rendering_samples_per_ray": 96,
    }
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_converter(model, checkpoint, tmp_path, monkeypatch, capsys):
    """Its file is the same model under the published names, and all that is left beside it."""
    save_as_lightning(model, checkpoint, state_dict={**published_weights(model), "lpips.weight": torch.ones(2)})
    out = tmp_path / "folder" / "small.safetensors"
    monkeypatch.setattr(sys, "argv", ["convert_instantmesh", str(checkpoint), str(out)])
    convert_main()
    assert f"wrote {out}" in capsys.readouterr().out
    written = load_file(out)
    assert written.keys() == published_weights(model).keys() and os.listdir(out.parent) == [out.name]
    assert all(torch.equal(value, written[key]) for key, value in published_weights(model).items())
    loaded = InstantMesh.from_pretrained(out)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    monkeypatch.setattr(sys, "argv", ["convert_instantmesh", str(checkpoint), str(tmp_path / "out.ckpt")])
    with pytest.raises(SystemExit, match="2"):
        convert_main()
    assert "out.ckpt': name a file that ends in .safetensors" in capsys.readouterr().err


def test_a_hub_id_is_that_of_the_large_model(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr("recon.weights.hub_trouble", lambda *_: "")
    monkeypatch.setattr("recon.weights.hf_hub_download", lambda *names: asked.append(names) or checkpoint)
    InstantMesh.from_pretrained("TencentARC/InstantMesh")
    assert asked == [("TencentARC/InstantMesh", "instant_nerf_large.ckpt")]


class Code:
    """Unpickled carelessly, runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("entry", ["state_dict", "hyper_parameters"])
def test_code_is_refused_and_never_runs(model, checkpoint, tmp_path, entry):
    trace = tmp_path / "ran"
    save_as_lightning(model, checkpoint, **{entry: Code(f"touch {trace}")})
    with pytest.raises(
        ValueError, match=r"was refused, and no code in it was run, because it holds \S*\.system besides"
    ):
        InstantMesh.from_pretrained(checkpoint)
    assert not trace.exists()
    torch.load(checkpoint, weights_only=False)
    assert trace.exists()  # it would have run


def changed(change):
    def spoil(model, file):
        save_as_lightning(model, file, state_dict=change(published_weights(model)))

    return spoil


def without(weights, *names):
    return {key: value for key, value in weights.items() if not key.startswith(tuple(PREFIX + name for name in names))}


def truncate(_, file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "spoil, error, sentence",
    [
        (
            lambda _, file: file.unlink(),
            FileNotFoundError,
            "small.ckpt' does not exist .*: give .* instant_nerf_base.ckpt",
        ),
        (truncate, ValueError, "small.ckpt could not be read .* download it again"),
        (lambda _, file: file.write_text("<html>"), ValueError, "small.ckpt was refused, and no code in it was run"),
        (
            changed(
                lambda w: without(w, "synthesizer") | {f"{PREFIX}synthesizer.decoder.net_sdf.0.bias": torch.ones(2)}
            ),
            ValueError,
            r"mesh stage \(instant_mesh_\*.ckpt\), .*: give its NeRF stage, instant_nerf_base.ckpt or instant_nerf",
        ),
        (
            changed(lambda w: {"a": torch.ones(2)}),
            ValueError,
            r"not the weights of InstantMesh, of whose lrm_generator",
        ),
        (changed(lambda w: {}), ValueError, r"not the weights of InstantMesh, of whose lrm_generator"),
        (
            changed(lambda w: without(w, "transformer.norm.bias", "encoder.camera_embedder.0")),
            ValueError,
            r"small.ckpt' cannot be used. These are not the weights of this InstantMesh: 3 missing .* Give the",
        ),
        (
            changed(lambda w: w | {f"{PREFIX}transformer.norm.bias": torch.ones(3)}),
            ValueError,
            r"1 of another shape \(lrm_generator.transformer.norm.bias: \(3,\) instead of \(64,\)\)",
        ),
        (changed(lambda w: w | {f"{PREFIX}extra": torch.ones(3)}), ValueError, r"1 unknown \(lrm_generator.extra\)"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_sentence(model, checkpoint, spoil, error, sentence):
    spoil(model, checkpoint)
    with pytest.raises(error, match=sentence):
        InstantMesh.from_pretrained(checkpoint)


def test_a_published_size_with_fewer_layers_is_incomplete():
    """Layers that are missing as a whole do not make it a smaller model."""
    weights = {key: torch.empty(shape, device="meta") for key, shape in MANIFEST["base"]["tensors"].items()}
    weights = without(weights, "transformer.layers.11.")
    with torch.device("meta"):
        model = InstantMesh(**configuration(weights))
    with pytest.raises(ValueError, match="not the weights of this InstantMesh: 16 missing"):
        convert_instantmesh(weights, model)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "views, cameras, sentence",
    [
        (
            (1, 5, 3, 32, 32),
            4,
            r"views of shape \(1, 5, 3, 32, 32\) for 4 cameras, but takes \(B, 4, 3, 32, 32\): give one",
        ),
        ((1, 3, 3, 32, 32), 3, "was given 3 cameras: give 4 to 6, and a view for each"),
        ((1, 7, 3, 32, 32), 7, "was given 7 cameras: give 4 to 6"),
        ((1, 4, 3, 40, 40), 4, "resized to its input_size"),
    ],
)
def test_views_that_do_not_fit_are_refused(model, views, cameras, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.reconstruct(torch.rand(views), orbit_cameras(torch.arange(cameras) * 50.0, 10.0, 2.7, 50.0))


def test_sizes_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="views of 32 x 36 pixels, which its patches of 8 x 8 do not divide: resize"):
        model.features(torch.rand(1, 3, 32, 36), torch.rand(1, 16))
    for entries, sentence in (
        (dict(input_size=36), "input_size = 36 must be a multiple of its encoder's patch_size = 8"),
        (dict(encoder_feat_dim=32), "encoder_feat_dim = 32 must be the width of its encoder, 64"),
        (dict(encoder_model_name="dinov2"), "encoder is 'dinov2', but only 'facebook/dino-vitb16' is known"),
    ):
        with pytest.raises(ValueError, match=sentence):
            InstantMesh(**INSTANTMESH | entries)
    with pytest.raises(ValueError, match=r"wants \(B, 4, 3, S, S\)"):
        MRC(model, LPIPS())(torch.rand(1, 5, 3, 32, 32))
