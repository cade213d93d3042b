"""Train the small MVDream: an SD 2.1 UNet that paints four separate views which attend to each other.

    python -m tiny.train_mvdream        # see weights/README.md for the time it takes; resumes if interrupted

Needs the VAE. Writes tiny/weights/mvdream, a pipeline folder in stock layout, which the trainer reads with
`painter.name = "mvdream"`. Objects, captions and views are those of the grid painter (tiny/train_painter.py).
"""

import torch
import torch.nn as nn
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_patch.mvdream import VIEWS, let_views_attend
from recon.cameras import mvdream_camera_vectors, mvdream_cameras
from tiny.train_painter import MAX_TOKENS, SCHEDULER_CONFIG, TrainedParts, text_config, train
from tiny.train_vae import encode as encode_images

ELEVATION, AZIMUTH_START = 20.0, 315.0  # degrees: the reconstructor's cameras in MVDream's azimuth convention
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


class ViewPainter(TrainedParts):
    """The trained parts of the Stable Diffusion pipeline, with the forward pass for training."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        self.text_encoder = CLIPTextModel(text_config(tokenizer, **TEXT_CONFIG))
        empty_caption = tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        self.register_buffer("empty_caption", empty_caption, persistent=False)
        vectors = mvdream_camera_vectors(mvdream_cameras(ELEVATION, AZIMUTH_START))
        self.register_buffer("camera_vectors", vectors, persistent=False)

    def set_unet_attention(self, processor: AttnProcessor) -> None:
        let_views_attend(self.unet, processor)

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """The velocity predicted for noisy latents (B, 4, 4, 8, 8) of four views: the same shape.

        timesteps: (B,); tokens: (B, 24); keep: (B,) of 0 and 1, 0 where the caption is replaced by the empty one."""
        tokens = torch.where(keep[:, None] > 0, tokens, self.empty_caption)
        embeds = self.text_encoder(tokens).last_hidden_state.repeat_interleave(VIEWS, 0)
        cameras = self.camera_vectors.to(latents.dtype).repeat(len(latents), 1)
        output = self.unet(
            latents.flatten(0, 1), timesteps.repeat_interleave(VIEWS), embeds, class_labels=cameras
        ).sample
        return output.unflatten(0, latents.shape[:2])


def encode(vae: AutoencoderKL, views: torch.Tensor) -> torch.Tensor:
    """views (N, 4, 3, 64, 64) in [0, 1] -> latents (N, 4, 4, 8, 8) of each view, scaled to unit variance."""
    latents = encode_images(vae, views.flatten(0, 1), batch=80) * vae.config.scaling_factor
    return latents.unflatten(0, views.shape[:2]).contiguous()


def assemble(painter: nn.Module, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The stock pipeline of the trained parts."""
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
