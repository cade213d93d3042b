"""MVDream against what the public implementation computes with small random weights."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from config import base, tiny
from config.errors import UnwritableError
from config.validate import validate
from ddpo.checkpoint import checkpoints
from ddpo.final import python_code
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.loading import check_cameras, load_painter
from diffusers_patch.mvdream import MVDream, convert_mvdream_unet, ldm_name, let_views_attend
from diffusers_patch.mvdream_checkpoints import load_mvdream_pipeline
from recon.cameras import Cameras, mvdream_camera_vectors, mvdream_cameras, project
from tests import children
from tests.tiny_models import FEW_FILES, letter_tokenizer, make_mvdream, make_world, settings
from tiny.train_painter import make_tokenizer
from tools import convert_mvdream
from tools.rehearsal.checkpoints import LATENT

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "mvdream_manifest.json").read_text())
SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    clip_sample=False,
    set_alpha_to_one=False,
)


def golden_unet(name):
    """The tiny UNet `name`, and the file's other tensors."""
    file = GOLDEN / f"mvdream_tiny_{name}.safetensors"
    with safe_open(file, "pt") as header:
        config = json.loads(header.metadata()["stock_config"])
    data = load_file(file)
    weights = {key[2:]: value.float() for key, value in data.items() if key.startswith("w/")}
    return convert_mvdream_unet(weights, **config).eval(), data


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("views, output", [(4, "out/eps"), (1, "out/eps_num_frames_1")])
def test_tiny_unets(name, views, output):
    unet, data = golden_unet(name)
    let_views_attend(unet, views=views)
    with torch.no_grad():
        ours = unet(data["in/latents"], data["in/timesteps"], data["in/context"], class_labels=data["in/camera"]).sample
    assert (ours - data[output]).abs().max() < 2e-5


def test_without_cameras_it_refuses():
    unet, data = golden_unet("b")
    with pytest.raises(ValueError, match="class_labels"):
        unet(data["in/latents"], data["in/timesteps"], data["in/context"])


