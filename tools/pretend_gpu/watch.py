"""Notes what would go wrong or wait on a real GPU: mixed types, wrong devices, scalar reads, copies, boolean masks."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
HARNESS = str(Path(__file__).parent)

# kernels that take no operands of different types
ONE_DTYPE = {
    "addmm",
    "baddbmm",
    "bmm",
    "convolution",
    "grid_sampler_2d",
    "mm",
    "native_group_norm",
    "native_layer_norm",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# truth values that are False in a run that goes well: is any of it broken, is the count of what is broken above 0
USUALLY_FALSE = {"any", "gt"}

# kinds of `Wait`
SCALAR = "a scalar is read"
NONZERO = "nonzero"
MASK = "a boolean mask"
UPLOAD = "a copy to the GPU"
DOWNLOAD = "a copy to the host"
UNWAITED = "a copy from or to pinned memory, not waited for"


@dataclass(frozen=True)
class Wait:
    """Something for which the host waits for the GPU, or the GPU for the host (but for `UNWAITED`).

    kind: one of the above; place: "file:line" of the repository, and of the library below it if there is one."""

    kind: str
    place: str


def place() -> str:
    """The innermost line of the repository on the stack as "file:line", and the library's line that it called."""
    frame, library = sys._getframe(1), ""
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and "/site-packages/" not in file and not file.startswith(HARNESS):
            own = f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
            return f"{own} ({library})" if library else own
        if not library and "/site-packages/" in file and "/site-packages/torch/" not in file:
            library = f"{file.split('/site-packages/')[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "nowhere"


class Watch:
    """Looks at every operation before it runs, and answers what only data could.

    waits: list of `Wait`, in order. problems: {"what at place": count}, what CUDA would refuse and FakeTensorMode, or
    autocast on a CPU build, lets pass."""

    def __init__(self):
        self.waits, self.problems = [], Counter()

    def note(self, kind: str) -> None:
        self.waits.append(Wait(kind, place()))

    def answer(self, name: str, args: tuple) -> Any:
        """The result of the operation `name` if it depends on data, else NotImplemented."""
        if name == "_local_scalar_dense":
            return self._scalar(args[0])
        if name == "equal":
            self._note_on_gpu(SCALAR, args[0])
            return True
        if name == "nonzero":
            self._note_on_gpu(NONZERO, args[0])
            return _all_indices(args[0])
        return NotImplemented

    def check(self, name: str, args: tuple, kwargs: dict) -> tuple:
        """The arguments of the operation `name`, without what depends on data."""
        if name in ONE_DTYPE:
            self._check_dtypes(name, tree_leaves((args, kwargs)))
        elif name in INDEXING:
            return args[0], self._indices(args[0], args[1]), *args[2:]
        elif name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        return args

    def after(self, name: str, kwargs: dict, out: Any) -> None:
        """Remember of a result what a later operation must know."""
        if name in USUALLY_FALSE and isinstance(out, torch.Tensor):
            out.usually_false = True
        if kwargs.get("pin_memory"):
            out.untyped_storage().pinned = True

    def _note_on_gpu(self, kind, tensor):
        if tensor.device.type == "cuda":
            self.note(kind)

    def _check_dtypes(self, name, operands):
        dtypes = {str(x.dtype) for x in operands if isinstance(x, torch.Tensor) and x.is_floating_point()}
        if len(dtypes) > 1:
            self.problems[f"{name} of {' and '.join(sorted(dtypes))} at {place()}"] += 1

    def _scalar(self, tensor):
        """What a run that goes well would read: 1, and for truth values what says that nothing is broken."""
        if tensor.device.type == "cuda":
            self.note(SCALAR)
            if _called_from("grad_scaler.py"):
                return 0.0  # no gradient overflowed
        if tensor.dtype == torch.bool:
            return not hasattr(tensor, "usually_false")
        return 1.0 if tensor.is_floating_point() else 1

    def _indices(self, indexed, indices):
        """The indices with boolean masks replaced by the indices of all elements."""
        replaced = []
        for index in indices:
            if index is None:
                replaced.append(index)
                continue
            if indexed.device.type == "cuda" and index.device.type == "cpu":
                self.note(UPLOAD)
            if indexed.device.type == "cpu" and index.device.type == "cuda":
                raise RuntimeError(f"indices should be on the CPU as the indexed tensor is, at {place()}")
            if index.dtype in (torch.bool, torch.uint8):
                self._note_on_gpu(MASK, index)
                replaced += _all_indices(index).unbind(1)
            else:
                replaced.append(index)
        return replaced

    def _copy(self, name, args, kwargs):
        """Only pinned memory can be copied while the host goes on, and only if it is asked to."""
        if name == "copy_":
            target, source = args[:2]
            device, pinned = target.device, target.is_pinned() or source.is_pinned()
            asked = kwargs.get("non_blocking") or args[2:] == (True,)
        else:
            source, asked = args[0], kwargs.get("non_blocking")
            device, pinned = torch.device(kwargs.get("device") or source.device), source.is_pinned()
        if device.type == source.device.type:
            return
        if asked and pinned:
            self.note(UNWAITED)
        else:
            self.note(UPLOAD if device.type == "cuda" else DOWNLOAD)


def _all_indices(mask):
    """What `nonzero` gives if every element is: an upper bound of the work, where only data could tell."""
    return torch.zeros((mask.numel(), mask.ndim), dtype=torch.long, device=mask.device)


def _called_from(file_name):
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_filename.endswith(file_name):
            return True
        frame = frame.f_back
    return False
