"""Train the small painter: an SDXL UNet and two CLIP text encoders that paint the 2x2 grid of a caption.

    python -m tiny.train_painter        # hours on one CPU core (see weights/README.md); resumes if interrupted

Needs the VAE. Writes tiny/weights/painter, a pipeline folder that stock `StableDiffusionXLPipeline.from_pretrained`
loads. The small VAE encodes a fixed set of pictures once; the UNet and the text encoders are trained together on those
latents.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mrc.sanity_rewards import tile_views
from tiny.captions import held_out
from tiny.objects import all_captions, build, fixed_views, random_caption
from tiny.training import ROOT, WEIGHTS, fit

GRID = 128
MAX_TOKENS = 24
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


def make_tokenizer(folder):
    """A CLIP byte-pair tokenizer whose merges make one token of every word of the small world; the one in `folder`, if
    it is there already, because ties between merges are broken anew in every training."""
    if not (folder / "vocab.json").exists():
        train_tokenizer(folder)
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )


def train_tokenizer(folder):
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


class Painter(nn.Module):
    """The trained parts of the SDXL pipeline, with the forward pass of its training."""

    def __init__(self, tokenizer):
        super().__init__()
        ids = dict(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG, **ids, hidden_act="quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_CONFIG, **ids, hidden_act="gelu"))

    def use_plain_attention(self):
        """The backward pass of fused attention is slower than plain matrix products on CPUs."""
        self.unet.set_attn_processor(AttnProcessor())
        for encoder in (self.text_encoder, self.text_encoder_2):
            encoder.set_attn_implementation("eager")

    def forward(self, latents, timesteps, tokens, keep):
        """Velocity prediction; `keep` (B,) is 0 where the caption is dropped (zeros, as SDXL's unconditional
        branch)."""
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * keep[:, None, None]
        time_ids = torch.tensor([GRID, GRID, 0, 0, GRID, GRID], dtype=latents.dtype).expand(len(latents), 6)
        added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
        return self.unet(latents, timesteps, embeds, added_cond_kwargs=added).sample


@torch.no_grad()
def encode(vae, views):
    """views (N, 4, 3, 64, 64) in [0, 1] -> latents (N, 4, 16, 16) of their grids, scaled to unit variance."""
    grids = (2 * tile_views(views) - 1).to(vae.dtype)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in grids.split(20)])
    return latents.float() * vae.config.scaling_factor


def training_set(folder, vae, count, encode):
    """Cached captions and latents; an interrupted preparation goes on where it stopped.

    encode: (vae, views) -> latents, as the painter at hand wants them."""
    folder.mkdir(parents=True, exist_ok=True)
    banned, size = held_out(), 500
    parts = []
    for part in range(count // size):
        file = folder / f"latents_{part:03d}.safetensors"
        generator = torch.Generator().manual_seed(1000 + part)
        captions = []
        while len(captions) < size:
            caption = random_caption(generator)
            if caption not in banned:
                captions.append(caption)
        if not file.exists():
            views = [fixed_views(build(captions[i : i + 20], generator)) for i in range(0, size, 20)]
            save_file({"latents": encode(vae, torch.cat(views)).half()}, file)
            print(f"prepared {(part + 1) * size} of {count} pictures", flush=True)
        parts.append((captions, load_file(file)["latents"]))
    return [c for captions, _ in parts for c in captions], torch.cat([latents for _, latents in parts])


def make_loss(captions, latents, tokenizer, batch=64):
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod

    def loss_fn(model, step, generator):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        a = alphas[t].reshape(-1, *[1] * (x0.ndim - 1))
        keep = (torch.rand(batch, generator=generator) > 0.1).bfloat16()
        v = model((a.sqrt() * x0 + (1 - a).sqrt() * noise).bfloat16(), t, tokens[pick], keep).float()
        return (v - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean(), {}

    return loss_fn


def assemble(painter, vae, tokenizer):
    vae.register_to_config(_name_or_path="")  # where it was loaded from is nobody's business
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


def train(name, description, painter_class, encode, assemble):
    """The command that makes tiny/weights/<name>.

    painter_class: tokenizer -> the trained parts; encode: see `training_set`; assemble: (painter, vae, tokenizer) ->
    pipeline."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=10000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=str(ROOT / "runs" / name))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    folder = Path(args.folder)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "painter" / "vae")
    tokenizer = make_tokenizer(folder / "tokenizer")
    captions, latents = training_set(folder, copy.deepcopy(vae).bfloat16(), args.pictures, encode)
    painter = painter_class(tokenizer)
    painter.use_plain_attention()
    painter = fit(
        folder, painter, make_loss(captions, latents, tokenizer, batch=32), args.steps, lr=8e-4, ema_decay=0.999
    )
    painter.unet.half()  # the text encoders stay in float32: transformers loads them in the type they were saved in,
    # diffusers loads the UNet in float32, and the two must agree for a plain `from_pretrained`
    assemble(painter, vae.half(), tokenizer).save_pretrained(WEIGHTS / name)


if __name__ == "__main__":
    train("painter", __doc__, Painter, encode, assemble)
