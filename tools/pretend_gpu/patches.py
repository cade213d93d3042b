"""What a CPU build of torch lacks and what tensors without data cannot do, put in place for the rest of the process.

Called with tensors that hold data, everything here behaves as before.
"""

import os
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.cuda.amp.common
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _foreach_supported_types

from mrc import lpips
from tools.pretend_gpu.watch import SCALAR, Watch

GPU = torch.device("cuda", 0)
ANY_BOX = (0, 0, 2**20, 2**20)  # a bounding box, cut to the image by whoever uses it as a slice
FLASH_HEAD = 256  # the largest head of flash attention

_tolist, _numpy, _pin_memory, _is_pinned = (
    getattr(torch.Tensor, name) for name in ("tolist", "numpy", "pin_memory", "is_pinned")
)
_attention = F.scaled_dot_product_attention


def apply(watch: Watch) -> None:
    """Put everything in place. watch: is told what happens behind the dispatcher's back."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(GPU)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda *args: "pretend GPU"
    torch.cuda.current_device = lambda: 0
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args: None)
    _foreach_supported_types.append(FakeTensor)  # as it does with all of a GPU's tensors
    nn.Module._apply = _apply_without_swapping
    lpips.load_file = lambda file: {}
    lpips.LPIPS.load_state_dict = lambda self, state: None
    F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = _cuda_attention(watch)
    methods = {"tolist": _values_as_list(watch), "numpy": _values_as_array, "pin_memory": _pin, "is_pinned": _pinned}
    for tensor_class in (torch.Tensor, FakeTensor):
        for name, method in methods.items():
            setattr(tensor_class, name, method)
    sys.modules["gsplat"] = SimpleNamespace(rasterization=_rasterization)
    sys.modules["rembg"] = SimpleNamespace(new_session=lambda: None, remove=lambda image, session: image)


# -- values, which FakeTensors do not have ----------------------------------------------------------------------------


def _values_as_list(watch):
    def tolist(self):
        if not isinstance(self, FakeTensor):
            return _tolist(self)
        if self.device.type == "cuda":
            watch.note(SCALAR)
        if self.ndim == 2 and self.shape[1] == len(ANY_BOX) and self.dtype == torch.long:
            return [ANY_BOX] * len(self)
        return np.ones(tuple(self.shape), float if self.is_floating_point() else int).tolist()

    return tolist


def _values_as_array(self, *args, **kwargs):
    """Random numbers in [0, 1), the same in every run, because statistics of constants have no spread to divide by."""
    if not isinstance(self, FakeTensor):
        return _numpy(self, *args, **kwargs)
    if self.device.type != "cpu":
        raise TypeError("can't convert a cuda:0 tensor to numpy: copy it to the host first")
    name = str(self.dtype).removeprefix("torch.")
    return np.random.default_rng(0).random(tuple(self.shape)).astype(name)


def _pin(self, *args):
    if not isinstance(self, FakeTensor):
        return _pin_memory(self, *args)
    pinned = self.clone()
    pinned.untyped_storage().pinned = True
    return pinned


def _pinned(self, *args):
    if not isinstance(self, FakeTensor):
        return _is_pinned(self, *args)
    return hasattr(self.untyped_storage(), "pinned")


# -- kernels ----------------------------------------------------------------------------------------------------------


def _cuda_attention(watch):
    """The kernel that CUDA chooses: flash for half precision without a mask, otherwise the memory-efficient one."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "cuda":
            return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        head = query.shape[-1]
        half = query.dtype in (torch.float16, torch.bfloat16)
        if attn_mask is None and half and head <= FLASH_HEAD:
            padding = -head % 8
            query, key, value = (F.pad(x, (0, padding)) if padding else x for x in (query, key, value))
            out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
            return out[..., :head]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_gradient, dropout_p, is_causal
        )[0]

    return attention


def _rasterization(
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane, render_mode, packed
):
    """gsplat's, as far as shapes, types and devices go (not its own working memory)."""
    for tensor in (means, quats, scales, opacities, colors, viewmats, Ks):
        if tensor.device != GPU or tensor.dtype != torch.float32:
            raise RuntimeError(f"gsplat takes float32 on CUDA and got {tensor.dtype} on {tensor.device}")
    batch, views = viewmats.shape[:2]
    channels = 4 if "+" in render_mode else 3
    image = means.new_zeros(batch, views, height, width, channels)
    return image, means.new_zeros(batch, views, height, width, 1), {}


def _apply_without_swapping(self, fn, recurse=True):
    """nn.Module._apply, behind `to` and `half`: new parameters in place of swapped data, which FakeTensors refuse."""
    for child in self.children():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = fn(parameter)
            if moved is not parameter:
                self._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
