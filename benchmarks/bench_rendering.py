"""Rendering with empty space skipped against rendering every depth of every ray.

    python benchmarks/bench_rendering.py

Prints the ratio of the times, in one run on one machine, and how far the pictures are apart.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recon.cameras import rays
from recon.tiny_lrm import TinyLRM
from recon.volume_rendering import render_rays
from tiny.objects import build, fixed_views, random_caption
from tiny.training import WEIGHTS

DEPTHS = 96  # of the plain form: as fine as the skipping one is inside an object's box


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = TinyLRM.from_pretrained(WEIGHTS / "lrm")
    views = fixed_views(build([random_caption(generator) for _ in range(4)], generator))
    scene = model.reconstruct(views, model.cameras)
    origins, directions = (x.flatten(0, 1).expand(len(views), -1, 3) for x in rays(model.cameras, 64))

    def plain():
        parts = [
            render_rays(model.field(scene.planes), o, d, DEPTHS, 0)[0]
            for o, d in zip(origins.split(2048, 1), directions.split(2048, 1), strict=True)
        ]
        return torch.cat(parts, 1).reshape(len(views), 4, 64, 64, 3).permute(0, 1, 4, 2, 3).clamp(0, 1)

    skipping, images = timed(lambda: model.render(scene, model.cameras, 64)[0])
    everything, expected = timed(plain)
    print(
        f"skipping empty space / everything: {skipping / everything:.3f} of the time "
        f"({skipping / len(views):.3f} s and {everything / len(views):.3f} s per object of 4 views); "
        f"pictures differ by {(images - expected).abs().mean():.4f} on average"
    )


def timed(function):
    function()
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
