"""Models small enough that a whole training run takes seconds, and the settings of such a run.

`make_world(folder)` writes a painter and a reconstructor with random weights and prompt files; `flags(world, ...)` are
the trainer's flags for them. `golden_policy()` is the painter of the golden rollout and of the golden update.
`SMALL_RECONSTRUCTORS` makes one of every kind, with random weights.
"""

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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_patch.mv_sdxl import MVSDXL
from recon.cameras import instant3d_cameras
from recon.grm import GRM
from recon.instantmesh import InstantMesh
from recon.instantmesh_checkpoint import published_weights
from recon.lgm import LGM
from recon.openlrm import OpenLRM
from recon.tiny_lrm import TinyLRM
from tiny.train_painter import assemble, make_tokenizer

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CONFIG = json.loads((GOLDEN / "sdxl_rollout_config.json").read_text())

LATENT = 8  # latents of 8x8: a grid of 64x64 pixels, views of 32x32
TEXT_WIDTH = 16
UNET = dict(
    sample_size=LATENT,
    in_channels=4,
    out_channels=4,
    block_out_channels=[16, 32],
    layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    mid_block_type="UNetMidBlock2DCrossAttn",
    attention_head_dim=[2, 4],
    transformer_layers_per_block=[1, 1],
    cross_attention_dim=2 * TEXT_WIDTH,
    norm_num_groups=8,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
)
VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[4, 4, 8, 8],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    sample_size=64,
    scaling_factor=0.13025,
    force_upcast=False,
)
TEXT = dict(
    hidden_size=TEXT_WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
    projection_dim=TEXT_WIDTH,
)
LRM = dict(width=8, volume=8, voxel_channels=8, plane_width=32, plane_channels=4, hidden=16)
PROMPTS = ["a red cube", "a blue sphere", "a green cone", "a yellow cylinder"]


MVDREAM_UNET = dict(
    sample_size=LATENT // 2,
    block_out_channels=[16, 32],
    layers_per_block=1,
    cross_attention_dim=TEXT_WIDTH,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    attention_head_dim=[2, 4],
    norm_num_groups=8,
    use_linear_projection=True,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=16,
)


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


def make_world(folder):
    """Write `painter/`, `lrm/`, `train.txt` (4 prompts), `validation.txt` (3) and `test.txt` (1) into `folder`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    assemble(RandomPainter(tokenizer), AutoencoderKL(**VAE), tokenizer).save_pretrained(folder / "painter")
    TinyLRM(**LRM).save_pretrained(folder / "lrm")
    for name, prompts in (("train", PROMPTS), ("validation", PROMPTS[:3]), ("test", PROMPTS[:1])):
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return folder


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
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "mvdream")
    return folder


def settings(world, logdir, **changes):
    """{key: value} below `config` for a run of seconds: 3 epochs of 8 samples and 4 steps, one update per epoch.

    changes: other values, with __ for the dot, as in train__batch_size=2."""
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


def golden_policy():
    """The painter of tests/golden/sdxl_rollout* and ppo_step*, without LoRA and without a reference of its own."""
    config, tokens = GOLDEN_CONFIG, load_file(GOLDEN / "sdxl_rollout.safetensors")
    parts = {
        "unet": UNet2DConditionModel(**config["unet"]),
        "vae": AutoencoderKL(**config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])),
    }
    for name, part in parts.items():
        weights = load_file(GOLDEN / f"tiny_{'vae_decoder' if name == 'vae' else name}.safetensors")
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


SMALL_GRM = {
    "in_channels": 3,
    "input_res": 16,
    "patch_size": 8,
    "layers": 2,
    "width": 64,
    "window_size": 32,
    "decoder_ratio": 1,
}
SMALL_LGM = dict(
    input_size=32,
    down_channels=(32, 64),
    down_attention=(False, True),
    up_channels=(64, 32),
    up_attention=(True, False),
    splat_size=32,
)
SMALL_INSTANTMESH = dict(  # with attention heads of 64 channels, which is how a file of it is understood
    encoder_feat_dim=64,
    transformer_dim=64,
    transformer_layers=2,
    transformer_heads=1,
    triplane_low_res=4,
    triplane_high_res=8,
    triplane_dim=8,
    rendering_samples_per_ray=16,
    input_size=32,
    encoder_overrides=dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
    ),
)


def save_as_lightning(model, file, **entries):
    """Write the weights of an InstantMesh as they are published, a checkpoint of PyTorch Lightning; entries: others
    than the weights, or in their place."""
    state = {"state_dict": published_weights(model), "epoch": 3, "pytorch-lightning_version": "2.1.2"}
    torch.save(state | entries, file)


SMALL_RECONSTRUCTORS = {
    "tiny_lrm": lambda: TinyLRM(width=8, volume=8, voxel_channels=4, plane_width=32, plane_channels=4, hidden=16),
    "lgm": lambda: LGM(**SMALL_LGM),
    "grm": lambda: GRM(**SMALL_GRM),
    "openlrm": lambda: OpenLRM(**openlrm_config("a")),
    "instantmesh": lambda: InstantMesh(**SMALL_INSTANTMESH),
}
