"""Painting as acting: the published sampler's golden runs, through the very code that trains."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from diffusers_patch.mv_sdxl import split_grid
from diffusers_patch.rollout import rollout
from mrc.sanity_rewards import tile_views
from tests.tiny_models import GOLDEN, GOLDEN_CONFIG, golden_policy

TENSORS = load_file(GOLDEN / "sdxl_rollout.safetensors")
PROMPTS = GOLDEN_CONFIG["prompts"]
SEEDS = {"A": 600, "B": 700, "C": 601}


def golden(run, name):
    return TENSORS[f"{run}/{name}"]


def golden_rollout(run):
    """The painter and the trajectory of a golden run: A and C start from given latents, B draws them too."""
    settings = GOLDEN_CONFIG["runs"][run]
    policy = golden_policy()
    policy.guidance_rescale = settings["guidance_rescale"]
    if settings["unet_reference"]:
        policy.reference_unet = copy.deepcopy(policy.unet)
        policy.reference_unet.load_state_dict(load_file(GOLDEN / "tiny_unet_reference.safetensors"), strict=False)
    generator = torch.Generator().manual_seed(SEEDS[run]) if run == "B" else None
    torch.manual_seed(SEEDS[run])
    return policy, rollout(
        policy,
        PROMPTS,
        settings["num_inference_steps"],
        settings["guidance_scale"],
        settings["eta"],
        generator,
        score_reference=settings["unet_reference"],
        latents=None if run == "B" else golden(run, "initial_latents"),
    )


@pytest.mark.parametrize("run", ["A", "B", "C"])
def test_golden_run(run):
    policy, trajectory = golden_rollout(run)
    assert torch.equal(trajectory.timesteps, golden(run, "timesteps"))
    assert torch.allclose(trajectory.latents[:, 0], golden(run, "initial_latents"), atol=1e-6)
    assert torch.allclose(trajectory.latents, golden(run, "latents"), atol=1e-4, rtol=0)
    assert torch.allclose(trajectory.log_probs, golden(run, "log_probs"), atol=1e-4, rtol=0)
    assert trajectory.latents.dtype == torch.float32 and trajectory.views.shape == (2, 4, 3, 32, 32)
    if run == "B":
        assert trajectory.log_probs_reference is None and trajectory.kl() is None
        return
    assert torch.allclose(trajectory.log_probs_reference, golden(run, "log_probs_reference"), atol=1e-4, rtol=1e-4)
    assert torch.allclose(trajectory.kl(), golden(run, "kl"), atol=1e-4, rtol=1e-4)
    assert (trajectory.kl("analytic") > 0).all()
    assert torch.equal(trajectory.kl("analytic", skip_last=2), trajectory.kl_analytic[:, :-2].mean(1))


def test_golden_embeddings_and_images():
    policy, trajectory = golden_rollout("A")
    assert torch.allclose(trajectory.conditioning["prompt_embeds"], golden("A", "prompt_embeds"), atol=1e-5)
    assert torch.allclose(trajectory.conditioning["pooled"], golden("A", "add_text_embeds"), atol=1e-5)
    assert policy.image_size == golden("A", "add_time_ids")[0, 0] == 1024
    assert torch.allclose(tile_views(trajectory.views), golden("A", "images"), atol=1e-4)
    assert torch.allclose(trajectory.views, split_grid(golden("A", "images")), atol=1e-4)


def test_golden_first_prediction():
    policy, trajectory = golden_rollout("A")
    x, t = trajectory.latents[:, 0], trajectory.timesteps[:, 0]
    for name, reference in (("unet_output_first_step", False), ("unet_reference_output_first_step", True)):
        unconditional, conditional = golden("A", name).chunk(2)
        expected = unconditional + 5.0 * (conditional - unconditional)
        with torch.no_grad():
            output = policy.predict(x, t, trajectory.conditioning, 5.0, reference=reference)
            alone = policy.predict(x, t, trajectory.conditioning, 1.0, reference=reference)
        assert torch.allclose(output, expected, atol=1e-4)
        assert torch.allclose(alone, conditional, atol=1e-5)
    policy.guidance_rescale = 1.0
    with torch.no_grad():
        rescaled = policy.predict(x, t, trajectory.conditioning, 5.0, reference=True)
    assert torch.allclose(rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)), atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    policy = golden_policy()

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    together = rollout(policy, prompts, 3, 5.0, generator=generators())
    alone = [
        rollout(golden_policy(), [prompt], 3, 5.0, generator=[one])
        for prompt, one in zip(prompts, generators(), strict=True)
    ]
    assert torch.equal(together.latents[:, 0], torch.cat([one.latents[:, 0] for one in alone]))
    # a batch of another size rounds otherwise: the last bit of the weights moves these latents by up to 3e-5
    assert torch.allclose(together.latents, torch.cat([one.latents for one in alone]), atol=1e-4)
    assert not torch.equal(together.latents[0], together.latents[2])


def test_each_distinct_prompt_is_encoded_once_and_alike_in_any_batch():
    policy, other = golden_policy(), golden_policy()
    encoded = []
    encode = policy._encode
    policy._encode = lambda prompts: encoded.extend(prompts) or encode(prompts)
    first = policy.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    again = policy.encode([PROMPTS[0]])
    assert encoded == [PROMPTS[1], PROMPTS[0]]
    assert all(torch.equal(again[name], first[name][1:2]) for name in first)
    assert all(torch.equal(other.encode([PROMPTS[0]])[name], again[name]) for name in again)  # not by rounding either


def test_the_reference_is_the_model_without_its_lora():
    policy = golden_policy()
    policy.add_lora(rank=4)

    def generator():
        return torch.Generator().manual_seed(0)

    base = rollout(policy, PROMPTS, 3, 5.0, generator=generator(), score_reference=True)
    assert torch.equal(base.log_probs, base.log_probs_reference)  # B = 0: the LoRA does nothing yet
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05)
    moved = rollout(policy, PROMPTS, 3, 5.0, generator=generator(), score_reference=True)
    assert not torch.equal(moved.log_probs, moved.log_probs_reference)
    x, t = moved.latents[:, 0], moved.timesteps[:, 0]
    with torch.no_grad():
        expected = golden_policy().predict(x, t, moved.conditioning, 5.0)
        assert torch.equal(policy.predict(x, t, moved.conditioning, 5.0, reference=True), expected)
        assert not torch.equal(policy.predict(x, t, moved.conditioning, 5.0), expected)  # and it is on again


def test_full_precision_is_a_pause():
    policy = golden_policy()
    policy.add_lora(rank=2)
    policy.to("cpu", "bf16")
    types = {name: p.dtype for name, p in policy.unet.named_parameters()}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([801, 1])
    with torch.no_grad():
        conditioning = policy.encode(PROMPTS)
        rounded = policy.predict(x, t, conditioning, 5.0)
        with policy.full_precision():
            assert {p.dtype for p in policy.unet.parameters()} == {torch.float32}
            exact = policy.predict(x, t, conditioning, 5.0)
        assert torch.equal(policy.predict(x, t, conditioning, 5.0), rounded)
    assert {name: p.dtype for name, p in policy.unet.named_parameters()} == types
    assert rounded.dtype == exact.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_schedulers_without_a_density_are_refused():
    policy = golden_policy()
    policy.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(ValueError, match="steps_offset = 1"):
        rollout(policy, PROMPTS, 3, 5.0)
