"""Give the small painter a known multi-view defect: the base that reinforcement learning starts from.

    python -m tiny.train_defect                     # some minutes on one CPU core; resumes if interrupted
    python -m tiny.train_defect --kind mvdream --rank 8     # the same for the small MVDream

Needs tiny/weights/painter (or mvdream). Finetunes its UNet (LoRA) on pictures of which half have view 3 spoilt
(tiny/defects.py) and writes tiny/weights/painter_defect (or mvdream_defect), which the `load_lora_weights` of stock
pipelines reads. This stands for the imperfect supervised finetuning that the paper's base model went through: the
painter now contradicts itself in about half of its grids, in a way that can be counted.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tiny import train_mvdream, train_painter
from tiny.captions import held_out
from tiny.defects import DEFECTS, SHIPPED, spoil
from tiny.objects import build, fixed_views, parse_caption, random_caption
from tiny.train_painter import make_loss
from tiny.training import ROOT, WEIGHTS, fit

PART = 100
KINDS = {  # pipeline, its trained parts, views -> latents
    "painter": (StableDiffusionXLPipeline, train_painter.Painter, train_painter.encode),
    "mvdream": (StableDiffusionPipeline, train_mvdream.ViewPainter, train_mvdream.encode),
}


def allowed_captions(count, generator):
    """Random captions of two or three primitives, like those of reinforcement learning, none of them held out."""
    captions, banned = [], held_out()
    while len(captions) < count:
        caption = random_caption(generator)
        if caption not in banned and len(parse_caption(caption)[0]) > 1:
            captions.append(caption)
    return captions


def training_set(folder, vae, defect, count, encode):
    """Captions (3 count) and latents (3 count, ...): `count` good samples, then the same ones spoilt, twice, because
    some hundred steps teach the defect only to a part of what they show; cached."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, good, bad = [], [], []
    for part in range(-(-count // PART)):
        generator = torch.Generator().manual_seed(2000 + part)
        file, some = folder / f"{defect}_{part:03d}.safetensors", allowed_captions(PART, generator)
        if not file.exists():
            objects = build(some, generator)
            views = fixed_views(objects)
            spoilt = spoil(defect, objects, some, views, generator)
            save_file({"good": encode(vae, views).half(), "bad": encode(vae, spoilt).half()}, file)
            print(f"prepared {(part + 1) * PART} of {count} pictures", flush=True)
        data = load_file(file)
        captions, good, bad = captions + some, [*good, data["good"]], [*bad, data["bad"]]
    return 3 * captions, torch.cat(good + 2 * bad)


def with_lora(painter, pipeline, rank):
    """`painter` with the weights of `pipeline`, frozen but for new LoRA weights on all linear and convolution layers of
    the UNet."""
    for name, _ in list(painter.named_children()):
        setattr(painter, name, getattr(pipeline, name))
    painter.requires_grad_(False)
    painter.use_plain_attention()
    layers = [n for n, m in painter.unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    painter.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))
    return painter


def save_lora(pipeline_class, unet, folder):
    # peft's own names: diffusers' older ones exist for attention only, and a mixture of both loads incompletely
    weights = {k: v.half().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    pipeline_class.save_lora_weights(folder, unet_lora_layers=weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defect", default=SHIPPED, choices=list(DEFECTS))
    parser.add_argument("--steps", type=int, default=370)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kind", default="painter", choices=list(KINDS))
    parser.add_argument("--painter", default="", help="folder of the pipeline; '' = tiny/weights/KIND")
    parser.add_argument("--out", default="", help="folder for the LoRA; '' = tiny/weights/KIND_defect")
    parser.add_argument("--folder", default="", help="folder for logs and checkpoints; '' = tiny/runs/KIND_defect")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    name = f"{args.kind}_defect"
    folder, out = Path(args.folder or ROOT / "runs" / name), Path(args.out or WEIGHTS / name)
    pipeline_class, painter_class, encode = KINDS[args.kind]
    pipeline = pipeline_class.from_pretrained(args.painter or WEIGHTS / args.kind, torch_dtype=torch.float32)
    vae = copy.deepcopy(pipeline.vae).bfloat16()
    captions, latents = training_set(folder, vae, args.defect, args.pictures, encode)
    painter = with_lora(painter_class(pipeline.tokenizer), pipeline, args.rank)
    loss_fn = make_loss(captions, latents, pipeline.tokenizer)
    painter = fit(folder, painter, loss_fn, args.steps, lr=args.lr, ema_decay=0.98)
    save_lora(pipeline_class, painter.unet, out)
    (out / "defect.json").write_text(json.dumps({"defect": args.defect, "share": 2 / 3}) + "\n")


if __name__ == "__main__":
    main()
