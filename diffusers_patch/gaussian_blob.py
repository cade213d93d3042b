"""How Instant3D starts: from noise around four Gaussian blobs, where its four objects are to be.

Noise alone leaves SDXL free to paint one object over the whole grid; the blobs say that there are four, each on white
in the middle of its view (Instant3D, Li et al. 2024, section 3.1; constants from the code published with GRM).
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler


def gaussian_blob(size: int, std: float) -> torch.Tensor:
    """The grid image of four blobs, (3, size, size) in [0, 1], white with black centres.

    One blob is 1 - exp(-(dx^2 + dy^2) / (2 (std * size)^2)) around pixel (size // 2, size // 2) of a whole image, and
    each quarter of the grid shows it at half the size. size: side of the grid in pixels, even. std: in sides of a view.
    """
    d = torch.arange(size, dtype=torch.float32) - size // 2
    blob = 1 - torch.exp(-(d[:, None] ** 2 + d**2) / (2 * (std * size) ** 2))
    return F.avg_pool2d(blob[None], 2).repeat(3, 2, 2)


@torch.no_grad()
def blob_latent(vae: AutoencoderKL, size: int, std: float) -> torch.Tensor:
    """The blobs as a latent of SDXL, z_blob (1, 4, h, w), float32 on the VAE's device.

    It is the mode of the VAE's posterior, so that all samples start around the same z_blob, whatever their batch. The
    published code draws a sample of the posterior, which makes no difference that matters: even a posterior std of 1
    would be scaled to 0.13, and the noise that is added to z_blob has a std of 14.
    """
    image = 2 * gaussian_blob(size, std) - 1
    posterior = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
    return posterior.mode().float() * vae.config.scaling_factor


def fused_start(scheduler: DDIMScheduler, z_blob: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_T (B, 4, h, w): z_blob (1, 4, h, w) with the noise of the first timestep of the scheduler's schedule.

    The published sampler works in the variance-exploding form, x_sigma = z + sigma * noise, and starts at
    noise * sigma_max + z_blob. DDIM works in the variance-preserving form, which is the same scaled by
    1 / sqrt(1 + sigma^2): with sigma_t = sqrt((1 - a_t) / a_t) at DDIM's first timestep t,

        x_T = (noise * sigma_t + z_blob) / sqrt(1 + sigma_t^2) = sqrt(a_t) * z_blob + sqrt(1 - a_t) * noise.

    The published sampler's first timestep is 999, where sigma is 14.6; that of DDIM with leading spacing and 100 steps
    is 991, where it is 13.9.

    noise: (B, 4, h, w), standard normal. scheduler: after `set_timesteps`.
    """
    return scheduler.add_noise(z_blob, noise, scheduler.timesteps[:1])
