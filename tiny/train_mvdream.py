"""Train the small MVDream: an SD 2.1 UNet that paints four separate views which attend to each other.

    python -m tiny.train_mvdream        # about an hour on one CPU core; resumes if interrupted

Needs the VAE. Writes tiny/weights/mvdream, a pipeline folder in stock layout, which the trainer reads with
`painter.name = "mvdream"`. Same objects, captions and views as the grid painter's (tiny/train_painter.py).
"""

import torch
import torch.nn as nn
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_patch.mvdream import VIEWS, let_views_attend
from recon.cameras import mvdream_camera_vectors, mvdream_cameras
from tiny.train_painter import MAX_TOKENS, SCHEDULER_CONFIG, train

ELEVATION, AZIMUTH_START = 20.0, 315.0  # the sculptor's cameras, as MVDream counts azimuths
UNET_CONFIG = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=[48, 96],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    attention_head_dim=[2, 3],
    cross_attention_dim=96,
    norm_num_groups=16,
    use_linear_projection=True,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=16,
)
TEXT_CONFIG = dict(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS,
    hidden_act="gelu",
)


class ViewPainter(nn.Module):
    """The trained parts of the pipeline, with the forward pass of its training."""

    def __init__(self, tokenizer):
        super().__init__()
        ids = dict(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG, **ids))
        nothing = tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        self.register_buffer("nothing", nothing, persistent=False)
        vectors = mvdream_camera_vectors(mvdream_cameras(ELEVATION, AZIMUTH_START))
        self.register_buffer("camera_vectors", vectors, persistent=False)

    def use_plain_attention(self):
        """The backward pass of fused attention is slower than plain matrix products on CPUs."""
        let_views_attend(self.unet, AttnProcessor())
        self.text_encoder.set_attn_implementation("eager")

    def forward(self, latents, timesteps, tokens, keep):
        """Velocity prediction (B, 4, 4, 8, 8); where `keep` (B,) is 0 the caption is the empty one."""
        tokens = torch.where(keep[:, None] > 0, tokens, self.nothing)
        embeds = self.text_encoder(tokens).last_hidden_state.repeat_interleave(VIEWS, 0)
        cameras = self.camera_vectors.to(latents.dtype).repeat(len(latents), 1)
        output = self.unet(
            latents.flatten(0, 1), timesteps.repeat_interleave(VIEWS), embeds, class_labels=cameras
        ).sample
        return output.unflatten(0, latents.shape[:2])


@torch.no_grad()
def encode(vae, views):
    """views (N, 4, 3, 64, 64) in [0, 1] -> latents (N, 4, 4, 8, 8), scaled to unit variance."""
    images = (2 * views.flatten(0, 1) - 1).to(vae.dtype)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(80)])
    return (latents.float() * vae.config.scaling_factor).unflatten(0, views.shape[:2]).contiguous()


def assemble(painter, vae, tokenizer):
    vae.register_to_config(_name_or_path="")  # where it was loaded from is nobody's business
    return StableDiffusionPipeline(
        vae=vae,
        unet=painter.unet,
        text_encoder=painter.text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    train("mvdream", __doc__, ViewPainter, encode, assemble)
