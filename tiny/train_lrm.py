"""Train the small reconstructor on the small world.

    python -m tiny.train_lrm            # see weights/README.md for the time it takes; resumes if interrupted

Needs the VAE. Writes tiny/weights/lrm. Two thirds of the input views are degraded as a painter would degrade them
(blurred, or encoded and decoded by the VAE), while the target renders stay clean: otherwise MRC would also measure how
the reconstructor reacts to blur.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from diffusers_patch.mv_sdxl import split_grid
from mrc.sanity_rewards import tile_views
from recon.cameras import Cameras, instant3d_cameras, rays
from recon.tiny_lrm import TinyLRM
from recon.volume_rendering import render_rays
from tiny.objects import build, novel_cameras, random_caption, random_objects, render
from tiny.train_vae import VAE_FOLDER, load_vae
from tiny.training import WEIGHTS, LossFunction, fit, psnr, start_training, training_parser

COARSE, FINE, RAYS = 16, 16, 640  # depths per ray of the two passes, rays per object


def blurred(views: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All views (B, V, 3, S, S) with the same Gaussian blur, of a random sigma from 0.3 to 1 pixel."""
    sigma = 0.3 + 0.7 * torch.rand((), generator=generator)
    x = torch.arange(-3, 4)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(views.flatten(0, 1), [3] * 4, mode="replicate"), kernel, groups=3).reshape(views.shape)


@torch.no_grad()
def through_vae(vae: AutoencoderKL, views: torch.Tensor) -> torch.Tensor:
    """Encode and decode the 2x2 grids of views (B, 4, 3, S, S) in [0, 1]; returns the same shape and range."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(2 * tile_views(views) - 1).latent_dist.mode()
        return split_grid(vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def sample_rays(
    images: torch.Tensor, cameras: Cameras, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` random rays of each object, about three quarters of them near its foreground.

    images: (B, M, 3, S, S) in [0, 1]; cameras: (B, M). Returns origins, directions and colours, each (B, count, 3), and
    foreground (B, count) of 0 and 1."""
    colour = images.permute(0, 1, 3, 4, 2).flatten(1, 3)
    foreground = (images.amin(2) < 0.97).float()
    near = F.max_pool2d(foreground, 7, stride=1, padding=3).flatten(1)
    probability = near / near.sum(1, keepdim=True) * 0.75 + 0.25 / near.shape[1]
    pick = torch.multinomial(probability, count, generator=generator)
    origins, directions = (x.flatten(1, 2) for x in rays(cameras, images.shape[-1]))

    def take(x):
        return x.gather(1, pick[..., None].expand(-1, -1, x.shape[-1]))

    return take(origins), take(directions), take(colour), foreground.flatten(1).gather(1, pick)


def make_loss(vae: AutoencoderKL | None, batch: int = 6) -> LossFunction:
    """The loss for `fit`; vae: None trains without its reconstructions; batch: objects per step."""
    fixed = instant3d_cameras()

    def loss_fn(model, _step, generator):
        captions = [random_caption(generator) for _ in range(batch)]
        novel = novel_cameras(batch, 4, generator)
        cameras = Cameras(
            torch.cat([fixed.expand(batch).c2w, novel.c2w], 1),
            torch.cat([fixed.expand(batch).fxfycxcy, novel.fxfycxcy], 1),
        )
        images = render(build(captions, generator), cameras)[0]
        views = images[:, :4].clone()
        part = batch // 3
        views[:part] = blurred(views[:part], generator)
        if vae is not None:
            views[part : 2 * part] = through_vae(vae, views[part : 2 * part])
        origins, directions, colour, foreground = sample_rays(images, cameras, RAYS, generator)
        jitter = torch.rand(batch, RAYS, COARSE, generator=generator)
        u = (torch.arange(FINE) + torch.rand(batch, RAYS, FINE, generator=generator)) / FINE
        planes = model.planes(views, fixed).float()
        rgb, alpha = render_rays(
            model.field(planes), origins, directions, COARSE, FINE, jitter, u.clamp(1e-4, 1 - 1e-4)
        )
        mse = (rgb - colour).square().mean()
        mask = (alpha - foreground).square().mean()  # tells a white surface from empty space
        return mse + 0.1 * mask, {"psnr_rays": float(-10 * torch.log10(mse.detach()))}

    return loss_fn


@torch.no_grad()
def evaluate(model: TinyLRM, count: int = 32) -> dict[str, float]:
    """PSNR in dB of `count` held-out objects, at the four input views and at four novel views of each."""
    generator = torch.Generator().manual_seed(10_000)  # not the seed of the training
    objects = random_objects(count, generator)
    fixed, novel = instant3d_cameras(), novel_cameras(count, 4, generator)
    views, others = render(objects, fixed)[0], render(objects, novel)[0]
    result = {"input": [], "novel": []}
    for n in range(0, count, 8):
        scene = model.reconstruct(views[n : n + 8], fixed)
        result["input"].append(model.render(scene, fixed, 64)[0])
        result["novel"].append(model.render(scene, Cameras(novel.c2w[n : n + 8], novel.fxfycxcy[n : n + 8]), 64)[0])
    return {
        "input_psnr": psnr(torch.cat(result["input"]), views),
        "novel_psnr": psnr(torch.cat(result["novel"]), others),
    }


def main() -> None:
    parser = training_parser(__doc__, steps=2800)
    parser.add_argument(
        "--vae", default=str(VAE_FOLDER), help="folder of the VAE; '' trains without its reconstructions"
    )
    args = start_training(parser, "lrm")
    vae = load_vae(args.vae).eval().requires_grad_(False) if args.vae else None
    model = fit(args.folder, TinyLRM(), make_loss(vae), args.steps, lr=2e-3, ema_decay=0.995)
    print(evaluate(model))
    model.save_pretrained(WEIGHTS / "lrm")


if __name__ == "__main__":
    main()
