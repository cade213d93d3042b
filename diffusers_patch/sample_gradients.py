"""Gradients of every sample of a batch apart, for low-rank matrices (LoRA).

A backward pass through a batch sums the gradients of its samples. To weight each sample by something that is known only
later, such as its advantage, the sums must be kept apart. For a low-rank matrix that costs next to nothing: the
gradient of a sample is the product of what went in and of what came back, over its own rows (Goodfellow 2015,
arXiv:1510.01799, without the norm).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class SampleGradients:
    """Inside this context, backward passes leave gradients (B, ...) of B samples here, and none in the weights.

    layers: bias-free linear layers and convolutions whose weights are trained, and nothing else is. The rows of their
    inputs are those of the samples in order, any number of equal rows for each, and all of that once for every branch
    of the guidance: (branches, B, rows), flattened.
    """

    def __init__(self, layers: Sequence[nn.Linear | nn.Conv2d], batch: int, branches: int):
        self.layers, self.batch, self.branches = layers, batch, branches
        self._sums = [torch.zeros(batch, *layer.weight.shape, device=layer.weight.device) for layer in layers]
        # makes the outputs of layers part of a graph whose inputs and weights ask for no gradient
        self._anchor = torch.zeros((), device=self._sums[0].device, requires_grad=True)

    def flatten(self) -> torch.Tensor:
        """What has been summed over all backward passes: (B, P) float32, the layers' weights one after another."""
        return torch.cat([total.flatten(1) for total in self._sums], 1)

    def __enter__(self):
        self._hooks = []
        for layer, total in zip(self.layers, self._sums, strict=True):
            layer.weight.requires_grad_(False)
            self._hooks.append(layer.register_forward_hook(self._watch(total)))
        return self

    def __exit__(self, *_):
        for layer, hook in zip(self.layers, self._hooks, strict=True):
            hook.remove()
            layer.weight.requires_grad_(True)

    def _watch(self, total):
        def watch(layer, inputs, output):
            if not torch.is_grad_enabled():
                return None
            # the input in the type that it was multiplied in, as autograd itself would keep it
            return _Record.apply(output, inputs[0].to(output.dtype), self._anchor, layer, total, self.branches)

        return watch


class _Record(torch.autograd.Function):
    """The identity of a layer's output, whose backward pass adds the samples' gradients of the layer's weight."""

    @staticmethod
    def forward(ctx, output, inputs, anchor, layer, total, branches):
        ctx.save_for_backward(inputs.detach())
        ctx.layer, ctx.total, ctx.branches = layer, total, branches
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        for rows, back in zip(inputs.chunk(ctx.branches), gradient.chunk(ctx.branches), strict=True):
            ctx.total += weight_gradients(ctx.layer, rows, back, len(ctx.total))
        return gradient, None, None, None, None, None


def weight_gradients(
    layer: nn.Linear | nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor, batch: int
) -> torch.Tensor:
    """Gradients (batch, *layer.weight.shape) of the weight, from a layer's input and the gradient of its output.

    inputs (batch * n, ...) and gradient (batch * n, ...): n rows for each sample."""
    if isinstance(layer, nn.Conv2d):
        patches = _outputs_of_inputs(layer, inputs.shape[-2:], gradient)
        inputs, gradient = inputs.flatten(2).transpose(1, 2), patches.transpose(1, 2)
    inputs = inputs.reshape(batch, -1, inputs.shape[-1])
    gradient = gradient.reshape(batch, -1, gradient.shape[-1])
    products = torch.bmm(gradient.transpose(1, 2), inputs)
    if isinstance(layer, nn.Conv2d):
        products = products.unflatten(1, (-1, *layer.kernel_size)).movedim(-1, 2)
    return products.view(batch, *layer.weight.shape)


def _outputs_of_inputs(layer, size, gradient):
    """For every pixel of a convolution's input the gradients of the outputs that it went into.

    gradient: (N, out, h, w). Returns (N, out * kernel_size, pixels), in the order of the weight's last dimensions. The
    other way round, the inputs of every output, there would be in / out times as many numbers."""
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    height, width = (
        n + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel, strict=True)
    )  # as if the stride were 1
    spread = gradient.new_zeros(*gradient.shape[:2], height, width)
    spread[..., :: stride[0], :: stride[1]] = gradient
    around = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    patches = F.unfold(spread, kernel, padding=around)
    return patches.unflatten(1, (-1, kernel[0] * kernel[1])).flip(2).flatten(1, 2)
