"""The training loop shared by the scripts that make the embedded weights: log, checkpoint, resume, EMA."""

import copy
import json
import math
import os
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"


def fit(
    folder, model, loss_fn, steps, lr, ema_decay=0.999, warmup=50, weight_decay=1e-4, save_seconds=60, log_every=25
):
    """Train `model` in place with AdamW and a cosine schedule; returns the EMA copy.

    loss_fn(model, step, generator) -> (scalar loss, {name: float}) sees a bfloat16 copy of the model (twice as fast as
    autocast on CPUs with bfloat16 units); gradients are applied to the float32 weights. `folder` receives log.jsonl and
    checkpoint.pt; if a checkpoint is there, training goes on from it exactly (the generator's state is part of it)."""
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


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all elements."""
    return float(-10 * torch.log10((a.float().clamp(0, 1) - b).square().mean()))
