"""Give the small painter a known multi-view defect: the base model that reinforcement learning starts from.

    python -m tiny.train_defect                             # see weights/README.md for the time it takes
    python -m tiny.train_defect --kind mvdream --rank 8     # the same for the small MVDream

Needs tiny/weights/painter (or mvdream). Finetunes its UNet with LoRA on samples two thirds of which have a defective
view 3 (tiny/defects.py) and writes tiny/weights/painter_defect (or mvdream_defect), a LoRA for the
`load_lora_weights` of stock pipelines. Resumes if interrupted. This stands for the imperfect supervised finetuning of
the paper's base model: about half of the painter's samples now contradict themselves, in a way that can be counted.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tiny import train_mvdream, train_painter
from tiny.captions import random_training_captions
from tiny.defects import DEFECTS, SHIPPED, add_defect
from tiny.objects import build, fixed_views
from tiny.train_painter import TrainedParts, make_loss
from tiny.training import WEIGHTS, fit, start_training, training_parser

PART = 100  # objects per file of the cached training set
KINDS = {  # pipeline, its trained parts, (vae, views) -> latents
    "painter": (StableDiffusionXLPipeline, train_painter.Painter, train_painter.encode),
    "mvdream": (StableDiffusionPipeline, train_mvdream.ViewPainter, train_mvdream.encode),
}


def training_set(
    folder: Path,
    vae: AutoencoderKL,
    defect: str,
    count: int,
    encode: Callable[[AutoencoderKL, torch.Tensor], torch.Tensor],
) -> tuple[list[str], torch.Tensor]:
    """3 `count` captions and latents: `count` good samples, then the same samples with the defect, twice; cached.

    Twice, because in a few hundred steps the painter learns the defect only for some of the samples that show it.
    Captions have two or three primitives, because those of reinforcement learning have two. Raises ValueError unless
    `count` is a positive multiple of PART."""
    if count < PART or count % PART:
        raise ValueError(f"--objects is {count}; give a positive multiple of {PART}.")
    folder.mkdir(parents=True, exist_ok=True)
    captions, good, bad = [], [], []
    for part in range(count // PART):
        generator = torch.Generator().manual_seed(2000 + part)
        file = folder / f"{defect}_{part:03d}.safetensors"
        some = random_training_captions(PART, generator, min_primitives=2)
        if not file.exists():
            objects = build(some, generator)
            views = fixed_views(objects)
            defective = add_defect(defect, objects, some, views, generator)
            save_file({"good": encode(vae, views).half(), "bad": encode(vae, defective).half()}, file)
            print(f"rendered and encoded {(part + 1) * PART} of {count} objects", flush=True)
        data = load_file(file)
        captions, good, bad = captions + some, [*good, data["good"]], [*bad, data["bad"]]
    return 3 * captions, torch.cat(good + 2 * bad)


def with_lora(painter: TrainedParts, pipeline: DiffusionPipeline, rank: int) -> TrainedParts:
    """`painter` with the frozen weights of `pipeline` and a trainable LoRA on its UNet.

    The LoRA is on all linear and convolution layers."""
    for name, _ in list(painter.named_children()):
        setattr(painter, name, getattr(pipeline, name))
    painter.requires_grad_(False)
    painter.use_plain_attention()
    layers = [n for n, m in painter.unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    painter.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))
    return painter


def save_lora(pipeline_class: type[DiffusionPipeline], unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the LoRA of `unet` to `folder` in half precision."""
    # peft's own names: diffusers' older ones exist for attention only, and a mixture of both loads incompletely
    weights = {k: v.half().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    pipeline_class.save_lora_weights(folder, unet_lora_layers=weights)


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = training_parser(__doc__, steps=370)
    default = "(default: %(default)s)"
    parser.add_argument("--kind", default="painter", choices=list(KINDS), help=f"which painter to finetune {default}")
    parser.add_argument("--defect", default=SHIPPED, choices=list(DEFECTS), help=f"which defect to add {default}")
    parser.add_argument("--objects", type=int, default=1000, help=f"size of the training set {default}")
    parser.add_argument("--rank", type=int, default=16, help=f"rank of the LoRA {default}")
    parser.add_argument("--lr", type=float, default=1e-3, help=f"peak learning rate {default}")
    parser.add_argument("--painter", type=Path, help="folder of the pipeline (default: tiny/weights/KIND)")
    parser.add_argument("--out", type=Path, help="folder for the LoRA (default: tiny/weights/KIND_defect)")
    return parser


def main() -> None:
    args = start_training(make_parser(), "{kind}_defect")
    out = args.out or WEIGHTS / f"{args.kind}_defect"
    pipeline_class, painter_class, encode = KINDS[args.kind]
    pipeline = pipeline_class.from_pretrained(args.painter or WEIGHTS / args.kind, dtype=torch.float32)
    vae = copy.deepcopy(pipeline.vae).bfloat16()
    captions, latents = training_set(args.folder, vae, args.defect, args.objects, encode)
    painter = with_lora(painter_class(pipeline.tokenizer), pipeline, args.rank)
    loss_fn = make_loss(captions, latents, pipeline.tokenizer)
    painter = fit(args.folder, painter, loss_fn, args.steps, lr=args.lr, ema_decay=0.98)
    save_lora(pipeline_class, painter.unet, out)
    (out / "defect.json").write_text(json.dumps({"defect": args.defect, "share": 2 / 3}) + "\n")


if __name__ == "__main__":
    main()