def on_meta(manifest):
    return {key: torch.empty(shape, device="meta") for key, shape in manifest.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_full_size_has_the_published_keys_and_shapes(prefix):
    unet = convert_mvdream_unet({prefix + key: value for key, value in on_meta(MANIFEST["ldm"]).items()})
    assert {key: list(value.shape) for key, value in unet.state_dict().items()} == MANIFEST["stock"]
    assert {ldm_name(key, unet.config): key for key in unet.state_dict()} == MANIFEST["names"]
    assert len(MANIFEST["names"]) == 690


def test_weights_that_are_missing_unknown_or_of_another_shape_are_listed():
    weights = on_meta(MANIFEST["ldm"])
    del weights["camera_embed.0.weight"]
    weights["image_embed.proj.weight"] = torch.empty(3, device="meta")
    weights["out.2.bias"] = torch.empty(8, device="meta")
    with pytest.raises(ValueError) as error:
        convert_mvdream_unet(weights)
    for part in (
        "1 missing (camera_embed.0.weight)",
        "1 unknown (image_embed.proj.weight)",
        "1 of another shape (out.2.bias: (8,) instead of (4,))",
    ):
        assert part in str(error.value)


def golden_policy():
    """The tiny UNet a as a policy on the conditioning of the golden trajectories."""
    unet, _ = golden_unet("a")
    data = load_file(GOLDEN / "mvdream_tiny_a_ddim.safetensors")
    model = torch.nn.Identity()
    cameras = mvdream_cameras(elevation=0.0, azimuth_start=90.0)
    policy = MVDream(
        SimpleNamespace(unet=unet, vae=model, text_encoder=model, scheduler=SCHEDULER),
        cameras,
        mvdream_camera_vectors(cameras),
    )
    policy._embeddings[""] = {"prompt_embeds": data["in/uncond_context"][:1]}
    return policy, data


@pytest.mark.parametrize("steps, eta, guidance", [(5, 0.0, 7.5), (4, 1.0, 5.0)])
def test_ddim_trajectories_with_guidance(steps, eta, guidance):
    policy, data = golden_policy()
    name = f"ddim_S{steps}_eta{eta:.0f}_cfg{guidance:g}"
    x = data["in/x_T"].unflatten(0, (2, 4))
    assert (mvdream_camera_vectors(policy.cameras).repeat(2, 1) - data["in/camera"]).abs().max() < 1e-6
    conditioning = {"prompt_embeds": data["in/context"][::4]}
    SCHEDULER.set_timesteps(steps)
    with torch.no_grad():
        for i, t in enumerate(SCHEDULER.timesteps):
            t = t.expand(2)
            mean, std = ddim_mean_std(SCHEDULER, policy.predict(x, t, conditioning, guidance), t, x, eta)
            x = mean
            if eta > 0:
                x = mean + std * data[f"in/noise_{name}"][i].unflatten(0, (2, 4))
                assert (x.flatten(0, 1) - data[f"traj/{name}"][i]).abs().max() < 5e-4
    assert (x.flatten(0, 1) - data[f"out/{name}"]).abs().max() < 5e-4


def test_cameras_are_those_of_the_public_code():
    for name, vectors in load_file(GOLDEN / "mvdream_cameras.safetensors").items():
        if name.startswith("blender/"):
            elevation, azimuth = (float(number) for number in name.removeprefix("blender/elev").split("_az"))
            assert (mvdream_camera_vectors(mvdream_cameras(elevation, azimuth)) - vectors).abs().max() < 1e-6


@pytest.mark.parametrize("elevation", [0.0, 15.0, 30.0])
@pytest.mark.parametrize("azimuth", [0.0, 45.0, 90.0])
def test_cameras_see_known_points_where_they_should(elevation, azimuth):
    cameras = mvdream_cameras(elevation, azimuth)
    up, centre = torch.tensor([0.0, 0.0, 0.2]), torch.zeros(3)
    beside = (
        torch.stack(
            [torch.deg2rad(cameras.azimuth + 90).cos(), torch.deg2rad(cameras.azimuth + 90).sin(), torch.zeros(4)], -1
        )
        * 0.2
    )  # of each camera: a point to its right
    for view in range(4):
        at, depth = project(
            torch.stack([centre, up, beside[view]]),
            Cameras(cameras.c2w[view : view + 1], cameras.fxfycxcy[view : view + 1]),
        )
        at = at[0]
        assert torch.allclose(at[0], torch.tensor([0.5, 0.5]), atol=1e-5) and abs(depth[0, 0] - 1.5) < 1e-5
        assert abs(at[1, 0] - 0.5) < 1e-5 and at[1, 1] < 0.45  # up is up in the image
        assert at[2, 0] > 0.55 and abs(at[2, 1] - 0.5) < 1e-5


# -- the public layouts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ldm():
    """A small checkpoint under ldm's names: weights, UNet config, VAE config, text encoder config, goldens."""
    file = GOLDEN / "ldm_vae_openclip.safetensors"
    with safe_open(file, "pt") as header:
        configs = {name: json.loads(value) for name, value in header.metadata().items()}
    data = load_file(file)
    unet_file = GOLDEN / "mvdream_tiny_b.safetensors"
    with safe_open(unet_file, "pt") as header:
        configs["unet"] = json.loads(header.metadata()["stock_config"])
        configs["ldm_unet"] = json.loads(header.metadata()["unet_config"])
    weights = {key: value for key, value in data.items() if not key.startswith("golden/")}
    for key, value in load_file(unet_file).items():
        if key.startswith("w/"):
            weights["model.diffusion_model." + key[2:]] = value
    text = {
        key: configs["text_encoder"][key]
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
            "bos_token_id",
            "eos_token_id",
        )
    }
    configs["text_encoder"] = text | {"num_hidden_layers": configs["text_encoder"]["num_hidden_layers"] - 1}
    golden = {key.removeprefix("golden/"): value for key, value in data.items() if key.startswith("golden/")}
    return SimpleNamespace(weights=weights, golden=golden, **configs)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letter_tokenizer(folder / "clip")
    return folder / "clip"


def from_ldm(ldm, file, tokenizer):
    return load_mvdream_pipeline(
        file, tokenizer=str(tokenizer), unet=ldm.unet, vae=ldm.vae, text_encoder=ldm.text_encoder
    )


def same_unet(pipeline, ldm):
    reference = convert_mvdream_unet(
        {key: value for key, value in ldm.weights.items() if key.startswith("model.")}, **ldm.unet
    ).state_dict()
    return all(torch.equal(value.float(), reference[key].float()) for key, value in pipeline.unet.state_dict().items())


