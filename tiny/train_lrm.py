"""Train the small reconstructor on the small world.

    python -m tiny.train_lrm            # see weights/README.md for the time it takes; resumes if interrupted

Needs the VAE. Writes tiny/weights/lrm. Two thirds of the input views are degraded as a painter would degrade them
(blurred, or encoded and decoded by the VAE), while the target renders stay clean: otherwise MRC would also measure how
the reconstructor reacts to blur. Besides single rays, a patch of each object is rendered and compared by LPIPS, as LRM
does: what MRC leaves on exact views is the loss of sharp edges, which squared errors hardly see.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from diffusers_patch.mv_sdxl import split_grid
from mrc.lpips import LPIPS
from mrc.mrc import view_distances
from mrc.sanity_rewards import tile_views
from recon.cameras import Cameras, instant3d_cameras, rays
from recon.reconstructor import Reconstructor
from recon.tiny_lrm import TinyLRM
from recon.volume_rendering import render_rays
from tiny.objects import novel_cameras, random_objects, render
from tiny.train_vae import VAE_FOLDER, load_vae
from tiny.training import WEIGHTS, LossFunction, fit, psnr, start_training, training_parser

COARSE, FINE, RAYS = 16, 16, 320  # depths per ray of the two passes, single rays per object
PATCH = 32  # side of the patch of each object that is compared by LPIPS, at twice its size: near that of MRC's crops
LPIPS_WEIGHT = 0.2


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


def coverage(images: torch.Tensor) -> torch.Tensor:
    """Where exact images (..., 3, S, S) in [0, 1] show the object, edges included: (..., S, S) of 0 and 1."""
    return (images.amin(-3) < 0.97).float()


def sample_rays(
    images: torch.Tensor, cameras: Cameras, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` random rays of each object, about three quarters of them near its foreground.

    images: (B, M, 3, S, S) in [0, 1]; cameras: (B, M). Returns origins, directions and colours, each (B, count, 3), and
    foreground (B, count) of 0 and 1."""
    colour = images.permute(0, 1, 3, 4, 2).flatten(1, 3)
    foreground = coverage(images)
    near = F.max_pool2d(foreground, 7, stride=1, padding=3).flatten(1)
    probability = near / near.sum(1, keepdim=True) * 0.75 + 0.25 / near.shape[1]
    pick = torch.multinomial(probability, count, generator=generator)
    origins, directions = (x.flatten(1, 2) for x in rays(cameras, images.shape[-1]))

    def take(x):
        return x.gather(1, pick[..., None].expand(-1, -1, x.shape[-1]))

    return take(origins), take(directions), take(colour), foreground.flatten(1).gather(1, pick)


