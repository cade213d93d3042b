"""Models small enough that a whole training run takes seconds, and the settings of such a run.

`make_world(folder)` writes a painter and a reconstructor with random weights and prompt files; `flags(world, ...)` are
the trainer's flags for them. `golden_policy()` is the painter of the golden rollout and of the golden update.
`SMALL_RECONSTRUCTORS` makes one of every kind, with random weights.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_patch.mv_sdxl import MVSDXL
from mrc.bounding_box import BACKGROUND
from recon.cameras import instant3d_cameras
from recon.grm import GRM
from recon.instantmesh import InstantMesh
from recon.lgm import LGM, OPTIONS
from recon.openlrm import OpenLRM
from recon.tiny_lrm import TinyLRM
from recon.volume_rendering import sample_planes
from tiny.train_painter import assemble, make_tokenizer
from tools.rehearsal.checkpoints import GRM_PARAMS, INSTANTMESH, LRM, MVDREAM_UNET, TEXT, UNET, VAE

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CONFIG = json.loads((GOLDEN / "sdxl_rollout_config.json").read_text())

PROMPTS = ["a red cube", "a blue sphere", "a green cone", "a yellow cylinder"]


class RandomPainter:
    """The parts of an SDXL pipeline that `tiny.train_painter.assemble` wants, untrained."""

    def __init__(self, tokenizer):
        ids = dict(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT, **ids, hidden_act="quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, **ids, hidden_act="gelu"))


def white_vae():
    """A random VAE that paints blobs on white: of noise a 40th of the pixels is dark, now and then a view is empty."""
    vae = AutoencoderKL(**VAE)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / VAE["scaling_factor"]
    with torch.no_grad():
        darkest = vae.decode(latents).sample.amin(1).flatten()
        vae.decoder.conv_out.bias += 2 * BACKGROUND - 1 - darkest.quantile(1 / 40)
    return vae


def make_world(folder):
    """Write `painter/`, `lrm/`, `train.txt` (4 prompts), `validation.txt` (3) and `test.txt` (1) into `folder`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    assemble(RandomPainter(tokenizer), white_vae(), tokenizer).save_pretrained(folder / "painter")
    random_lrm().save_pretrained(folder / "lrm")
    for name, prompts in (("train", PROMPTS), ("validation", PROMPTS[:3]), ("test", PROMPTS[:1])):
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return folder


@torch.no_grad()
def random_lrm():
    """A reconstructor whose scenes are empty but for specks of matter: quick to render, and on white.

    With weights as they are drawn it would fill the box with an even fog."""
    model = TinyLRM(**LRM)
    scene = model.reconstruct(torch.rand(1, 4, 3, 64, 64), model.cameras)
    raw, _ = model.decoder.raw(sample_planes(scene.planes, 2 * torch.rand(1, 1000, 3) - 1))
    last = model.decoder.net[-1]
    steepness = 10 / raw.std()  # and matter only where the density is two standard deviations above its mean
    last.bias[0] = steepness * (last.bias[0] - raw.mean()) - 20
    last.weight[0] *= steepness
    return model


def make_mvdream(folder):
    """Add `mvdream/`, a small MVDream with random weights in stock layout, to a world."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**MVDREAM_UNET),
        vae=white_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "mvdream")
    return folder


FEW_FILES = dict(save_freq=100, val_freq=100)  # what is saved and validated at the end, and a validation at the start


def settings(world, logdir, **changes):
    """{key: value} below `config` for a run of seconds: 3 epochs of 8 samples and 4 steps, one update per epoch.

    `FEW_FILES` makes it a quicker one. changes: other values, with __ for the dot, as in train__batch_size=2."""
    values = {
        "run_name": "run",
        "logdir": str(logdir),
        "num_epochs": 3,
        "save_freq": 1,
        "val_freq": 2,
        "tracker": "none",
        "mixed_precision": "no",
        "pretrained.model": str(world / "painter"),
        "prompts.num_train": 4,
        "prompts.train_file": str(world / "train.txt"),
        "prompts.val_file": str(world / "validation.txt"),
        "prompts.test_file": str(world / "test.txt"),
        "sample.num_steps": 4,
        "sample.total_batch_size": 8,
        "sample.batch_size": 4,
        "sample.save_images": 2,
        "train.total_batch_size": 8,
        "train.batch_size": 4,
        # large enough for steps that do not hang on the sign of gradients that are rounding noise
        "train.adam_epsilon": 1e-3,
        "recon.checkpoint": str(world / "lrm"),
        "recon.render_size": 32,
        "per_prompt_stat_tracking.min_count": 2,
        "per_prompt_stat_tracking.buffer_size": 6,
    }
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def flags(world, logdir, **changes):
    """Command-line flags of `settings`, for config/base.py."""
    return [f"--config.{key}={value}" for key, value in settings(world, logdir, **changes).items()]


def move_by_an_ulp(module, seed):
    """Move every weight to the next float32 number, up or down.

    Rounding does about the same to a forward and a backward pass: what a layer computes is exact for weights about an
    ulp away."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            up = torch.randint(2, parameter.shape, generator=generator).bool()
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))


