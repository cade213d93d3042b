"""Train the small classifier of views on exact renders of the small world.

    python -m tiny.train_classifier     # about 7 minutes on one CPU core; resumes if interrupted

Writes tiny/weights/classifier. Objects are rendered once and recoloured in every step. Some views are blurred or, if
the VAE exists, encoded and decoded by it, because painted views are blurry too. Random colours also produce held-out
captions; this is harmless, because the classifier evaluates painters and does not paint, and it is evaluated here on
new objects.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from recon.cameras import instant3d_cameras
from tiny.captions import held_out
from tiny.classifier import PAIRS, Classifier, caption_agreement, pair_labels
from tiny.objects import PALETTE, SHAPES, build, fixed_views, random_objects, render
from tiny.train_lrm import blurred, through_vae
from tiny.train_vae import VAE_FOLDER, load_vae
from tiny.training import WEIGHTS, LossFunction, fit, start_training, training_parser

VISIBLE = 12  # pixels; a primitive counts as visible if it covers more


def shaded_parts(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shading of every primitive of random objects, for `recolour`.

    A render is linear in the primitives' colours. With the colours (1, 0, 0), (0, 1, 0) and (0, 0, 1), every primitive
    is rendered into a channel of its own. Returns shading (count, 4, 3, S, S) and coverage (count, 4, 1, S, S), both in
    [0, 1], and shapes (count, 3), indices into SHAPES or -1 for an unused slot."""
    objects = random_objects(count, generator)
    objects = replace(objects, colour=torch.eye(3).expand(count, 3, 3))
    images, coverage = render(objects, instant3d_cameras())
    shapes = objects.shape.masked_fill(objects.size == 0, -1)
    return (images - (1 - coverage)).clamp(0, 1), coverage, shapes


def recolour(
    shading: torch.Tensor, coverage: torch.Tensor, shapes: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views in random colours (B, 3, S, S) in [0, 1], and labels (B, 32) of 0 and 1 for what they show.

    shading: (B, 3, S, S), coverage: (B, 1, S, S) and shapes: (B, 3), each for one view of `shaded_parts`."""
    colours = torch.rand(len(shading), len(PALETTE), generator=generator).argsort(1)[:, :3]
    views = torch.einsum("bphw,bpc->bchw", shading, PALETTE[colours]) + 1 - coverage
    seen = (shading > 0.25).sum((-2, -1)) > VISIBLE
    labels = torch.zeros(len(shading), len(PAIRS))
    pair = colours * len(SHAPES) + shapes.clamp(min=0)
    labels.scatter_add_(1, pair, (seen & (shapes >= 0)).float())
    return views.clamp(0, 1), labels


def prepare(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`shaded_parts` of `count` objects, cached in `folder`.

    Returns shading (4 count, 3, S, S) and coverage (4 count, 1, S, S) in uint8, and shapes (4 count, 3)."""
    file = folder / "parts.safetensors"
    if not file.exists():
        generator = torch.Generator().manual_seed(1)
        parts = [shaded_parts(100, generator) for _ in range(-(-count // 100))]
        shading, coverage, shapes = (torch.cat(column) for column in zip(*parts, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"shading": (255 * shading).byte(), "coverage": (255 * coverage).byte(), "shapes": shapes}, file)
    data = load_file(file)
    return data["shading"].flatten(0, 1), data["coverage"].flatten(0, 1), data["shapes"].repeat_interleave(4, 0)


def make_loss(
    data: tuple[torch.Tensor, torch.Tensor, torch.Tensor], vae: AutoencoderKL | None, batch: int = 64
) -> LossFunction:
    """The loss for `fit`; data: from `prepare`; vae: None trains without its reconstructions; batch: views per step."""

    def loss_fn(model, _step, generator):
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
def evaluate(classifier: Classifier, vae: AutoencoderKL | None) -> dict[str, float]:
    """Accuracy in % on new objects of the held-out captions, as rendered and after the VAE.

    pairs_*: coloured shapes of the captions found in all four views; single_views_*: views with no wrong label."""
    generator = torch.Generator().manual_seed(10_000)
    captions = sorted(held_out())
    views = fixed_views(build(captions, generator))
    inputs = {"rendered": views}
    if vae is not None:
        inputs["after_vae"] = torch.cat([through_vae(vae, part) for part in views.split(8)])
    result = {}
    for name, x in inputs.items():
        every = torch.ones(len(x), 4, dtype=torch.bool)
        result[f"pairs_{name}"] = 100 * float(caption_agreement(classifier, x, captions, every).mean())
        wrong = (classifier(x.flatten(0, 1)) > 0) != pair_labels(captions).repeat_interleave(4, 0).bool()
        result[f"single_views_{name}"] = 100 * float((~wrong.any(1)).float().mean())
    return result


def main() -> None:
    parser = training_parser(__doc__, steps=1150)  # the shipped weights: step 1146 of 1400, see weights/README.md
    parser.add_argument("--objects", type=int, default=2000, help="number of objects (default: %(default)s)")
    args = start_training(parser, "classifier")
    vae = load_vae().bfloat16().eval() if VAE_FOLDER.exists() else None
    loss_fn = make_loss(prepare(args.folder, args.objects), vae)
    classifier = fit(args.folder, Classifier(), loss_fn, args.steps, lr=3e-3, ema_decay=0.995)
    print(evaluate(classifier, vae))
    classifier.save_pretrained(WEIGHTS / "classifier")


if __name__ == "__main__":
    main()
