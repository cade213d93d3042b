"""What a GPU would be asked for: bytes of memory that are alive, and FLOPs."""

import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GRAIN = 512  # bytes: CUDA's allocator rounds every request up to a multiple


class Memory:
    """Bytes of the storages on the GPU: `now`, and the most at once since `reset`, `peak`."""

    def __init__(self):
        self.now = self.peak = 0
        self._sizes = {}

    def reset(self) -> None:
        self.peak = self.now

    def after(self, out: Any) -> None:
        """Count the storages of an operation's result that are new."""
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor.untyped_storage())

    def _add(self, storage):
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = -(-storage.nbytes() // GRAIN) * GRAIN
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.now -= self._sizes.pop(key)


class Flops:
    """FLOPs of matrix products, convolutions and attention, `total`; a multiplication and an addition are two.

    In place of torch's FlopCounterMode, whose hooks keep alive what gradient checkpointing recomputes, so that memory
    could not be measured at the same time."""

    def __init__(self):
        self.total = 0

    def after(self, operation: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count an operation (an overload packet of torch.ops) that gave `out`."""
        count = flop_registry.get(operation)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out)
