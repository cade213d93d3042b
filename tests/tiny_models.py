"""Models with random weights, small enough that a whole training run takes seconds, and the settings of such a run.

`make_world(folder)` writes a painter, a sculptor and prompt files; `flags(world, ...)` are the trainer's flags for them.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from recon.tiny_lrm import TinyLRM
from tiny.train_painter import assemble, make_tokenizer

LATENT = 8  # latents of 8x8: a grid of 64x64 pixels, views of 32x32
TEXT_WIDTH = 16
UNET = dict(
    sample_size=LATENT, in_channels=4, out_channels=4, block_out_channels=[16, 32], layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    mid_block_type="UNetMidBlock2DCrossAttn", attention_head_dim=[2, 4], transformer_layers_per_block=[1, 1],
    cross_attention_dim=2 * TEXT_WIDTH, norm_num_groups=8, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
)
VAE = dict(
    in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[4, 4, 8, 8], layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64,
    scaling_factor=0.13025, force_upcast=False,
)
TEXT = dict(
    hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24,
    projection_dim=TEXT_WIDTH,
)
LRM = dict(width=8, volume=8, voxel_channels=8, plane_width=16, plane_channels=4, hidden=16)
PROMPTS = ["a red cube", "a blue sphere", "a green cone", "a yellow cylinder"]


class RandomPainter:
    """The parts of an SDXL pipeline that `tiny.train_painter.assemble` wants, untrained."""

    def __init__(self, tokenizer):
        ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.pad_token_id)
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


def settings(world, logdir, **changes):
    """{key: value} below `config` for a run of seconds: 3 epochs of 8 samples and 4 steps, one update per epoch.

    changes: other values, with __ for the dot, as in train__batch_size=2."""
    values = {
        "run_name": "run", "logdir": str(logdir), "num_epochs": 3, "save_freq": 1, "val_freq": 2, "tracker": "none",
        "mixed_precision": "no", "pretrained.model": str(world / "painter"), "prompts.num_train": 4,
        "prompts.train_file": str(world / "train.txt"), "prompts.val_file": str(world / "validation.txt"),
        "prompts.test_file": str(world / "test.txt"), "sample.num_steps": 4, "sample.total_batch_size": 8,
        "sample.batch_size": 4, "sample.save_images": 2, "train.total_batch_size": 8, "train.batch_size": 4,
        "recon.checkpoint": str(world / "lrm"), "recon.render_size": 32, "per_prompt_stat_tracking.min_count": 2,
        "per_prompt_stat_tracking.buffer_size": 6,
    }
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def flags(world, logdir, **changes):
    """Command-line flags of `settings`, for config/base.py."""
    return [f"--config.{key}={value}" for key, value in settings(world, logdir, **changes).items()]
