"""Train the small sculptor on the small world.

    python -m tiny.train_lrm            # about 60 minutes on one CPU core; resumes if interrupted; needs the VAE

Writes tiny/weights/lrm. Two thirds of the training views are spoilt the way a painter spoils them (blurred, or sent
through the VAE), while the truth to be rendered stays clean, so that MRC does not judge artefacts of the sculptor.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from diffusers_patch.mv_sdxl import split_grid
from mrc.sanity_rewards import tile_views
from recon.cameras import Cameras, instant3d_cameras, rays
from recon.tiny_lrm import TinyLRM
from recon.volume_rendering import render_rays
from tiny.objects import build, novel_cameras, random_caption, render
from tiny.training import ROOT, WEIGHTS, fit, psnr

COARSE, FINE, RAYS = 16, 16, 640


def blurred(views, generator):
    """A light random Gaussian blur of whole objects (B, 4, 3, S, S), sigma 0.3 to 1 pixel."""
    sigma = 0.3 + 0.7 * torch.rand((), generator=generator)
    x = torch.arange(-3, 4)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(views.flatten(0, 1), [3] * 4, mode="replicate"), kernel, groups=3).reshape(views.shape)


@torch.no_grad()
def through_vae(vae, views):
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(2 * tile_views(views) - 1).latent_dist.mode()
        return split_grid(vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def sample_rays(images, cameras, count, generator):
    """`count` rays of each object, three quarters of them near the foreground: origins, directions, colours, alphas."""
    B, M, _, S, _ = images.shape
    colour = images.permute(0, 1, 3, 4, 2).reshape(B, -1, 3)
    foreground = (images.amin(2) < 0.97).float()
    likely = F.max_pool2d(foreground, 7, stride=1, padding=3).flatten(1) * 3 / foreground.numel() * B
    likely = likely / likely.sum(1, keepdim=True) * 0.75 + 0.25 / likely.shape[1]
    pick = torch.multinomial(likely, count, generator=generator)
    origins, directions = (x.flatten(1, 2) for x in rays(cameras, S))

    def take(x):
        return x.gather(1, pick[..., None].expand(-1, -1, x.shape[-1]))

    return take(origins), take(directions), take(colour), foreground.flatten(1).gather(1, pick)


def make_loss(vae, batch=6):
    fixed = instant3d_cameras()

    def loss_fn(model, step, generator):
        captions = [random_caption(generator) for _ in range(batch)]
        random = novel_cameras(batch, 4, generator)
        cameras = Cameras(
            torch.cat([fixed.expand(batch).c2w, random.c2w], 1),
            torch.cat([fixed.expand(batch).fxfycxcy, random.fxfycxcy], 1),
        )
        images, coverage = render(build(captions, generator), cameras)
        views = images[:, :4].clone()
        part = batch // 3
        views[:part] = blurred(views[:part], generator)
        if vae is not None:
            views[part : 2 * part] = through_vae(vae, views[part : 2 * part])
        origins, directions, colour, _ = sample_rays(images, cameras, RAYS, generator)
        jitter = torch.rand(batch, RAYS, COARSE, generator=generator)
        u = (torch.arange(FINE) + torch.rand(batch, RAYS, FINE, generator=generator)) / FINE
        planes = model.planes(views, fixed).float()
        rgb, alpha = render_rays(
            model.field(planes), origins, directions, COARSE, FINE, jitter, u.clamp(1e-4, 1 - 1e-4)
        )
        mse = (rgb - colour).square().mean()
        # the coverage of a pixel is known exactly: it tells white matter from nothing
        truth = (colour.amin(-1) < 0.97).float()
        mask = (alpha - truth).square().mean()
        return mse + 0.1 * mask, {"psnr_rays": float(-10 * torch.log10(mse.detach()))}

    return loss_fn


@torch.no_grad()
def evaluate(model, count=32):
    """PSNR in dB of held-out objects at the four input views and at four novel views each."""
    generator = torch.Generator().manual_seed(10_000)
    objects = build([random_caption(generator) for _ in range(count)], generator)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=str(ROOT / "runs" / "lrm"))
    parser.add_argument(
        "--vae", default=str(WEIGHTS / "painter" / "vae"), help="folder of the VAE; '' trains without its round trips"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.vae).float().eval().requires_grad_(False) if args.vae else None
    model = fit(args.folder, TinyLRM(), make_loss(vae), args.steps, lr=2e-3, ema_decay=0.995)
    print(evaluate(model))
    model.save_pretrained(WEIGHTS / "lrm")


if __name__ == "__main__":
    main()
