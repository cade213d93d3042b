"""Train the small painter: an SDXL UNet and two CLIP text encoders that paint the 2x2 grid of a caption.

    python -m tiny.train_painter        # see weights/README.md for the time it takes; resumes if interrupted

Needs the VAE. Writes tiny/weights/painter, a pipeline folder that stock `StableDiffusionXLPipeline.from_pretrained`
loads. The VAE encodes the grids of a fixed set of objects once; the UNet and the text encoders are trained jointly on
those latents.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from mrc.sanity_rewards import tile_views
from tiny.captions import random_training_captions
from tiny.objects import all_captions, build, fixed_views
from tiny.train_vae import encode as encode_images
from tiny.train_vae import load_vae
from tiny.training import WEIGHTS, LossFunction, fit, start_training, training_parser

GRID = 128  # pixels
MAX_TOKENS = 24
PART = 500  # objects per file of the cached training set
SCHEDULER_CONFIG = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
)
UNET_CONFIG = dict(
    sample_size=GRID // 8,
    in_channels=4,
    out_channels=4,
    block_out_channels=[64, 128],
    layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    mid_block_type="UNetMidBlock2DCrossAttn",
    attention_head_dim=[2, 4],
    transformer_layers_per_block=[1, 1],
    cross_attention_dim=128,
    norm_num_groups=16,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 64,
)
TEXT_CONFIG = dict(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS,
    projection_dim=64,
)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer for which every word of the small world is one token.

    Trains it in `folder` unless it is there already: training is not deterministic, because ties between merges are
    broken at random."""
    if not (folder / "vocab.json").exists():
        train_tokenizer(folder)
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )


def train_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt of a tokenizer of the small world into `folder`."""
    words = sorted(set(" ".join(all_captions()).split()))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    model = json.loads(bpe.to_str())["model"]
    symbols = letters + [letter + "</w>" for letter in letters]
    symbols += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in symbols]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def text_config(tokenizer: CLIPTokenizer, **settings) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder for `tokenizer`; settings: sizes and the like."""
    return CLIPTextConfig(
        **settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class TrainedParts(nn.Module):
    """The trained parts of a pipeline: `unet` and one or more CLIP text encoders."""

    def set_unet_attention(self, processor: AttnProcessor) -> None:
        self.unet.set_attn_processor(processor)

    def use_plain_attention(self) -> None:
        """Replace fused attention, whose backward pass on CPUs is slower than that of plain matrix products."""
        self.set_unet_attention(AttnProcessor())
        for part in self.children():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("eager")


class Painter(TrainedParts):
    """The trained parts of the SDXL pipeline, with the forward pass for training."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        self.text_encoder = CLIPTextModel(text_config(tokenizer, **TEXT_CONFIG, hidden_act="quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer, **TEXT_CONFIG, hidden_act="gelu"))

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """The velocity predicted for noisy latents (B, 4, 16, 16): the same shape.

        timesteps: (B,); tokens: (B, 24); keep: (B,) of 0 and 1, 0 where the caption is dropped (its embeddings are
        replaced by zeros, as in SDXL's unconditional branch)."""
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * keep[:, None, None]
        time_ids = torch.tensor([GRID, GRID, 0, 0, GRID, GRID], dtype=latents.dtype).expand(len(latents), 6)
        added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
        return self.unet(latents, timesteps, embeds, added_cond_kwargs=added).sample


def encode(vae: AutoencoderKL, views: torch.Tensor) -> torch.Tensor:
    """views (N, 4, 3, 64, 64) in [0, 1] -> latents (N, 4, 16, 16) of their grids, scaled to unit variance."""
    return encode_images(vae, tile_views(views), batch=20) * vae.config.scaling_factor


def training_set(
    folder: Path, vae: AutoencoderKL, count: int, encode: Callable[[AutoencoderKL, torch.Tensor], torch.Tensor]
) -> tuple[list[str], torch.Tensor]:
    """Captions and latents of `count` objects, a multiple of PART; cached, so that interrupted work is resumed.

    encode: (vae, views) -> latents of the painter. Raises ValueError for another `count`."""
    if count < PART or count % PART:
        raise ValueError(f"--objects is {count}; give a positive multiple of {PART}.")
    folder.mkdir(parents=True, exist_ok=True)
    captions, latents = [], []
    for part in range(count // PART):
        file = folder / f"latents_{part:03d}.safetensors"
        generator = torch.Generator().manual_seed(1000 + part)
        some = random_training_captions(PART, generator)
        if not file.exists():
            views = [fixed_views(build(some[i : i + 20], generator)) for i in range(0, PART, 20)]
            save_file({"latents": encode(vae, torch.cat(views)).half()}, file)
            print(f"rendered and encoded {(part + 1) * PART} of {count} objects", flush=True)
        captions += some
        latents.append(load_file(file)["latents"])
    return captions, torch.cat(latents)


def make_loss(captions: list[str], latents: torch.Tensor, tokenizer: CLIPTokenizer, batch: int = 64) -> LossFunction:
    """The loss for `fit`: velocity prediction on N captions and latents (N, ...), with 10 % of the captions dropped."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod

    def loss_fn(model, _step, generator):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        a = alphas[t].reshape(-1, *[1] * (x0.ndim - 1))
        keep = (torch.rand(batch, generator=generator) > 0.1).bfloat16()
        v = model((a.sqrt() * x0 + (1 - a).sqrt() * noise).bfloat16(), t, tokens[pick], keep).float()
        return (v - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean(), {}

    return loss_fn


def assemble(painter: nn.Module, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """The stock pipeline of the trained parts."""
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=painter.unet,
        text_encoder=painter.text_encoder,
        text_encoder_2=painter.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def train(
    name: str,
    description: str,
    painter_class: type[TrainedParts],
    encode: Callable[[AutoencoderKL, torch.Tensor], torch.Tensor],
    assemble: Callable[[nn.Module, AutoencoderKL, CLIPTokenizer], DiffusionPipeline],
) -> None:
    """The command that trains a painter and writes tiny/weights/<name>.

    painter_class: tokenizer -> the parts to train; encode: see `training_set`; assemble: (painter, vae, tokenizer) ->
    pipeline."""
    parser = training_parser(description, steps=3000)
    parser.add_argument("--objects", type=int, default=10000, help="size of the training set (default: %(default)s)")
    args = start_training(parser, name)
    vae = load_vae()
    tokenizer = make_tokenizer(args.folder / "tokenizer")
    captions, latents = training_set(args.folder, copy.deepcopy(vae).bfloat16(), args.objects, encode)
    painter = painter_class(tokenizer)
    painter.use_plain_attention()
    loss_fn = make_loss(captions, latents, tokenizer, batch=32)
    painter = fit(args.folder, painter, loss_fn, args.steps, lr=8e-4, ema_decay=0.999)
    painter.unet.half()  # the text encoders stay in float32: transformers loads them in the type they were saved in,
    # diffusers loads the UNet in float32, and the two must agree for a plain `from_pretrained`
    vae.register_to_config(_name_or_path="")  # the local path it was loaded from has no place in published files
    assemble(painter, vae.half(), tokenizer).save_pretrained(WEIGHTS / name)


if __name__ == "__main__":
    train("painter", __doc__, Painter, encode, assemble)
