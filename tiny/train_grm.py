"""Train the small second judge, a GRM, on the small world.

    python -m tiny.train_grm            # see weights/README.md for the time it takes; resumes if interrupted

Needs the VAE. Writes tiny/weights/grm. No run learns from this model: it judges what was learned from the small LRM,
with which it shares the objects but neither architecture nor seed (tools.evaluate --judge grm).
"""

import torch
from diffusers import AutoencoderKL

from mrc.lpips import LPIPS
from recon.cameras import Cameras, instant3d_cameras
from recon.gaussian_splatting import Gaussians, render_gaussians
from recon.grm import GRM
from tiny.train_lrm import LPIPS_WEIGHT, coverage, evaluate, frozen_vae, random_scenes, reconstructor_parser
from tiny.training import WEIGHTS, LossFunction, fit, psnr, start_training

NETWORK = dict(in_channels=3, input_res=64, patch_size=4, layers=4, width=128)
RENDER = dict(scaling_activation_type="softplus", scale_multi_act=0.02)
SEED = 1  # not the LRM's
VIEWS = 2  # of the eight of each object, that a step compares


def make_loss(vae: AutoencoderKL | None, batch: int = 4) -> LossFunction:
    """The loss for `fit`; vae: None trains without its reconstructions; batch: objects per step."""
    fixed, lpips = instant3d_cameras(), LPIPS()

    def loss_fn(model, _step, generator):
        images, cameras, views = random_scenes(batch, vae, generator)
        seen = torch.stack([torch.randperm(images.shape[1], generator=generator)[:VIEWS] for _ in range(batch)])
        one = torch.arange(batch)[:, None]
        images, cameras = images[one, seen], Cameras(cameras.c2w[one, seen], cameras.fxfycxcy[one, seen])
        scene = Gaussians.from_packed(model.gaussians(views, fixed))
        rendered, alpha, _ = render_gaussians(scene, cameras, images.shape[-1])
        foreground = coverage(images)[:, :, None]
        mse = (rendered - images).square().mean()
        mask = (alpha - foreground).square().mean()  # tells a white surface from empty space
        distance = lpips(rendered.flatten(0, 1).clamp(0, 1), images.flatten(0, 1)).mean()
        metrics = {"psnr": psnr(rendered.detach(), images), "lpips": float(distance.detach())}
        return mse + 0.1 * mask + LPIPS_WEIGHT * distance, metrics

    return loss_fn


def main() -> None:
    args = start_training(reconstructor_parser(__doc__, steps=900), "grm")
    torch.manual_seed(SEED)
    vae = frozen_vae(args.vae)
    model = GRM(render=RENDER, **NETWORK)
    model = fit(args.folder, model, make_loss(vae), args.steps, lr=1e-3, ema_decay=0.995)
    print(evaluate(model))
    model.half().save_pretrained(WEIGHTS / "grm")


if __name__ == "__main__":
    main()
