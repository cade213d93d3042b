"""Train the small VAE (stock AutoencoderKL, 8x down, 4 latent channels) on pictures of the small world.

    python -m tiny.train_vae            # about 35 minutes on one CPU core; resumes if interrupted

Writes tiny/weights/painter/vae. Four fifths of the training see single views, the last fifth whole 2x2 grids: the same
pixels in smaller pieces are more gradient steps in the same time.
"""

import argparse
import copy

import torch
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


def make_loss(steps, batch=16):
    pool = {}

    def pictures(generator, count):
        """Fresh objects; each is shown four times (its views, shuffled into different batches) because drawing costs time."""
        if len(pool.get("views", ())) < count:
            captions = [random_caption(generator) for _ in range(64)]
            views = fixed_views(build(captions, generator)).flatten(0, 1)
            pool["views"] = views[torch.randperm(len(views), generator=generator)]
        taken, pool["views"] = pool["views"][:count], pool["views"][count:]
        return taken

    def loss_fn(model, step, generator):
        if step < 0.8 * steps:
            x = pictures(generator, batch)
        else:
            x = tile_views(fixed_views(build([random_caption(generator) for _ in range(batch // 4)], generator)))
        x = 2 * x - 1
        posterior = model.encode(x.bfloat16()).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        y = model.decode(z.bfloat16()).sample.float()
        mse, l1 = (y - x).square().mean(), (y - x).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return 4 * mse + l1 + 1e-4 * kl, {"psnr": float(-10 * torch.log10(mse.detach() / 4)), "kl": float(kl.detach())}

    return loss_fn


@torch.no_grad()
def evaluate(vae, count=64):
    """PSNR in dB of round trips of held-out grids (seed not used in training)."""
    generator = torch.Generator().manual_seed(10_000)
    captions = [random_caption(generator) for _ in range(count)]
    x = tile_views(fixed_views(build(captions, generator)))
    z = torch.cat([vae.encode(2 * part - 1).latent_dist.mode() for part in x.split(8)])
    y = torch.cat([vae.decode(part).sample for part in z.split(8)]) / 2 + 0.5
    return {"psnr": psnr(y, x), "latent_std": float(z.std()), "latent_mean": z.mean((0, 2, 3)).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the whole VAE")
    parser.add_argument("--decoder_steps", type=int, default=1500, help="further steps of the decoder alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=str(ROOT / "runs" / "vae"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vae = fit(args.folder, AutoencoderKL(**VAE_CONFIG), make_loss(args.steps), args.steps, lr=1.5e-3, ema_decay=0.995)
    save(vae)
    # the latent space is settled now, a painter can start on it; the decoder alone goes on to sharper pictures
    vae.train().decoder.requires_grad_(True)
    vae = fit(
        args.folder + "_decoder", vae, make_loss(args.decoder_steps), args.decoder_steps, lr=1.5e-3, ema_decay=0.995
    )
    save(vae)


def save(vae):
    quality = evaluate(vae)
    vae.register_to_config(scaling_factor=1 / quality["latent_std"])
    print(quality, flush=True)
    copy.deepcopy(vae).half().save_pretrained(WEIGHTS / "painter" / "vae")


if __name__ == "__main__":
    main()
