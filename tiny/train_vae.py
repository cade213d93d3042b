"""Train the small VAE (stock AutoencoderKL, 8x down, 4 latent channels) on pictures of the small world.

    python -m tiny.train_vae            # see weights/README.md for the time it takes; resumes if interrupted

Writes tiny/weights/painter/vae. First single views, cropped because most of a view is white, then whole 2x2 grids: the
same content in smaller pieces is more gradient steps in the same time.

Left alone, so small a VAE lays all colours on one line of its latent space, and a painter trained there lets them run
into each other. Two remedies: the weights start as a path that carries colours through (`carry_colours`), and the first
three latent channels are asked to be the picture, 8x smaller (`THUMBNAIL`). And because a painter's latents are never
exact, the last fifth of the training disturbs them (`DISTURBANCE`).
"""

import argparse
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL

from mrc.sanity_rewards import tile_views
from tiny.objects import build, fixed_views, random_caption
from tiny.training import ROOT, WEIGHTS, fit, psnr

VAE_CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[16, 32, 64, 128],
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=128,
    mid_block_add_attention=False,
    force_upcast=False,
)


THUMBNAIL = 2.5  # of the first three latent channels, over the darkness (1 - RGB) of the 8x8 pixels under each cell
DISTURBANCE = 0.25  # largest standard deviation of the noise that the last fifth of the training adds to the latents
CROP = 48


def carry_colours(vae):
    """Add the identity to every convolution of the path around the residual branches, and halve what they start
    with."""
    names = ("conv_in", "conv_out", "quant_conv", "post_quant_conv", "conv_shortcut")
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d) and (name.split(".")[-1] in names or "samplers" in name):
                module.weight.mul_(0.5).add_(nn.init.dirac_(torch.empty_like(module.weight)))
    return vae


def crop(views, generator):
    """The middle of square pictures, a little off-centre: (N, 3, S, S) -> (N, 3, CROP, CROP)."""
    top, left = torch.randint(views.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
    return views[..., top : top + CROP, left : left + CROP]


def make_loss(steps, crops=24, grids=4):
    pool = {}

    def pictures(generator, count):
        """Fresh objects; each is shown four times (its views, shuffled into different batches) because drawing costs
        time."""
        if len(pool.get("views", ())) < count:
            captions = [random_caption(generator) for _ in range(64)]
            views = fixed_views(build(captions, generator)).flatten(0, 1)
            pool["views"] = views[torch.randperm(len(views), generator=generator)]
        taken, pool["views"] = pool["views"][:count], pool["views"][count:]
        return taken

    def loss_fn(model, step, generator):
        if step < 0.5 * steps:
            x = crop(pictures(generator, crops), generator)
        else:
            x = tile_views(fixed_views(build([random_caption(generator) for _ in range(grids)], generator)))
        x = 2 * x - 1
        posterior = model.encode(x.bfloat16()).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        variance = logvar.exp()
        if step >= 0.78 * steps:
            variance = variance + (DISTURBANCE * torch.rand(len(x), 1, 1, 1, generator=generator)).square()
        z = mean + variance.sqrt() * torch.randn(mean.shape, generator=generator)
        y = model.decode(z.bfloat16()).sample.float()
        mse, l1 = (y - x).square().mean(), (y - x).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        thumbnail = (mean[:, :3] - THUMBNAIL * (1 - F.avg_pool2d(x, 8)) / 2).square().mean()
        return 4 * mse + l1 + 5e-4 * kl + 0.3 * thumbnail, {
            "psnr": float(-10 * torch.log10(mse.detach() / 4)),
            "kl": float(kl.detach()),
            "thumbnail": float(thumbnail.detach()),
        }

    return loss_fn


def some_grids(seed, count=64):
    generator = torch.Generator().manual_seed(seed)
    return tile_views(fixed_views(build([random_caption(generator) for _ in range(count)], generator)))


@torch.no_grad()
def encode(vae, grids):
    return torch.cat([vae.encode(2 * part - 1).latent_dist.mode() for part in grids.split(8)])


@torch.no_grad()
def normalise(vae):
    """Make every latent channel zero-mean with unit variance, in the 1x1 convolutions between encoder and decoder: a
    painter's loss would neglect the smaller ones."""
    z = encode(vae, some_grids(20_000))
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[:, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.weight[:4] /= std[:, None, None, None]
    into.bias[4:] -= 2 * std.log()  # the other half are log-variances
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def evaluate(vae):
    """PSNR in dB of round trips of held-out grids (seed not used in training)."""
    x = some_grids(10_000)
    z = encode(vae, x)
    y = torch.cat([vae.decode(part).sample for part in z.split(8)]) / 2 + 0.5
    return {"psnr": psnr(y, x), "latent_std": z.std((0, 2, 3)).tolist(), "latent_mean": z.mean((0, 2, 3)).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=str(ROOT / "runs" / "vae"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vae = carry_colours(AutoencoderKL(**VAE_CONFIG))
    vae = fit(args.folder, vae, make_loss(args.steps), args.steps, lr=2e-3, ema_decay=0.995)
    normalise(vae)
    print(evaluate(vae), flush=True)
    copy.deepcopy(vae).half().save_pretrained(WEIGHTS / "painter" / "vae")


if __name__ == "__main__":
    main()
