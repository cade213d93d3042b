"""Instant3D against what the published code computes with small random weights: its file, and how it starts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from config import base, dgx
from diffusers_patch.conversion import save_pipeline
from diffusers_patch.gaussian_blob import blob_latent, fused_start, gaussian_blob
from diffusers_patch.instant3d_checkpoint import (
    CONFIGS,
    NOT_NEEDED,
    PARTS,
    convert_instant3d,
    load_instant3d_pipeline,
    load_tokenizers,
    unused_keys,
)
from diffusers_patch.loading import check_cameras, load_painter
from diffusers_patch.rollout import rollout
from recon.cameras import instant3d_cameras
from tests.tiny_models import (
    GOLDEN,
    GoldenPainter,
    golden_policy,
    letter_tokenizer,
    make_world,
    move_by_an_ulp,
    settings,
)
from tools import convert_instant3d as command
from tools.rehearsal.checkpoints import VAE

START = load_file(GOLDEN / "instant3d_start.safetensors")
PROMPTS = ["a red cube", "a blue sphere", "a cone!"]


def read_golden():
    """A small file of Instant3D: weights (float16, as stored), configs, and goldens."""
    file = GOLDEN / "sdxl_sgm_tiny.safetensors"
    with safe_open(file, "pt") as header:
        meta = {name: json.loads(value) for name, value in header.metadata().items()}
    data = load_file(file)
    configs = {"unet": meta["diffusers_unet"], "vae": meta["diffusers_vae"]}
    for name in ("text_encoder", "text_encoder_2"):
        configs[name] = {key: meta[name][key] for key in CONFIGS[name]}
    return SimpleNamespace(
        weights={key.removeprefix("w/"): value for key, value in data.items() if key.startswith("w/")},
        golden={key: value for key, value in data.items() if not key.startswith("w/")},
        configs=configs,
        steps=meta["edm"]["steps"],
        guidance=meta["edm"]["guidance"],
    )


TINY = read_golden()
PARTS_OF_TINY = {name: model.float() for name, model in convert_instant3d(TINY.weights, TINY.configs).items()}


def largest(difference):
    return difference.abs().max().item()


# -- the file -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_unet():
    golden = TINY.golden
    added = {"text_embeds": golden["in/pooled"], "time_ids": golden["in/time_ids"]}
    unet = PARTS_OF_TINY["unet"]
    eps = unet(golden["in/latents"], golden["in/timesteps"], golden["in/context"], added_cond_kwargs=added).sample
    assert largest(eps - golden["out/eps"]) < 5e-6


@torch.no_grad()
def test_the_vae():
    vae, golden = PARTS_OF_TINY["vae"], TINY.golden
    assert largest(vae.decode(golden["vae/in_z"]).sample - golden["vae/out_image"]) < 1e-5
    assert largest(vae.encode(golden["vae/in_image"]).latent_dist.parameters - golden["vae/out_moments"]) < 1e-5


@torch.no_grad()
def test_the_text_encoders():
    golden = TINY.golden
    one = PARTS_OF_TINY["text_encoder"](golden["text/tokens_clip_l"], output_hidden_states=True)
    two = PARTS_OF_TINY["text_encoder_2"](golden["text/tokens_openclip"], output_hidden_states=True)
    assert largest(one.hidden_states[-2] - golden["text/clip_l_hidden_m2"]) < 1e-5
    assert largest(two.hidden_states[-2] - golden["text/openclip_penultimate"]) < 1e-5
    assert largest(two.text_embeds - golden["text/openclip_pooled"]) < 1e-5


def flat(tree, prefix=""):
    """{"a.b": shape} of {"a": {"b": shape}}."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.fixture(scope="module")
