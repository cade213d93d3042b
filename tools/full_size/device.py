"""The device of this machine, measured."""

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.full_size.meters import Flops


class Allocator:
    """Bytes of live tensors as torch's CUDA allocator counts them; 0 on a CPU."""

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


class RealGPU(TorchDispatchMode):
    """A device that computes. As a mode it counts FLOPs, which costs the host time with every operation."""

    timed_passes = 2

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.memory, self.flops = device, Allocator(), Flops()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops.after(func.overloadpacket, args, kwargs, out)
        return out

    def counting(self) -> "RealGPU":
        return self

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
