"""Train the small VAE (stock AutoencoderKL, 8x down, 4 latent channels) on renders of the small world.

    python -m tiny.train_vae            # see weights/README.md for the time it takes; resumes if interrupted

Writes tiny/weights/painter/vae. The first half of training uses single views, cropped because most of a view is white,
the second half whole 2x2 grids: small crops allow more gradient steps in the same time.

Without further measures a VAE this small puts all colours on one line of its latent space, and a painter trained in
that space mixes them up. There are two measures against this: the initial weights pass colours through
(`pass_colours_through`), and a loss makes the first three latent channels a thumbnail of the image (`THUMBNAIL`).
Because a painter's latents are never exact, noise is added to the latents in the last 22 % of training (`NOISE`).
"""

import copy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL

from mrc.sanity_rewards import tile_views
from tiny.objects import fixed_views, random_objects
from tiny.training import WEIGHTS, LossFunction, fit, psnr, start_training, training_parser

VAE_FOLDER = WEIGHTS / "painter" / "vae"

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

THUMBNAIL = 2.5  # target of the first three latent channels, relative to 1 - RGB averaged over 8x8 pixels
NOISE = 0.25  # largest standard deviation of the noise that is added to the latents in the last 22 % of training
CROP = 48  # pixels


def load_vae(folder: str | Path = VAE_FOLDER) -> AutoencoderKL:
    """The trained VAE in float32. Raises FileNotFoundError if `folder` has no config.json."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json of a VAE; train it with `python -m tiny.train_vae`.")
    return AutoencoderKL.from_pretrained(folder)


def pass_colours_through(vae: AutoencoderKL) -> AutoencoderKL:
    """Halve the initial weights of every convolution outside the residual branches, then add the identity; in place."""
    names = ("conv_in", "conv_out", "quant_conv", "post_quant_conv", "conv_shortcut")
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d) and (name.split(".")[-1] in names or "samplers" in name):
                module.weight.mul_(0.5).add_(nn.init.dirac_(torch.empty_like(module.weight)))
    return vae


def crop(views: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same random crop of all views: (N, 3, S, S) -> (N, 3, CROP, CROP)."""
    top, left = torch.randint(views.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
    return views[..., top : top + CROP, left : left + CROP]


def make_loss(steps: int, crops: int = 24, grids: int = 4) -> LossFunction:
    """The loss for `fit`; crops, grids: batch sizes of the two halves of a training of `steps`."""
    pool = {}

    def fresh_views(generator, count):
        """Views of new objects. All four views of an object are used, in different batches, because rendering is
        slow."""
        if len(pool.get("views", ())) < count:
            views = fixed_views(random_objects(64, generator)).flatten(0, 1)
            pool["views"] = views[torch.randperm(len(views), generator=generator)]
        taken, pool["views"] = pool["views"][:count], pool["views"][count:]
        return taken

    def loss_fn(model, step, generator):
        if step < 0.5 * steps:
            x = crop(fresh_views(generator, crops), generator)
        else:
            x = random_grids(grids, generator)
        x = 2 * x - 1
        posterior = model.encode(x.bfloat16()).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        variance = logvar.exp()
        if step >= 0.78 * steps:
            variance = variance + (NOISE * torch.rand(len(x), 1, 1, 1, generator=generator)).square()
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


def random_grids(count: int, generator: torch.Generator) -> torch.Tensor:
    """2x2 grids of the views of random objects: (count, 3, 128, 128) in [0, 1]."""
    return tile_views(fixed_views(random_objects(count, generator)))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """The modes of the latents of images (N, 3, H, W) in [0, 1]: (N, 4, H / 8, W / 8), float32, not scaled.

    batch: number of images to encode at a time; the arithmetic is in the dtype of `vae`."""
    parts = (2 * images - 1).to(vae.dtype).split(batch)
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).float()


@torch.no_grad()
def normalise(vae: AutoencoderKL) -> None:
    """Give every latent channel zero mean and unit variance, in place.

    Otherwise a painter's loss would neglect the channels of low variance. Changes the 1x1 convolutions between encoder
    and decoder."""
    z = encode(vae, random_grids(64, torch.Generator().manual_seed(20_000)))
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[:, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.weight[:4] /= std[:, None, None, None]
    into.bias[4:] -= 2 * std.log()  # the other half are log-variances
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def evaluate(vae: AutoencoderKL) -> dict:
    """PSNR in dB of reconstructed held-out grids, and the mean and standard deviation of each latent channel."""
    x = random_grids(64, torch.Generator().manual_seed(10_000))  # not the seed of the training
    z = encode(vae, x)
    y = torch.cat([vae.decode(part).sample for part in z.split(8)]) / 2 + 0.5
    return {"psnr": psnr(y, x), "latent_std": z.std((0, 2, 3)).tolist(), "latent_mean": z.mean((0, 2, 3)).tolist()}


def main() -> None:
    args = start_training(training_parser(__doc__, steps=2800), "vae")
    vae = pass_colours_through(AutoencoderKL(**VAE_CONFIG))
    vae = fit(args.folder, vae, make_loss(args.steps), args.steps, lr=2e-3, ema_decay=0.995)
    normalise(vae)
    print(evaluate(vae), flush=True)
    copy.deepcopy(vae).half().save_pretrained(VAE_FOLDER)


if __name__ == "__main__":
    main()
