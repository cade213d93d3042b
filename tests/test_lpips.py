"""LPIPS against the original's distances, layers and gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrc.lpips import LPIPS

TENSORS = load_file(Path(__file__).parent / "golden" / "lpips.safetensors")


@pytest.fixture(scope="module")
def lpips():
    return LPIPS()


def golden_pair(n):
    return [TENSORS[f"{n}/image_{side}"][None] / 255 for side in "ab"]


@pytest.mark.parametrize("n", range(4))
def test_golden_distances(lpips, n):
    a, b = golden_pair(n)
    for key, result in (
        ("distance", lpips(a, b)),
        ("distance_torchmetrics_1_2_1", lpips(a, b)),
        ("per_layer", lpips._per_layer(a, b)[:, 0]),
    ):
        torch.testing.assert_close(result, TENSORS[f"{n}/{key}"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", range(2))
def test_golden_gradients(lpips, n):
    a, b = golden_pair(n)
    b.requires_grad_(True)
    lpips(a, b).sum().backward()
    expected = TENSORS[f"{n}/grad_wrt_b_in_minus1_1"]
    gradient = b.grad[0] / 2  # ours is per unit of [0, 1], theirs per unit of [-1, 1]
    assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_chunks_do_not_change_the_result(lpips):
    torch.manual_seed(0)
    a, b = torch.rand(2, 5, 3, 40, 48)
    torch.testing.assert_close(LPIPS(chunk_size=2)(a, b), lpips(a, b), atol=1e-6, rtol=1e-5)


def test_equal_images_have_distance_zero_and_a_finite_gradient(lpips):
    a = torch.zeros(1, 3, 64, 64)
    b = a.clone().requires_grad_(True)
    distance = lpips(a, b)
    distance.sum().backward()
    assert distance.item() == 0 and torch.isfinite(b.grad).all()


def test_the_weights_are_frozen_and_the_module_is_complete(lpips):
    assert not any(p.requires_grad for p in lpips.parameters())
    assert len(lpips.state_dict()) == 15


def test_wrong_shapes_and_files_are_refused(lpips):
    with pytest.raises(ValueError, match="H and W of 31 or more"):
        lpips(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))
    with pytest.raises(ValueError, match="same shape"):
        lpips(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match="mrc.lpips_checkpoint"):
        LPIPS("nowhere.safetensors")


def test_the_smallest_size_works(lpips):
    assert lpips(torch.zeros(1, 3, 31, 31), torch.ones(1, 3, 31, 31)).item() > 0