def test_an_ldm_file_gives_every_part(ldm, tokenizer, tmp_path):
    file = tmp_path / "sd-v2.1-base-4view.pt"
    torch.save({"state_dict": ldm.weights}, file)
    pipeline = from_ldm(ldm, file, tokenizer)
    assert same_unet(pipeline, ldm)
    golden = ldm.golden
    with torch.no_grad():
        image = pipeline.vae.float().decode(golden["vae/in_z"]).sample
        penultimate = pipeline.text_encoder.float()(golden["text/tokens_openclip"], output_hidden_states=True)
    assert (image - golden["vae/out_image"]).abs().max() < 2e-5
    assert (penultimate.hidden_states[-1] - golden["text/openclip_penultimate"]).abs().max() < 2e-5


def ashawkey_folder(ldm, pipeline, folder):
    """`pipeline` in the layout of ashawkey/mvdream-sd2.1-diffusers."""
    pipeline.save_pretrained(folder)
    for old in (folder / "unet").iterdir():
        old.unlink()
    prefix = "model.diffusion_model."
    save_file(
        {key.removeprefix(prefix): value.contiguous() for key, value in ldm.weights.items() if key.startswith(prefix)},
        folder / "unet" / "diffusion_pytorch_model.safetensors",
    )
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel", **ldm.ldm_unet}))
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_the_three_layouts_are_the_same_painter(ldm, tokenizer, tmp_path, offline):
    file = tmp_path / "sd-v2.1-base-4view.pt"
    torch.save(ldm.weights, file)
    first = from_ldm(ldm, file, tokenizer)
    second = load_mvdream_pipeline(ashawkey_folder(ldm, first, tmp_path / "ashawkey"))
    second.save_pretrained(tmp_path / "stock")
    third = load_mvdream_pipeline(tmp_path / "stock")
    for pipeline in (second, third):
        assert same_unet(pipeline, ldm)
        for part in ("vae", "text_encoder"):
            ours, wanted = getattr(pipeline, part).state_dict(), getattr(first, part).state_dict()
            assert all(torch.equal(ours[key].float(), wanted[key].float()) for key in wanted)


def test_the_command_writes_a_stock_pipeline(ldm, tokenizer, tmp_path, monkeypatch, offline):
    file = tmp_path / "sd-v2.1-base-4view.pt"
    torch.save(ldm.weights, file)
    source = ashawkey_folder(ldm, from_ldm(ldm, file, tokenizer), tmp_path / "ashawkey")
    monkeypatch.setattr("sys.argv", ["convert_mvdream", str(source), str(tmp_path / "stock")])
    convert_mvdream.main()
    assert same_unet(StableDiffusionPipeline.from_pretrained(tmp_path / "stock", local_files_only=True), ldm)
    line = ["convert_mvdream", str(source), str(tmp_path / "other"), "--tokenizer", str(tokenizer)]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(ValueError, match="--tokenizer is for a .pt file"):
        convert_mvdream.main()


def test_a_lora_of_the_published_layout_is_taken(ldm, tokenizer, tmp_path, offline):
    """Its UNet's file has other names than the LoRA, which is for the converted one."""
    torch.save(ldm.weights, tmp_path / "4view.pt")
    folder = ashawkey_folder(ldm, from_ldm(ldm, tmp_path / "4view.pt", tokenizer), tmp_path / "ashawkey")
    config = tiny.get_config("mvdream")
    config.pretrained.model, config.pretrained.lora, config.mixed_precision = str(folder), "", "no"
    policy = load_painter(config, "cpu")
    policy.add_lora(2, "attention")
    policy.save_lora(tmp_path / "lora")
    config.pretrained.lora = str(tmp_path / "lora")
    load_painter(config, "cpu")
    shutil.copytree("tiny/weights/mvdream_defect", tmp_path / "other")
    config.pretrained.lora = str(tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit"):
        load_painter(config, "cpu")


def write_configs(ldm, folder):
    """The configurations of `ldm`, as the command wants them. Returns its flags."""
    folder.mkdir()
    for name in ("unet", "vae", "text_encoder"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(ldm, name)))
    return ["--configs", str(folder)]


@pytest.mark.parametrize("layout", ["file", "ashawkey"])
def test_the_code_in_final_converts_what_stock_diffusers_cannot_read(ldm, tokenizer, tmp_path, monkeypatch, layout):
    file, final, config = tmp_path / "an sd-v2.1-base-4view.pt", tmp_path / "a run" / "final", base.get_config()
    torch.save(ldm.weights, file)
    pipeline = from_ldm(ldm, file, tokenizer)
    pipeline.unet.save_pretrained(final / "unet")
    config.painter.name, config.use_lora, config.pretrained.model = "mvdream", False, str(file)
    config.pretrained.tokenizer, configs = str(tokenizer), write_configs(ldm, tmp_path / "configs")
    if layout == "ashawkey":
        config.pretrained.model = str(ashawkey_folder(ldm, pipeline, tmp_path / "ashawkey"))
        configs = []
    code = python_code("StableDiffusionPipeline", config, final)
    (command,) = re.findall("python -m tools.(convert_mvdream .*)", code)
    monkeypatch.setattr("sys.argv", shlex.split(command) + configs)
    convert_mvdream.main()
    names = {}
    exec(code, names)
    assert same_unet(names["pipeline"], ldm)


