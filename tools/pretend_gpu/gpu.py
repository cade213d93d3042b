"""The pretend GPU itself: a context in which everything happens on it."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tools.full_size import models
from tools.full_size.meters import Flops, Memory
from tools.pretend_gpu import patches
from tools.pretend_gpu.patches import GPU
from tools.pretend_gpu.watch import Watch

__all__ = ["GPU", "PretendGPU", "pretend_gpu"]


class NoData(FakeTensorMode):
    """FakeTensorMode that never touches the device, however available it claims to be."""

    avoid_device_init = True

    def __deepcopy__(self, memo):
        return self  # a copy of a tensor stays in the same mode


class PretendGPU(TorchDispatchMode):
    """Shows every operation to `watch`, `memory` and `flops`. To be entered inside `NoData`.

    One mode for all three, because every mode costs time with every operation."""

    device, timed_passes = GPU, 0  # its time means nothing

    def __init__(self):
        super().__init__()
        self.watch, self.memory, self.flops = Watch(), Memory(), Flops()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # half of all calls, so not worth the way through FakeTensorMode
            return args[0].fake_device
        kwargs = kwargs or {}
        operation = func.overloadpacket
        name = operation.__name__
        out = self.watch.answer(name, args)
        if out is NotImplemented:
            args = self.watch.check(name, args, kwargs)
            out = func(*args, **kwargs)
            self.watch.after(name, kwargs, out)
            self.flops.after(operation, args, kwargs, out)
        self.memory.after(out)
        return out

    def counting(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # it always does

    def clock(self) -> float:
        return 0.0


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """Inside, tensors hold no data, may be on `GPU`, and models are made at full size without weights.

    Once per process: what the trainer loads and parts of torch stay replaced (see `patches` and
    `tools.full_size.models`)."""
    gpu = PretendGPU()
    patches.apply(gpu.watch)
    models.install(GPU)
    with warnings.catch_warnings(), NoData(), gpu:
        warnings.simplefilter("ignore")  # torch's, of missing drivers
        yield gpu
