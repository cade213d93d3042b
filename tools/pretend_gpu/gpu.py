"""The pretend GPU itself: a context in which everything happens on it."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensorMode

from tools.pretend_gpu import models, patches
from tools.pretend_gpu.meters import Flops, Memory
from tools.pretend_gpu.patches import GPU
from tools.pretend_gpu.watch import Watch

__all__ = ["GPU", "PretendGPU", "pretend_gpu"]


class NoData(FakeTensorMode):
    """FakeTensorMode that never touches the device, however available it claims to be."""

    avoid_device_init = True


@dataclass(frozen=True)
class PretendGPU:
    """What the pretend GPU has seen; see `tools.pretend_gpu.meters` and `tools.pretend_gpu.watch`."""

    watch: Watch
    memory: Memory
    flops: Flops


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """Inside, tensors hold no data, may be on `GPU`, and models are made at full size without weights.

    Once per process: what the trainer loads and parts of torch stay replaced (see `patches` and `models`)."""
    gpu = PretendGPU(Watch(), Memory(), Flops())
    patches.apply(gpu.watch)
    models.install()
    with warnings.catch_warnings(), NoData(), gpu.memory, gpu.flops, gpu.watch:
        warnings.simplefilter("ignore")  # torch's, of missing drivers
        yield gpu