def test_a_command_that_fails_leaves_nothing(ldm, tokenizer, tmp_path, monkeypatch):
    def fail(self, folder, **_):
        Path(folder).mkdir(parents=True)
        raise OSError("no space left")

    configs = write_configs(ldm, tmp_path / "configs")
    file, out = tmp_path / "sd-v2.1-base-4view.pt", tmp_path / "out"
    torch.save(ldm.weights, file)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--tokenizer", str(tokenizer), *configs]
    monkeypatch.setattr("sys.argv", ["convert_mvdream", str(file), str(out), *flags])
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space left"):
            convert_mvdream.main()
    assert sorted(tmp_path.rglob("*")) == before
    convert_mvdream.main()
    with pytest.raises(UnwritableError, match="out', which exists already"):
        convert_mvdream.main()
    (tmp_path / "configs" / "vae.json").unlink()
    monkeypatch.setattr("sys.argv", ["convert_mvdream", str(file), str(tmp_path / "other"), *flags])
    with pytest.raises(FileNotFoundError, match="vae.json does not exist: give a folder with unet.json, vae.json"):
        convert_mvdream.main()


@pytest.mark.parametrize(
    "what, message",
    [
        ("truncated", "download it again"),
        ("code", "no code in it was run, because it holds pathlib.PosixPath"),
        ("another", "model.diffusion_model"),
        ("no tokenizer", "has no vocab.json: give with --tokenizer, or for a run with config.pretrained.tokenizer"),
        ("other tokenizer", "has 108 tokens instead of 99"),
    ],
)
def test_bad_files_get_one_sentence(ldm, tokenizer, tmp_path, what, message):
    file = tmp_path / "sd-v2.1-base-4view.pt"
    torch.save(ldm.weights if what != "another" else {"linear.weight": torch.ones(2)}, file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:100_000])
    if what == "code":
        torch.save({"state_dict": GOLDEN}, file)  # an object that only its own class can read
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        if what == "other tokenizer":
            make_tokenizer(tmp_path / "words")
        places = {"no tokenizer": tmp_path, "other tokenizer": tmp_path / "words"}
        from_ldm(ldm, file, places.get(what, tokenizer))


# -- in the trainer -------------------------------------------------------------------------------------------------

AS_MVDREAM = dict(painter__name="mvdream", painter__elevation=20.0, painter__azimuth_start=315.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_mvdream(make_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def mvdream_run(world, tmp_path_factory):
    """Samples are painted and trained on one by one, so that both see the same batches."""
    logdir = tmp_path_factory.mktemp("run")
    values = settings(
        world,
        logdir,
        **AS_MVDREAM,
        pretrained__model=str(world / "mvdream"),
        num_epochs=2,
        sample__batch_size=1,
        train__batch_size=1,
        sample__total_batch_size=4,
        train__total_batch_size=4,
        train__gradients_while_painting=False,
        per_prompt_stat_tracking__min_count=1,
        prompts__val_file=str(world / "test.txt"),
        sample__num_steps=2,
        **FEW_FILES,
    )
    assert children.run(children.train, values) == 0
    return logdir / "run"


def test_on_policy_ratios_are_one_to_the_last_bit(mvdream_run):
    lines = [json.loads(line) for line in (mvdream_run / "metrics.jsonl").read_text().splitlines()]
    (update,) = [line for line in lines if line["kind"] == "update"]
    assert update["ratio_min"] == update["ratio_max"] == 1 and update["approx_kl"] == 0
    assert update["grad_norm"] > 0


def test_stock_diffusers_loads_what_was_learned(mvdream_run, world):
    text, names = (mvdream_run / "final/README.md").read_text(), {}
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], names)
    unet = names["pipeline"].unet
    stock = {name.replace(".default_0.", ".default."): value for name, value in unet.state_dict().items()}
    trained = load_file(checkpoints(mvdream_run)[-1] / "weights.safetensors")
    assert trained and all(torch.equal(stock[name], value) for name, value in trained.items())


