"""Rendering 3D Gaussians tile by tile against every Gaussian at every pixel.

    python benchmarks/bench_splatting.py

Prints the ratios of CPU time and of peak memory, in one run on one machine, and how far the pictures are apart.
"""

import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recon import gaussian_splatting
from recon.cameras import mvdream_cameras
from recon.gaussian_splatting import ALPHA_MIN, INRIA, Gaussians, render_gaussians


def shell(count):
    """One scene: Gaussians of about 0.01 around, on a sphere of radius 0.5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, count, 14, generator=generator)
    means = 0.5 * torch.nn.functional.normalize(x[..., :3], dim=-1)
    return Gaussians(
        means,
        (2 * x[..., 3]).sigmoid(),
        0.01 * (0.5 * x[..., 4:7]).exp(),
        torch.nn.functional.normalize(x[..., 7:11], dim=-1),
        x[..., 11:].sigmoid(),
    )


def blend_everything(splats, shades, first, last, height, width, constants):
    """In place of `_blend_image`: every Gaussian at every pixel."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    middle_x, middle_y, slope, narrow, tall, log_opacity = splats[..., None].unbind(1)
    dx, dy = x.flatten() - middle_x, y.flatten() - middle_y
    alpha = (log_opacity - (tall * dy).square() - (narrow * (dx - slope * dy)).square()).exp()
    alpha = alpha.clamp(max=constants.alpha_max) * (alpha >= ALPHA_MIN)
    light = (1 - alpha).cumprod(0)
    weights = alpha * light / (1 - alpha) * (light >= constants.stop)
    return (shades.T @ weights).unflatten(1, (height, width))


def run(count, size, gradients):
    gaussians = Gaussians(*(value.requires_grad_(gradients) for value in shell(count).tensors()))
    image = render_gaussians(gaussians, mvdream_cameras(), size, constants=INRIA)[0]
    if gradients:
        image.square().mean().backward()
    return image.detach()


def measure(everything, count, size, gradients, result):
    """Seconds of CPU and MB beyond those before, of four views of one scene, and the picture."""
    torch.set_num_threads(1)
    if everything:
        gaussian_splatting._blend_image = blend_everything
    run(8, size, gradients)  # what happens once in a process is not counted
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    image = run(count, size, gradients)
    seconds = time.process_time() - start
    result.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, image.numpy()))


def in_a_process(*arguments):
    """Of its own, because a process remembers its peak memory."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=measure, args=(*arguments, result))
    process.start()
    values = result.get()
    process.join()
    return values


def main():
    for count, size, gradients in ((16384, 64, False), (2048, 64, True)):
        seconds, megabytes, image = in_a_process(False, count, size, gradients)
        seconds_all, megabytes_all, expected = in_a_process(True, count, size, gradients)
        print(
            f"{count} Gaussians, 4 views of {size}x{size} pixels{', with gradients' if gradients else ''}: "
            f"{seconds / seconds_all:.3f} of the time ({seconds:.2f} s and {seconds_all:.2f} s), "
            f"{megabytes / megabytes_all:.3f} of the memory ({megabytes:.0f} MB and {megabytes_all:.0f} MB); "
            f"pictures differ by at most {abs(image - expected).max():.1e}",
            flush=True,
        )
    # here the other form would need many gigabytes
    for count, size, gradients in ((16384, 64, True), (65536, 64, False), (65536, 256, False), (65536, 512, False)):
        seconds, megabytes, _ = in_a_process(False, count, size, gradients)
        print(
            f"{count} Gaussians, 4 views of {size}x{size} pixels{', with gradients' if gradients else ''}: "
            f"{seconds:.2f} s, {megabytes:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
