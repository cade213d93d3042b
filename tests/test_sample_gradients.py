"""Gradients of every sample apart: those of autograd, sample by sample."""

import pytest
import torch
from torch import nn

from diffusers_patch.sample_gradients import SampleGradients

LAYERS = {
    "linear": nn.Linear(5, 3, bias=False),
    "convolution": nn.Conv2d(5, 3, 3, padding=1, bias=False),
    "with stride": nn.Conv2d(5, 3, 3, stride=2, padding=1, bias=False),
    "1x1": nn.Conv2d(5, 3, 1, bias=False),
    "not square": nn.Conv2d(5, 3, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 4])  # of a sample, such as its views
def test_gradients_are_those_of_each_sample_alone(name, rows):
    layer = LAYERS[name].double()
    B, branches = 3, 2
    shape = (7, 5) if isinstance(layer, nn.Linear) else (5, 6, 8)
    inputs = torch.randn(branches, B, rows, *shape, dtype=torch.float64)

    def objective(x):  # of samples (branches, b, rows, ...), each one's its own
        return layer(x.flatten(0, 2)).sin().unflatten(0, x.shape[:3]).flatten(3).sum((0, 2, 3))

    with SampleGradients([layer], B, branches) as gradients:
        for total in gradients._sums:
            total.data = total.double()
        for _ in range(2):  # they add up over backward passes
            objective(inputs).sum().backward()
    assert layer.weight.grad is None and layer.weight.requires_grad and not layer._forward_hooks
    apart = gradients.flatten()
    for sample in range(B):
        (expected,) = torch.autograd.grad(objective(inputs[:, sample : sample + 1]).sum(), layer.weight)
        assert torch.allclose(apart[sample], 2 * expected.flatten(), rtol=1e-10, atol=1e-10)