def load_policy(world, **changes):
    values = settings(world, "unused", **AS_MVDREAM, pretrained__model=str(world / "mvdream"), **changes)
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return load_painter(config, "cpu")


@pytest.mark.parametrize(
    "painter, model, message",
    [
        ("mv_sdxl", "mvdream", "is a StableDiffusionPipeline, .* set config.painter.name to 'mvdream'"),
        ("mvdream", "painter", "is a StableDiffusionXLPipeline, .* set config.painter.name to 'mv_sdxl'"),
        ("mvdream", "plain", "that no cameras are given to, so no MVDream .*give one"),
        ("mvdream", "nothing", "nothing' does not exist: give a folder"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(
    world, monkeypatch, tmp_path, painter, model, message
):
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", None)
    monkeypatch.setattr("diffusers_patch.loading.load_scheduler", lambda pretrained: SCHEDULER)
    config = base.get_config()
    folder = world / model
    if model == "plain":  # as MVDream, but for the cameras
        folder = shutil.copytree(world / "mvdream", tmp_path / model)
        unet = json.loads((folder / "unet/config.json").read_text()) | {"class_embed_type": None}
        (folder / "unet/config.json").write_text(json.dumps(unet))
    config.painter.name, config.pretrained.model = painter, str(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_painter(config, "cpu")


def test_views_of_a_sample_see_each_other_and_nothing_of_other_samples(world):
    policy = load_policy(world)
    latents = policy.initial_latents(2, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 4, LATENT // 2, LATENT // 2)
    conditioning, t = policy.encode(["a red cube", "a blue sphere"]), torch.tensor([500, 500])
    changed = latents.clone()
    changed[0, 3] += 1
    with torch.no_grad():
        before, after = (policy.predict(x, t, conditioning, 3.0) for x in (latents, changed))
    difference = (before - after).abs().amax((2, 3, 4))
    assert (difference[0] > 0).all() and (difference[1] == 0).all()
    assert policy.decode(latents).shape == (2, 4, 3, 32, 32)


def test_the_reference_is_the_model_without_its_lora_and_the_fold_survives_it(world):
    policy = load_policy(world)
    x, t = policy.initial_latents(1, torch.Generator().manual_seed(0)), torch.tensor([500])
    conditioning = policy.encode(["a red cube"])
    with torch.no_grad():
        base_output = policy.predict(x, t, conditioning, 3.0)
        policy.add_lora(4)
        for name, parameter in policy.unet.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        assert torch.equal(policy.predict(x, t, conditioning, 3.0, reference=True), base_output)
        assert (policy.predict(x, t, conditioning, 3.0) - base_output).abs().max() > 1e-4


def test_the_negative_prompt_is_heard(world):
    x, t = torch.ones(1, 4, 4, LATENT // 2, LATENT // 2), torch.tensor([500])
    outputs = []
    for negative in ("", "a blue sphere", "a red cube"):
        policy = load_policy(world, painter__negative_prompt=negative)
        with torch.no_grad():
            outputs.append(policy.predict(x, t, policy.encode(["a red cube"]), 5.0))
            conditional = policy.predict(x, t, policy.encode(["a red cube"]), 1.0)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-5
    assert (outputs[2] - conditional).abs().max() < 1e-5  # nothing to guide away from


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(world, caplog):
    policy = load_policy(world)

    def truncated():
        return [text for text in caplog.messages if "truncated" in text and "red cube" in text]

    logging.enable_propagation()
    try:
        policy.encode(["a red cube " * 40])
        assert truncated()
        caplog.clear()
        policy.encode(["a red cube " * 40])
        assert not truncated()
    finally:
        logging.disable_propagation()


def test_a_painter_at_another_height_is_refused_before_anything_is_loaded():
    config = base.get_config()
    config.painter.name, config.painter.elevation = "mvdream", 15.0
    with pytest.raises(ValueError, match=r"elevations are 15/15/15/15 .* 20/20/20/20 .*config.painter.elevation"):
        check_cameras(config)
    config.painter.elevation = 20.0
    check_cameras(config)


@pytest.mark.parametrize("key, value", [("elevation", 15.0), ("azimuth_start", 90.0), ("negative_prompt", "blurry")])
def test_keys_of_mvdream_are_refused_for_the_grid_painter(key, value):
    config = base.get_config()
    config.painter[key] = value
    with pytest.raises(ValueError, match=f"config.painter.{key} is"):
        validate(config, 1, check_files=False)