def letter_tokenizer(folder, pad="<|endoftext|>"):
    """CLIP's tokenizer with a vocabulary of 99: letters, fillers, and as in CLIP token 0 is "!"."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"<{i}>" for i in range(97 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token=pad
    )
    tokenizer.save_pretrained(folder)


class GoldenPainter(MVSDXL):
    """The golden runs tell the UNet of a 1024-pixel grid but use latents of 8x8."""

    latent_shape = (4, 8, 8)


class StoredTokens:
    """Stands in for a tokenizer: gives the stored ids (N, length) of the golden prompts."""

    def __init__(self, input_ids):
        self.rows = dict(zip(GOLDEN_CONFIG["prompts"], input_ids, strict=True))
        self.model_max_length = input_ids.shape[1]

    added_tokens_encoder = {}

    def tokenize(self, prompt):  # asked for in search of textual inversion tokens, of which there are none
        return []

    def __call__(self, prompts, **_):
        return SimpleNamespace(input_ids=torch.stack([self.rows[prompt] for prompt in prompts]))


@functools.cache
def golden_tensors(name):
    """Those of tests/golden/`name`.safetensors, read once. Not to be changed."""
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_policy():
    """The painter of tests/golden/sdxl_rollout* and ppo_step*, without LoRA and without a reference of its own."""
    config, tokens = GOLDEN_CONFIG, golden_tensors("sdxl_rollout")
    parts = {
        "unet": UNet2DConditionModel(**config["unet"]),
        "vae": AutoencoderKL(**config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])),
    }
    for name, part in parts.items():
        weights = golden_tensors(f"tiny_{'vae_decoder' if name == 'vae' else name}")
        if name == "text_encoder":  # the name that this model's weights had in transformers 4
            weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
        problems = part.load_state_dict(weights, strict=False)
        missing = [key for key in problems.missing_keys if not key.startswith(("encoder.", "quant_conv."))]
        assert not problems.unexpected_keys and not missing, (name, missing)
    pipeline = StableDiffusionXLPipeline(
        **parts,
        scheduler=DDIMScheduler(**config["scheduler"]),
        tokenizer=StoredTokens(tokens["input_ids"]),
        tokenizer_2=StoredTokens(tokens["input_ids_2"]),
        add_watermarker=False,
    )
    return GoldenPainter(pipeline, instant3d_cameras())


def openlrm_config(name):
    """config.json of the tiny model `name`, with the keys of the published ones."""
    with safe_open(GOLDEN / f"openlrm_tiny_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    encoder = config.pop("enc")
    overrides = dict(
        hidden_size=encoder["dim"],
        num_hidden_layers=encoder["depth"],
        num_attention_heads=encoder["heads"],
        image_size=encoder["img_size"],
    )
    return dict(
        config,
        encoder_model_name="dinov2_vits14_reg",
        encoder_feat_dim=encoder["dim"],
        input_size={"a": 56, "b": 70}[name],
        encoder_overrides=overrides,
    )


SMALL_RECONSTRUCTORS = {
    "tiny_lrm": lambda: TinyLRM(width=8, volume=8, voxel_channels=4, plane_width=32, plane_channels=4, hidden=16),
    "lgm": lambda: LGM(**OPTIONS["rehearsal"]),
    "grm": lambda: GRM(**GRM_PARAMS),
    "openlrm": lambda: OpenLRM(**openlrm_config("a")),
    "instantmesh": lambda: InstantMesh(**INSTANTMESH),
}