def patch_rays(images: torch.Tensor, cameras: Cameras, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """The rays of one PATCH x PATCH window of each object, in a random view, around a random foreground pixel.

    Arguments and results as of `sample_rays`; the rays of a window are in the order of its pixels, row by row."""
    B, M, _, S, _ = images.shape
    view = torch.randint(M, (B,), generator=generator)
    one = torch.arange(B)
    images, cameras = images[one, view], Cameras(cameras.c2w[one, view], cameras.fxfycxcy[one, view])
    foreground = coverage(images)
    middle = torch.multinomial(foreground.flatten(1) + 1e-6, 1, generator=generator)[:, 0]
    top, left = ((place - PATCH // 2).clamp(0, S - PATCH) for place in (middle // S, middle % S))
    window = torch.arange(PATCH)
    pick = ((top[:, None] + window) * S)[..., None] + (left[:, None] + window)[:, None]
    pick = pick.flatten(1)
    origins, directions = rays(cameras, S)
    colour = images.flatten(2).transpose(1, 2)
    values = (x.gather(1, pick[..., None].expand(-1, -1, 3)) for x in (origins, directions, colour))
    return *values, foreground.flatten(1).gather(1, pick)


def patch_distance(lpips: LPIPS, patches: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean LPIPS of patches and targets (B, PATCH^2, 3) as of `patch_rays`, at twice their size."""
    pair = torch.cat([patches, targets]).transpose(1, 2).unflatten(2, (PATCH, PATCH))
    large = F.interpolate(pair, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    return lpips(*large.chunk(2)).mean()


def random_scenes(
    count: int, vae: AutoencoderKL | None, generator: torch.Generator
) -> tuple[torch.Tensor, Cameras, torch.Tensor]:
    """New random objects as a reconstructor is trained on them.

    Returns exact images (count, 8, 3, 64, 64) in [0, 1] of four fixed and four random cameras, these cameras (count,
    8), and the four fixed views (count, 4, 3, 64, 64) as a painter might paint them: one third exact, one blurred, one
    encoded and decoded by the VAE (None = exact too)."""
    fixed, novel = instant3d_cameras().expand(count), novel_cameras(count, 4, generator)
    cameras = Cameras(torch.cat([fixed.c2w, novel.c2w], 1), torch.cat([fixed.fxfycxcy, novel.fxfycxcy], 1))
    images = render(random_objects(count, generator), cameras)[0]
    views = images[:, :4].clone()
    kind = torch.randint(3, (count,), generator=generator)
    views[kind == 1] = blurred(views[kind == 1], generator)
    if vae is not None and (kind == 2).any():
        views[kind == 2] = through_vae(vae, views[kind == 2])
    return images, cameras, views


def make_loss(vae: AutoencoderKL | None, batch: int = 4) -> LossFunction:
    """The loss for `fit`; vae: None trains without its reconstructions; batch: objects per step."""
    fixed, lpips = instant3d_cameras(), LPIPS()

    def loss_fn(model, _step, generator):
        images, cameras, views = random_scenes(batch, vae, generator)
        single, window = sample_rays(images, cameras, RAYS, generator), patch_rays(images, cameras, generator)
        origins, directions, colour, foreground = (torch.cat(pair, 1) for pair in zip(single, window, strict=True))
        count = colour.shape[1]
        jitter = torch.rand(batch, count, COARSE, generator=generator)
        u = (torch.arange(FINE) + torch.rand(batch, count, FINE, generator=generator)) / FINE
        planes = model.planes(views, fixed).float()
        rgb, alpha = render_rays(
            model.field(planes), origins, directions, COARSE, FINE, jitter, u.clamp(1e-4, 1 - 1e-4)
        )
        mse = (rgb - colour).square().mean()
        mask = (alpha - foreground).square().mean()  # tells a white surface from empty space
        distance = patch_distance(lpips, rgb[:, RAYS:], colour[:, RAYS:])
        metrics = {"psnr_rays": float(-10 * torch.log10(mse.detach())), "lpips": float(distance.detach())}
        return mse + 0.1 * mask + LPIPS_WEIGHT * distance, metrics

    return loss_fn


@torch.no_grad()
def evaluate(model: Reconstructor, count: int = 32) -> dict[str, float]:
    """Of `count` held-out objects the PSNR in dB, at the four input views and at four novel views of each, and the MRC
    of the input views."""
    generator = torch.Generator().manual_seed(10_000)  # not the seed of the training
    objects = random_objects(count, generator)
    fixed, novel = instant3d_cameras(), novel_cameras(count, 4, generator)
    views, others = render(objects, fixed)[0], render(objects, novel)[0]
    result = {"input": [], "novel": []}
    for n in range(0, count, 8):
        scene = model.reconstruct(views[n : n + 8], fixed)
        result["input"].append(model.render(scene, fixed, 64)[0])
        result["novel"].append(model.render(scene, Cameras(novel.c2w[n : n + 8], novel.fxfycxcy[n : n + 8]), 64)[0])
    renders = torch.cat(result["input"])
    return {
        "input_psnr": psnr(renders, views),
        "novel_psnr": psnr(torch.cat(result["novel"]), others),
        "mrc": float(view_distances(views, renders, LPIPS()).mean()),
    }


def reconstructor_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The options of the training of a reconstructor; steps: the default of --steps."""
    parser = training_parser(description, steps)
    parser.add_argument(
        "--vae", default=str(VAE_FOLDER), help="folder of the VAE; '' trains without its reconstructions"
    )
    return parser


def frozen_vae(folder: str) -> AutoencoderKL | None:
    """The VAE of --vae, for `random_scenes`; None for ''."""
    return load_vae(folder).eval().requires_grad_(False) if folder else None


def main() -> None:
    parser = reconstructor_parser(__doc__, steps=2800)
    parser.add_argument("--lr", type=float, default=2e-3, help="largest step size (default: %(default)s)")
    parser.add_argument(
        "--start", help="folder of a TinyLRM to start from, such as tiny/weights/lrm (default: nothing)"
    )
    args = start_training(parser, "lrm")
    vae = frozen_vae(args.vae)
    model = TinyLRM.from_pretrained(args.start).train() if args.start else TinyLRM()
    model = fit(args.folder, model, make_loss(vae), args.steps, lr=args.lr, ema_decay=0.995)
    print(evaluate(model))
    model.save_pretrained(WEIGHTS / "lrm")


if __name__ == "__main__":
    main()
