"""Train the small classifier of views on exact pictures of the small world.

    python -m tiny.train_classifier     # about 7 minutes on one CPU core; resumes if interrupted

Writes tiny/weights/classifier. Objects are drawn once and recoloured in every step; part of the pictures are blurred
or, if the VAE exists, shown after its round trip, because painted pictures are soft. It is a judge, not a painter: with
random colours it meets held-out captions too, but never the objects it is evaluated on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from recon.cameras import instant3d_cameras
from tiny.captions import held_out
from tiny.classifier import PAIRS, Classifier, caption_agreement, pair_labels
from tiny.objects import COLOURS, SHAPES, build, fixed_views, random_caption, render
from tiny.train_lrm import blurred, through_vae
from tiny.training import ROOT, WEIGHTS, fit

PALETTE = torch.tensor(list(COLOURS.values()))
VISIBLE = 12  # pixels; a part of which less is seen does not count as present


def shaded_parts(count, generator):
    """Pictures of random objects before they are coloured.

    A picture is linear in the colours of the parts: with colours (1, 0, 0), (0, 1, 0) and (0, 0, 1) the shading of each
    part is drawn into a channel of its own.
    Returns shading (count, 4, 3, S, S) and coverage (count, 4, 1, S, S), both in [0, 1], and
    shapes (count, 3), -1 where there is no part."""
    objects = build([random_caption(generator) for _ in range(count)], generator)
    objects = replace(objects, colour=torch.eye(3).expand(count, 3, 3))
    images, coverage = render(objects, instant3d_cameras())
    shapes = objects.shape.masked_fill(objects.size == 0, -1)
    return (images - (1 - coverage)).clamp(0, 1), coverage, shapes


def recolour(shading, coverage, shapes, generator):
    """Views in random palette colours (B, 3, S, S) and what they show (B, 32), from one view of `shaded_parts` each."""
    colours = torch.rand(len(shading), len(PALETTE), generator=generator).argsort(1)[:, :3]
    views = torch.einsum("bphw,bpc->bchw", shading, PALETTE[colours]) + 1 - coverage
    seen = (shading > 0.25).sum((-2, -1)) > VISIBLE
    labels = torch.zeros(len(shading), len(PAIRS))
    pair = colours * len(SHAPES) + shapes.clamp(min=0)
    labels.scatter_add_(1, pair, (seen & (shapes >= 0)).float())
    return views.clamp(0, 1), labels


def prepare(folder, count):
    """Cached `shaded_parts`, view by view."""
    file = folder / "parts.safetensors"
    if not file.exists():
        generator = torch.Generator().manual_seed(1)
        parts = [shaded_parts(100, generator) for _ in range(-(-count // 100))]
        shading, coverage, shapes = (torch.cat(column) for column in zip(*parts, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"shading": (255 * shading).byte(), "coverage": (255 * coverage).byte(), "shapes": shapes}, file)
    data = load_file(file)
    return data["shading"].flatten(0, 1), data["coverage"].flatten(0, 1), data["shapes"].repeat_interleave(4, 0)


def make_loss(data, vae, batch=64):
    def loss_fn(model, step, generator):
        pick = torch.randint(len(data[0]), (batch,), generator=generator)
        shading, coverage, shapes = (x[pick] for x in data)
        views, labels = recolour(shading.float() / 255, coverage.float() / 255, shapes, generator)
        third = batch // 3
        views[:third] = blurred(views[None, :third], generator)[0]
        if vae is not None:
            soft = slice(third, third + 4 * (third // 4))
            views[soft] = through_vae(vae, views[soft].unflatten(0, (-1, 4))).flatten(0, 1)
        x = views + 0.02 * torch.randn(views.shape, generator=generator)
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        x = torch.roll(x, shift, (2, 3))
        loss = F.binary_cross_entropy_with_logits(model(x.bfloat16()).float(), labels)
        return 10 * loss, {}

    return loss_fn


@torch.no_grad()
def evaluate(classifier, vae):
    """Accuracy on held-out captions and fresh objects, in %, of pictures as drawn and after the VAE."""
    generator = torch.Generator().manual_seed(10_000)
    captions = sorted(held_out())
    views = fixed_views(build(captions, generator))
    pictures = {"drawn": views}
    if vae is not None:
        pictures["after_vae"] = torch.cat([through_vae(vae, part) for part in views.split(8)])
    result = {}
    for name, x in pictures.items():
        every = torch.ones(len(x), 4, dtype=torch.bool)
        result[f"pairs_{name}"] = 100 * float(caption_agreement(classifier, x, captions, every).mean())
        wrong = (classifier(x.flatten(0, 1)) > 0) != pair_labels(captions).repeat_interleave(4, 0).bool()
        result[f"single_views_{name}"] = 100 * float((~wrong.any(1)).float().mean())
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=str(ROOT / "runs" / "classifier"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    folder = WEIGHTS / "painter" / "vae"
    vae = AutoencoderKL.from_pretrained(folder).bfloat16().eval() if folder.exists() else None
    loss_fn = make_loss(prepare(Path(args.folder), args.objects), vae)
    classifier = fit(args.folder, Classifier(), loss_fn, args.steps, lr=3e-3, ema_decay=0.995)
    print(evaluate(classifier, vae))
    classifier.save_pretrained(WEIGHTS / "classifier")


if __name__ == "__main__":
    main()
