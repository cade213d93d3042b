"""The stages of a run on the pretend GPU."""

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from recon import volume_rendering
from recon.volume_rendering import render_images
from tools.full_size.stages import Measurement, measure_reward, measure_run
from tools.pretend_gpu.gpu import PretendGPU, pretend_gpu


def measure(config: ConfigDict, num_processes: int = 1, reward_only: bool = False) -> Measurement:
    """`measure_run` of a validated `config`, or `measure_reward`. Raises ValueError as a run would."""
    with pretend_gpu() as gpu, _one_chunk_of_rays(gpu):
        return measure_reward(gpu, config) if reward_only else measure_run(gpu, config, num_processes)


@contextlib.contextmanager
def _one_chunk_of_rays(gpu: PretendGPU) -> Iterator[None]:
    """Inside, of the equal chunks of rays of an image one is rendered and the others are copies, at the same FLOPs."""

    def render_one_chunk(render, cameras, size, chunk_size):
        rendered = {}

        def render_once(origins, directions):
            if len(origins) not in rendered:
                before = gpu.flops.total
                rendered[len(origins)] = render(origins, directions), gpu.flops.total - before
                return rendered[len(origins)][0]
            parts, flops = rendered[len(origins)]
            gpu.flops.total += flops
            return tuple(part.clone() for part in parts)

        return render_images(render_once, cameras, size, chunk_size)

    volume_rendering.render_images = render_one_chunk
    yield
    volume_rendering.render_images = render_images
