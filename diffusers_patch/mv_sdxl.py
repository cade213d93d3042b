"""MVSDXL: SDXL that paints four views of one object as a 2x2 grid, as Instant3D does."""

import torch

from diffusers_patch.gaussian_blob import blob_latent, fused_start
from diffusers_patch.policy import MultiViewPolicy, weights_dtype


class MVSDXL(MultiViewPolicy):
    """A stock `StableDiffusionXLPipeline` as a multi-view policy. Latents (B, 4, h, w) are those of the whole grid.

    blob_std: start from noise around the blobs of `gaussian_blob(size, blob_std)`; None = from noise alone.
    """

    def __init__(self, pipeline, cameras, guidance_rescale=0.0, blob_std=None):
        super().__init__(pipeline, cameras, guidance_rescale)
        self.blob_std, self._z_blob = blob_std, None
        size = float(self.image_size)  # original size, crop corner, target size, all of the whole grid
        self.time_ids = torch.tensor([size, size, 0, 0, size, size])

    def to(self, device, mixed_precision="no"):
        self._z_blob = None  # encoded again, where and as the VAE is then
        self.time_ids = self.time_ids.to(device)  # once, not in every step
        return super().to(device, mixed_precision)

    def initial_latents(self, batch, generator=None):
        noise = super().initial_latents(batch, generator)
        if self.blob_std is None:
            return noise
        if self._z_blob is None:
            self._z_blob = blob_latent(self.pipeline.vae, self.image_size, self.blob_std)
        return fused_start(self.scheduler, self._z_blob, noise)

    def _text_encoders(self):
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def latent_shape(self):
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    @property
    def image_size(self):
        """Side of the grid image in pixels."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    def _encode(self, prompts):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def _unconditional(self, conditioning):
        # SDXL was trained with zeros in place of a dropped caption
        return {name: torch.zeros_like(value) for name, value in conditioning.items()}

    def _unet(self, unet, latents, timesteps, conditioning):
        dtype = weights_dtype(unet)
        time_ids = self.time_ids.to(latents.device, dtype).expand(len(latents), 6)
        added = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": time_ids}
        embeds = conditioning["prompt_embeds"].to(dtype)
        return unet(latents.to(dtype), timesteps, embeds, added_cond_kwargs=added).sample

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 4, h, w) -> views (B, 4, 3, S, S) in [0, 1], reading order of the grid."""
        vae = self.pipeline.vae
        parts = (latents / vae.config.scaling_factor).to(weights_dtype(vae)).split(self.decode_batch_size)
        grids = torch.cat([vae.decode(part).sample.float() for part in parts])
        return split_grid((grids / 2 + 0.5).clamp(0, 1))


def split_grid(grids: torch.Tensor) -> torch.Tensor:
    """(B, 3, 2S, 2S) -> (B, 4, 3, S, S): top left, top right, bottom left, bottom right."""
    B, C, H, W = grids.shape
    return grids.reshape(B, C, 2, H // 2, 2, W // 2).permute(0, 2, 4, 1, 3, 5).reshape(B, 4, C, H // 2, W // 2)
