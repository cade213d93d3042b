"""What the training scripts of the embedded weights share: the command line and a loop that logs, checkpoints, resumes
and averages the weights."""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"
RUNS = ROOT / "runs"
LossFunction = Callable[[nn.Module, int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]  # see `fit`


def training_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """A parser with the options of every training script; steps: the default of --steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for log and checkpoint (default: below tiny/runs)")
    return parser


def start_training(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the command line, set the number of threads and seed torch.

    name: the run's folder below tiny/runs unless --folder is given; "{kind}" and the like stand for other options. A
    folder with a training of other options is refused: it would be resumed as if it were this one."""
    args = parser.parse_args()
    args.folder = args.folder or RUNS / name.format(**vars(args))
    options = {key: str(value) for key, value in vars(args).items() if key not in ("folder", "threads", "out")}
    file = args.folder / "options.json"
    found = json.loads(file.read_text()) if file.exists() else options
    differing = [f"--{key}" for key in options if found.get(key) != options[key]]
    if differing:
        others = " and ".join(differing)
        parser.error(f"{args.folder} holds a training with another {others}: remove it, or give another --folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options, indent=1))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def fit(
    folder: str | Path,
    model: nn.Module,
    loss_fn: LossFunction,
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
    warmup: int = 50,
    weight_decay: float = 1e-4,
    save_seconds: float = 60,
    log_every: int = 25,
) -> nn.Module:
    """Train `model` in place with AdamW and a cosine schedule; returns the moving average of its weights.

    loss_fn(model, step, generator) -> (scalar loss, metrics) gets a bfloat16 copy of the model, which is twice as fast
    as autocast on CPUs with bfloat16 units; gradients are applied to the float32 weights. `folder` receives log.jsonl
    and checkpoint.pt. If there is a checkpoint, training resumes from it exactly, because it contains the state of the
    random generator."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ema = copy.deepcopy(model).requires_grad_(False)
    half = copy.deepcopy(model).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(0)
    start, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start, seconds = state["step"], state["seconds"]
        print(f"{folder.name}: resumed at step {start} of {steps}", flush=True)

    def save(step):
        state = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "seconds": seconds + time.time() - began,
        }
        torch.save(state, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", checkpoint)

    began = saved = time.time()
    sums, count = {}, 0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        half.load_state_dict(model.state_dict())
        half.zero_grad(set_to_none=True)
        loss, metrics = loss_fn(half, step, generator)
        loss.backward()
        for parameter, low in zip(model.parameters(), half.parameters(), strict=True):
            parameter.grad = None if low.grad is None else low.grad.float()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # not diffusers' EMAModel: its decay is 0 in the first step, where ours is 1/10, and weights would change
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
            for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
                average.copy_(buffer)
        for name, value in {"loss": float(loss.detach()), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value
        count += 1
        if (step + 1) % log_every == 0 or step + 1 == steps:
            line = {
                "step": step + 1,
                "seconds": round(seconds + time.time() - began, 1),
                **{k: v / count for k, v in sums.items()},
            }
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            print(folder.name, " ".join(f"{k} {v:.5g}" for k, v in line.items()), flush=True)
            sums, count = {}, 0
        if time.time() - saved > save_seconds or step + 1 == steps:
            save(step + 1)
            saved = time.time()
    return ema.eval()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all elements of two batches of images in [0, 1]; `a` is clamped to that."""
    return float(-10 * torch.log10((a.float().clamp(0, 1) - b).square().mean()))
