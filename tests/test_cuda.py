"""What CPUs cannot show: a golden prediction, LPIPS, the reconstructors and the gradient, computed on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from config import base
from config.validate import SPLATTING
from ddpo.update import micro_batch_losses
from diffusers_patch.rollout import rollout
from mrc.lpips import LPIPS
from recon import RECONSTRUCTORS
from recon.precision import without_tf32
from tests.tiny_models import GOLDEN, GOLDEN_CONFIG, SMALL_RECONSTRUCTORS, golden_policy

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
PROMPTS = GOLDEN_CONFIG["prompts"]
STEPS = 4


@pytest.fixture(autouse=True)
def float32_means_float32():
    with without_tf32():
        yield


def test_golden_prediction():
    tensors = load_file(GOLDEN / "sdxl_rollout.safetensors")
    policy = golden_policy().to(DEVICE)
    latents = tensors["A/initial_latents"].to(DEVICE)
    with torch.no_grad():
        t = tensors["A/timesteps"][:, 0].to(DEVICE)
        output = policy.predict(latents, t, policy.encode(PROMPTS), 5.0)
    unconditional, conditional = tensors["A/unet_output_first_step"].chunk(2)
    expected = unconditional + 5.0 * (conditional - unconditional)
    torch.testing.assert_close(output.cpu(), expected, atol=1e-3, rtol=0)


def test_samples_are_those_of_a_cpu():
    """The noise is drawn on the CPU, so that a seed means the same everywhere."""

    def paint(device):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        policy = golden_policy().to(device)
        return rollout(policy, PROMPTS, STEPS, 5.0, generator=generators).to("cpu")

    ours, theirs = paint(DEVICE), paint("cpu")
    torch.cuda.synchronize()
    for name in ("latents", "log_probs", "views"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-3, rtol=0)


def test_golden_lpips():
    tensors = load_file(GOLDEN / "lpips.safetensors")
    model = LPIPS().to(DEVICE)
    for n in range(4):
        a, b = (tensors[f"{n}/image_{side}"][None].to(DEVICE) / 255 for side in "ab")
        torch.testing.assert_close(model(a, b).cpu(), tensors[f"{n}/distance"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", RECONSTRUCTORS)
def test_reconstructors_see_the_same(name):
    torch.manual_seed(0)
    model = SMALL_RECONSTRUCTORS[name]().eval().requires_grad_(False)
    views = torch.rand(2, 4, 3, model.input_size, model.input_size)
    results = []
    for device in ("cpu", DEVICE):
        model = model.to(device)
        scene = model.reconstruct(views.to(device), model.cameras)
        # scenes of Gaussians are rendered by another renderer on CUDA, which has tests of its own
        seen = scene.tensors() if name in SPLATTING else model.render(scene, model.cameras, 16)
        results.append([value.cpu() for value in seen])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def gradient(device, precision, trajectory):
    """Of the LoRA, after the losses of all steps of `trajectory`, flattened."""
    config = base.get_config()
    config.sample.num_steps, config.train.clip_range = STEPS, 0.5  # rounding must not clip
    policy = golden_policy()
    policy.to(device, precision)
    torch.manual_seed(0)
    policy.add_lora(4)
    policy.scheduler.set_timesteps(STEPS, device=device)
    batch = trajectory.pin().to(device)  # as an update moves it
    steps = torch.arange(STEPS, device=device).expand(2, -1)
    for loss, _ in micro_batch_losses(policy, batch, torch.tensor([1.0, -1.0], device=device), steps, config):
        (1024 * loss).backward()
    grads = [p.grad.flatten().cpu() for p in policy.trainable_parameters() if p.grad is not None]
    return torch.cat(grads) / 1024


@pytest.fixture(scope="module")
def gradients():
    """{(device, precision): gradient}, and what was painted"""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    trajectory = rollout(golden_policy().to("cpu"), PROMPTS, STEPS, 5.0, generator=generators)
    return SimpleNamespace(trajectory=trajectory, expected=gradient("cpu", "no", trajectory))


@pytest.mark.parametrize(("precision", "likeness"), [("no", 0.9999), ("fp16", 0.97), ("bf16", 0.85)])
def test_gradients_point_the_same_way(gradients, precision, likeness):
    found = gradient(DEVICE, precision, gradients.trajectory)
    assert torch.nn.functional.cosine_similarity(found, gradients.expected, 0) > likeness
    assert found.norm() / gradients.expected.norm() == pytest.approx(1, rel=0.2)