def published():
    """The published file's 2,516 keys with tensors that take no memory."""
    shapes = flat(json.loads((GOLDEN / "instant3d_manifest.json").read_text()))
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_weight_of_the_full_size_is_used_or_known_to_be_superfluous(published):
    assert len(published) == 2516 and NOT_NEEDED.keys() <= published.keys() and all(NOT_NEEDED.values())
    models = convert_instant3d(published)
    elements = sum(value.numel() for key, value in published.items() if key not in NOT_NEEDED)
    assert sum(p.numel() for model in models.values() for p in model.parameters()) == elements == 3_468_837_867
    assert {name: len(model.state_dict()) for name, model in models.items()} == {
        "unet": 1680,
        "vae": 248,
        "text_encoder": 196,
        "text_encoder_2": 389 + 2 * 2 * 32,  # its layers' weights and biases of q, k and v are one in the file
    }


def test_what_no_shape_shows_is_as_published():
    """Wrong values of these would load, and paint noise: they are those of the small model of the published code."""
    for part, keys in {
        "vae": ["scaling_factor"],
        "text_encoder": ["hidden_act"],
        "text_encoder_2": ["hidden_act"],
        "unet": ["addition_embed_type"],
    }.items():
        assert [CONFIGS[part][key] for key in keys] == [TINY.configs[part][key] for key in keys]
    unet, clip, openclip = (CONFIGS[part] for part in ("unet", "text_encoder", "text_encoder_2"))
    # attention heads of 64 channels everywhere; `attention_head_dim` counts them
    assert [width // 64 for width in unet["block_out_channels"]] == unet["attention_head_dim"]
    assert [text["hidden_size"] // text["num_attention_heads"] for text in (clip, openclip)] == [64, 64]
    ids = ("bos_token_id", "eos_token_id", "vocab_size")
    assert [[text[key] for key in ids] for text in (clip, openclip)] == [[49406, 49407, 49408]] * 2
    assert CONFIGS["vae"]["force_upcast"] and 8 * unet["sample_size"] == 1024


def test_what_a_conversion_drops_is_noticed():
    weights = {"a": torch.ones(4, 2), "b": torch.ones(2), "c": torch.ones(())}
    assert unused_keys(lambda w: {"x": w["a"][:2].clone(), "y": w["a"][2:].T.contiguous(), "z": None}, weights) == [
        "b",
        "c",
    ]


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_weight_is_named(name):
    weights = {key: value.to("meta") for key, value in TINY.weights.items()}
    for key in [key for key in weights if key.startswith(PARTS[name].prefix) and key not in NOT_NEEDED][::41]:
        with pytest.raises(ValueError, match=r"given.pth (does not hold the|lacks).*: give the complete") as error:
            convert_instant3d({k: v for k, v in weights.items() if k != key}, TINY.configs, "given.pth")
        assert name in str(error.value) or key in str(error.value)


@pytest.mark.parametrize("prefix", ["", *(part.prefix for part in PARTS.values())])
def test_an_unknown_weight_is_named(prefix):
    weights = TINY.weights | {f"{prefix}adapter.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=rf"{prefix}adapter.weight|\(adapter.weight"):
        convert_instant3d(weights, TINY.configs)


def test_weights_of_another_shape_are_named():
    weights = TINY.weights | {"model.diffusion_model.out.2.bias": torch.ones(8)}
    with pytest.raises(ValueError, match=r"unet .*1 of another shape \(conv_out.bias: \(8,\) instead of \(4,\)\)"):
        convert_instant3d(weights, TINY.configs)


# -- the folder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A folder with the two tokenizers, as in any SDXL."""
    folder = tmp_path_factory.mktemp("sdxl")
    letter_tokenizer(folder / "tokenizer")
    letter_tokenizer(folder / "tokenizer_2", pad="!")
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("file") / "instant3d.pth"
    torch.save({"state_dict": TINY.weights}, file)
    return file


@pytest.fixture(scope="module")
def folder(file, sdxl, tmp_path_factory):
    """The converted folder."""
    out = tmp_path_factory.mktemp("converted") / "instant3d"
    save_pipeline(load_instant3d_pipeline(file, sdxl, configs=TINY.configs), out)
    return out


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no repeated attempts


def configured(folder, **changes):
    config = base.get_config()
    values = settings(Path("unused"), "unused", pretrained__model=str(folder), **changes)
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


@torch.no_grad()
def test_the_painter_and_the_stock_pipeline_agree(folder, offline):
    steps, guidance = 3, 5.0
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    stock.unet.set_attn_processor(AttnProcessor())  # what a policy uses on CPUs
    stock.set_progress_bar_config(disable=True)
    assert stock.config.force_zeros_for_empty_prompt and type(stock.scheduler) is DDIMScheduler
    wanted = stock(PROMPTS[0], num_inference_steps=steps, guidance_scale=guidance, latents=x, output_type="latent")
    policy = load_painter(configured(folder, sample__num_steps=steps), "cpu")
    conditioning, scheduler = policy.encode(PROMPTS[:1]), policy.scheduler

    def painted():
        latents = x
        for t in scheduler.timesteps:
            latents = scheduler.step(
                policy.predict(latents, t.expand(1), conditioning, guidance), t, latents
            ).prev_sample
        return latents

    found = painted()
    move_by_an_ulp(policy.unet, 0)  # how far rounding reaches, which differs between processors
    assert largest(found - wanted.images) <= 8 * largest(painted() - found) < 2e-3
    images = stock.vae.decode(wanted.images / 0.13025).sample / 2 + 0.5
    views = policy.decode(wanted.images)
    assert largest(views[:, 1] - images.clamp(0, 1)[:, :, :32, 32:]) < 1e-5


def test_the_scheduler_is_sdxls(folder):
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    sigma = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    assert largest(sigma[START["timesteps_legacy_ddpm_100"]] - START["sigmas_legacy_ddpm_100"][:-1]) < 1e-4
    scheduler.set_timesteps(100)
    assert (scheduler.timesteps[0], scheduler.timesteps[-1]) == (991, 1)
    config = scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.prediction_type) == (False, False, "epsilon")


def test_tokenizers_pad_as_the_published_code_does(folder, sdxl, tmp_path):
    stock = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert (stock.tokenizer.pad_token_id, stock.tokenizer_2.pad_token_id) == (98, 0)
    for where in ((sdxl, ""), (sdxl / "tokenizer", sdxl / "tokenizer_2"), (sdxl / "tokenizer", sdxl / "tokenizer")):
        pair = load_tokenizers(*where, [99, 99])
        ids = [pair[name]("ab", padding="max_length", max_length=6).input_ids for name in ("tokenizer", "tokenizer_2")]
        assert ids == [[97, 1, 28, 98, 98, 98], [97, 1, 28, 98, 0, 0]]
    stock.save_pretrained(tmp_path / "again")  # the layout that newer versions write
    assert load_tokenizers(tmp_path / "again", "", [99, 99])["tokenizer_2"].pad_token_id == 0


def run_command(monkeypatch, *arguments):
    for name, config in TINY.configs.items():
        monkeypatch.setitem(CONFIGS, name, config)
    monkeypatch.setattr("sys.argv", ["convert_instant3d", *map(str, arguments)])
    command.main()


@pytest.mark.parametrize("flags, dtype", [([], "F16"), (["--dtype", "fp16"], "F16"), (["--dtype", "fp32"], "F32")])
def test_the_command_keeps_the_type_of_the_weights(file, sdxl, tmp_path, monkeypatch, offline, flags, dtype):
    run_command(monkeypatch, file, tmp_path / "out", "--tokenizer", sdxl, *flags)
    for part in PARTS:
        (weights,) = (tmp_path / "out" / part).glob("*.safetensors")
        with safe_open(weights, "pt") as header:
            types = {header.get_slice(key).get_dtype() for key in header.keys()}
        assert types == {dtype}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_flat_safetensors_file_is_the_same(folder, sdxl, tmp_path):
    save_file(TINY.weights, tmp_path / "flat.safetensors")
    pipeline = load_instant3d_pipeline(tmp_path / "flat.safetensors", sdxl, configs=TINY.configs)
    for part, weights in (("unet", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        written = load_file(folder / part / f"{weights}.safetensors")
        assert all(torch.equal(value, written[key]) for key, value in getattr(pipeline, part).state_dict().items())


@pytest.mark.parametrize(
    "what, message",
    [
        ("absent", "does not exist"),
        ("truncated", "could not be read .* download it again"),
        ("code", "no code in it was run, because it holds pathlib.PosixPath"),
        ("another", r"has no weights model.diffusion_model.\* \(unet\), .*embedders.1.model.\* \(text_encoder_2\)"),
        ("stable diffusion", r"has no weights conditioner.embedders.0"),
        ("missing", "does not hold the vae of SDXL .*1 missing"),
        ("no tokenizer", "'nowhere' does not exist or has no tokenizer/vocab.json: give a folder that has SDXL's"),
        (
            "hub",
            "tokenizer/vocab.json of 'stabilityai/.*', .* could not be downloaded .*: give a folder that has SDXL's",
        ),
        ("empty tokenizer", "'empty' does not exist or has no tokenizer/vocab.json: give a folder"),
        ("other tokenizer", "small/tokenizer' has 3 tokens instead of 99"),
        ("exists", "exists already"),
    ],
)
def test_what_cannot_be_converted_gets_one_sentence_and_leaves_nothing(
    file, sdxl, tmp_path, monkeypatch, offline, what, message
):
    (tmp_path / "empty").mkdir()
    source, out, weights = tmp_path / "instant3d.pth", tmp_path / "out", dict(TINY.weights)
    if what == "missing":
        del weights["first_stage_model.decoder.conv_out.bias"]
    if what == "another":
        weights = {"linear.weight": torch.ones(2)}
    if what == "stable diffusion":
        weights = {key.replace("conditioner.embedders.0", "cond_stage_model"): v for key, v in weights.items()}
    if what == "code":
        weights = {"state_dict": Path("x")}  # an object that only its own class can read
    if what != "absent":
        torch.save(weights, source)
    if what == "truncated":
        source.write_bytes(source.read_bytes()[:100_000])
    if what == "exists":
        out.mkdir()
    if what == "other tokenizer":
        (tmp_path / "small" / "tokenizer").mkdir(parents=True)
        vocabulary = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
        (tmp_path / "small" / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "small" / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    before = sorted(tmp_path.rglob("*"))
    places = {"no tokenizer": "nowhere", "empty tokenizer": "empty", "other tokenizer": "small"}
    tokenizer = [] if what == "hub" else ["--tokenizer", places.get(what, sdxl)]
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        run_command(monkeypatch, source, out, *tokenizer)
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_command_leaves_nothing(file, sdxl, tmp_path, monkeypatch):
    def fail(self, folder, **_):
        Path(folder).mkdir(parents=True)
        raise OSError("no space left")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        run_command(monkeypatch, file, tmp_path / "out", "--tokenizer", sdxl)
    assert not list(tmp_path.iterdir())


def test_the_trainer_asks_for_the_folder(file):
    with pytest.raises(ValueError, match="is a file, .* python -m tools.convert_instant3d .* OUT, and give OUT"):
        load_painter(configured(file), "cpu")


# -- how it starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.1, 0.2])
def test_the_blobs(std):
    assert largest(2 * gaussian_blob(64, std) - 1 - START[f"blob64_std{std}"][0]) < 1e-6


@pytest.mark.parametrize("steps", [30, 50, 100])
def test_noise_levels_of_the_published_sampler_are_ddims(steps):
    scheduler = DDIMScheduler(**CONFIGS["scheduler"])
    scheduler.timesteps = START[f"timesteps_legacy_ddpm_{steps}"]
    a = scheduler.alphas_cumprod[scheduler.timesteps]
    assert largest(((1 - a) / a).sqrt() - START[f"sigmas_legacy_ddpm_{steps}"][:-1]) < 1e-4
    z, noise = START["fuse/encoded_blob"], START["fuse/randn"]
    start = fused_start(scheduler, z, noise)
    assert largest(start - START["fuse/x_init_sgm"]) < 2e-6
    sigma = START[f"sigmas_legacy_ddpm_{steps}"][0]
    assert largest(start * (1 + sigma**2).sqrt() - START["fuse/x_init_times_sqrt"]) < 2e-5


def policy_of(parts=PARTS_OF_TINY, scheduler=None, **settings):
    """The small Instant3D as a policy that takes its latents of 8x8 for a grid of 1024 pixels."""
    parts["unet"].register_to_config(sample_size=128)
    pipeline = SimpleNamespace(**parts, scheduler=scheduler, vae_scale_factor=8)
    return GoldenPainter(pipeline, instant3d_cameras(), **settings)


@torch.no_grad()
def follow(scheduler, x):
    """x after all timesteps of the scheduler, with the golden run's conditioning and guidance."""
    policy, golden = policy_of(), TINY.golden
    conditioning = {"prompt_embeds": golden["edm/context"], "pooled": golden["edm/pooled"]}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(policy.predict(seen, t.long().expand(1), conditioning, TINY.guidance), t, x).prev_sample
    return x


BETAS = {key: CONFIGS["scheduler"][key] for key in ("beta_start", "beta_end", "beta_schedule")}


def test_the_published_sampler_as_euler_steps():
    golden, scheduler = TINY.golden, EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=golden["edm/timesteps"].tolist())
    assert largest(scheduler.sigmas - golden["edm/sigmas"]) < 1e-5
    start = golden["edm/randn"] * golden["edm/sigmas"][0] + golden["edm/encoded_blob"]
    assert largest(follow(scheduler, start) - golden["edm/out_latent"]) < 5e-4


def test_ddim_from_the_fused_start_ends_where_the_published_sampler_ends():
    golden = TINY.golden
    # without noise DDIM is Euler's method in the other scaling; it ends at a clean image if the last alpha is 1
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(TINY.steps)
    assert torch.equal(scheduler.timesteps, golden["edm/timesteps"])
    start = fused_start(scheduler, golden["edm/encoded_blob"], golden["edm/randn"])
    assert largest(follow(scheduler, start) - golden["edm/out_latent"]) < 5e-4


def test_the_blobs_are_encoded_as_sdxls_latents():
    vae = PARTS_OF_TINY["vae"]
    with torch.no_grad():
        posterior = vae.encode(2 * gaussian_blob(64, 0.2)[None] - 1).latent_dist
    z = blob_latent(vae, 64, 0.2)
    assert torch.equal(z, posterior.mean * 0.13025) and z.shape == (1, 4, 8, 8)
    assert largest(z - blob_latent(vae, 64, 0.1)) > 1e-3
    # the small VAE is random, so what a sample of its posterior looks like says nothing; but a sample it is not
    assert torch.equal(z, blob_latent(vae, 64, 0.2))


@pytest.mark.parametrize("steps", [2, 4])
def test_the_first_latents_are_noise_around_the_blobs(folder, steps):
    blobs = load_painter(configured(folder, sample__initial_latents="gaussian_blob", sample__blob_std=0.2), "cpu")
    plain = load_painter(configured(folder), "cpu")
    blobs.scheduler.set_timesteps(steps)
    a = blobs.scheduler.alphas_cumprod[1000 - 1000 // steps + 1]
    x, noise = (policy.initial_latents(3, torch.Generator().manual_seed(1)) for policy in (blobs, plain))
    z = blob_latent(blobs.pipeline.vae, 64, 0.2)
    assert largest(x - (a.sqrt() * z + (1 - a).sqrt() * noise)) < 1e-6
    assert largest(x - noise) > 1e-2 and x.dtype == torch.float32
    blobs.to("cpu", "bf16")  # the VAE rounds now, the latents do not
    assert blobs.pipeline.vae.dtype == torch.bfloat16
    again = blobs.initial_latents(3, torch.Generator().manual_seed(1))
    assert again.dtype == torch.float32 and 0 < largest(again - x) < 0.1


def test_a_sample_does_not_depend_on_its_batch(folder):
    config = configured(folder, sample__num_steps=2, sample__initial_latents="gaussian_blob")
    policy = load_painter(config, "cpu")

    def paint(which):
        generators = [torch.Generator().manual_seed(i) for i in which]
        return rollout(policy, [PROMPTS[i] for i in which], 2, 3.0, generator=generators)

    together, alone = paint([0, 1, 2]), paint([1])
    assert torch.equal(together.latents[1, 0], alone.latents[0, 0])
    assert largest(together.latents[1] - alone.latents[0]) < 1e-4  # rounding of larger matrix products
    assert largest(together.latents[0, 0] - together.latents[1, 0]) > 0.1
    fresh = load_painter(config, "cpu")
    assert torch.equal(fresh.initial_latents(1, [torch.Generator().manual_seed(1)])[0], alone.latents[0, 0])


def test_micro_conditioning_and_an_empty_caption():
    policy, seen = golden_policy(), {}

    def note(module, args, kwargs):
        seen.update(kwargs["added_cond_kwargs"], embeds=args[2])

    policy.unet.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        conditioning = policy.encode(list(policy.pipeline.tokenizer.rows)[:1])
        policy.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), conditioning, 5.0)
    assert policy.unet.config.sample_size == 128
    assert seen["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 2  # of both branches
    assert not seen["text_embeds"][0].any() and not seen["embeds"][0].any()
    assert seen["text_embeds"][1].any() and seen["embeds"][1].any()


# -- another VAE ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small painter, and folders of VAEs: one for the same latents, and others."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(5)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    AutoencoderKL(**VAE | {"scaling_factor": 0.18215}).save_pretrained(folder / "sd")
    return folder


def test_another_vae_decodes(world, offline):
    policies = [
        load_painter(configured(world / "painter", pretrained__vae=vae), "cpu") for vae in ("", str(world / "vae"))
    ]
    own, other = (policy.pipeline.vae for policy in policies)
    wanted = AutoencoderKL.from_pretrained(world / "vae").state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())
    assert not any(p.requires_grad for p in other.parameters()) and not other.training
    x = policies[0].initial_latents(1, torch.Generator().manual_seed(0))
    assert largest(policies[0].decode(x) - policies[1].decode(x)) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(*(p.unet.state_dict().values() for p in policies), strict=True))


@pytest.mark.parametrize(
    "vae, message",
    [
        ("sd", "vae = '.*sd' has latents of 4 channels scaled by 0.18215 .* are of .* scaled by 0.13025 at 1/8 size"),
        ("painter/unet", "holds UNet2DConditionModel: give an AutoencoderKL"),
        ("lrm", "holds no model of diffusers: give an AutoencoderKL"),
        ("painter", "config.pretrained.vae = '.*painter' could not be loaded .* config.json"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(world, offline, vae, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_painter(configured(world / "painter", pretrained__vae=str(world / vae)), "cpu")
    assert "\n" not in str(error.value)


# -- the run --------------------------------------------------------------------------------------------------------


def test_the_run_is_the_papers_with_open_weights():
    paper, run = dgx.get_config("carve3d_train"), dgx.get_config("instant3d_grm")
    run.recon.name, run.recon.dtype = paper.recon.name, paper.recon.dtype
    assert run.pretrained.vae == "madebyollin/sdxl-vae-fp16-fix" and run.sample.initial_latents == "gaussian_blob"
    run.pretrained.vae, run.sample.initial_latents = "", "noise"
    assert run.to_dict() == paper.to_dict()
    run = dgx.get_config("instant3d_grm")
    assert (run.recon.name, run.recon.dtype) == ("grm", "bf16")
    check_cameras(run)
