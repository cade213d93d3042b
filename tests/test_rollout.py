"""Painting as acting: the published sampler's golden runs, through the very code that trains."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from config import base
from config.errors import UserError
from diffusers_patch import loading
from diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from diffusers_patch.loading import load_painter, weights_variant
from diffusers_patch.mv_sdxl import split_grid
from diffusers_patch.policy import DTYPES
from diffusers_patch.rollout import draw_noise, rollout
from mrc.sanity_rewards import tile_views
from tests.tiny_models import GOLDEN, GOLDEN_CONFIG, golden_policy, make_world, settings
from tools import show_painter

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


def test_what_is_scored_is_what_is_kept():
    """Latents in bfloat16 are rounded before they are scored, or the update would score others."""
    policy = golden_policy()
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        trajectory = rollout(policy, PROMPTS, 3, 1.0, generator=torch.Generator().manual_seed(1), latents=start)
        old = trajectory.transitions(torch.arange(3).expand(2, 3))
        output = policy.predict(old.latents, old.timesteps, old.conditioning, 1.0)
        args = policy.scheduler, output, old.timesteps, old.latents, 1.0
        _, again = ddim_step_with_logprob(*args, prev_sample=old.next_latents)
    assert trajectory.latents.dtype == torch.bfloat16
    assert (again - old.log_probs).abs().max() < 1e-5  # the unrounded ones are off by a hundred times as much


def test_a_trajectory_in_parts():
    policy = golden_policy()
    policy.add_lora(rank=4)
    whole = rollout(policy, PROMPTS, 3, 5.0, generator=torch.Generator().manual_seed(0), score_reference=True)
    again = whole.room_for(2)
    for place in (1, 0):
        again.put(place, whole.take(torch.tensor([1 - place])))
    again = again.take(torch.tensor([1, 0]))
    assert len(again) == 2 and again.num_steps == 3
    assert torch.equal(again.latents, whole.latents) and torch.equal(again.kl("analytic"), whole.kl("analytic"))
    assert all(torch.equal(again.conditioning[name], value) for name, value in whole.conditioning.items())
    steps = torch.tensor([[2, 0], [1, 1]])
    old = whole.transitions(steps)
    for row, (sample, step) in enumerate([(0, 2), (0, 0), (1, 1), (1, 1)]):
        assert torch.equal(old.latents[row], whole.latents[sample, step])
        assert torch.equal(old.next_latents[row], whole.latents[sample, step + 1])
        assert old.timesteps[row] == whole.timesteps[sample, step]
        assert old.log_probs[row] == whole.log_probs[sample, step]
        assert old.log_probs_reference[row] == whole.log_probs_reference[sample, step]
        assert torch.equal(old.conditioning["pooled"][row], whole.conditioning["pooled"][sample])


def test_noise_is_that_of_one_draw_after_another():
    latents = torch.zeros(2, 4, 8, 8)
    noises = draw_noise(3, latents, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    for n, seed in enumerate((1, 2)):
        generator = torch.Generator().manual_seed(seed)
        for step in range(3):
            assert torch.equal(noises[step, n], torch.randn(1, 4, 8, 8, generator=generator)[0])


def test_decoding_in_small_batches_changes_nothing():
    policy = golden_policy()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = policy.decode(latents)
    policy.decode_batch_size = 2
    assert torch.allclose(policy.decode(latents), together, atol=1e-6)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def painter_config(world, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(settings(world, "unused", **changes))
    return config


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_weights_in_half_precision_are_found_and_read_as_they_are(world, tmp_path, mixed_precision):
    """A folder that holds nothing but *.fp16.safetensors, as many on the hub do."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "painter", dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    pipeline.save_pretrained(tmp_path / "plain")
    painters = []
    for folder in ("half", "plain"):
        config = painter_config(world, pretrained__model=str(tmp_path / folder), mixed_precision=mixed_precision)
        assert weights_variant(config.pretrained) == ("fp16" if folder == "half" else None)
        painters.append(load_painter(config, "cpu"))
    for name, weight in painters[0].unet.named_parameters():
        assert torch.equal(weight, painters[1].unet.get_parameter(name))
    types = {part: next(getattr(painters[0].pipeline, part).parameters()).dtype for part in ("unet", "text_encoder_2")}
    assert set(types.values()) == {DTYPES[mixed_precision]}


def test_a_vae_that_overflows_stays_in_float32(world, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "painter")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.save_pretrained(tmp_path)
    policy = load_painter(painter_config(world, pretrained__model=str(tmp_path), mixed_precision="bf16"), "cpu")
    for name, weight in policy.pipeline.vae.named_parameters():
        assert torch.equal(weight, pipeline.vae.get_parameter(name))  # not rounded on the way either


def test_the_base_model_is_asked_only_where_it_is_needed(monkeypatch):
    policy, asked = golden_policy(), []
    policy.add_lora(rank=4)
    predict = type(policy).predict

    def count(self, latents, timesteps, *args, reference=False):
        if reference:
            asked.append(int(timesteps[0]))
        return predict(self, latents, timesteps, *args, reference=reference)

    monkeypatch.setattr(type(policy), "predict", count)
    steps = torch.tensor([False, True, False])
    base = rollout(policy, PROMPTS, 3, 5.0, score_reference=True, reference_steps=steps)
    assert not asked and (base.kl_analytic == 0).all()  # the LoRA is zero
    for parameter in policy.trainable_parameters():
        parameter.data += 0.01
    moved = rollout(policy, PROMPTS, 3, 5.0, score_reference=True, reference_steps=steps)
    assert asked == [int(moved.timesteps[0, 1])]
    for values in (moved.log_probs_reference, moved.kl_analytic):
        assert torch.equal(values.isnan(), ~steps.expand(len(PROMPTS), 3))
    assert torch.equal(moved.kl("analytic"), moved.kl_analytic[:, 1])
    assert rollout(policy, PROMPTS, 3, 5.0, reference_steps=steps).kl() is None and len(asked) == 1


@pytest.mark.parametrize(
    "cached, hub, variant",
    [
        (["plain"], None, None),  # the hub is not asked
        (["plain", "half"], None, None),
        ([], ["plain", "half"], None),
        ([], ["half"], "fp16"),
        (["half"], ["plain", "half"], None),
        (["half"], OSError("no network"), "fp16"),
        ([], OSError("no network"), None),
    ],
)
def test_the_hub_is_asked_only_for_what_the_cache_does_not_tell(monkeypatch, cached, hub, variant):
    names = {f"unet/diffusion_pytorch_model.{key}safetensors": kind for key, kind in (("", "plain"), ("fp16.", "half"))}

    def ask(repo_id, revision):
        assert hub is not None
        if isinstance(hub, OSError):
            raise hub
        return [name for name, kind in names.items() if kind in hub]

    def look(repo_id, revision, filename):
        return f"/cache/{filename}" if names[filename] in cached else None

    monkeypatch.setattr(loading, "try_to_load_from_cache", look)
    monkeypatch.setattr(loading, "list_repo_files", ask)
    config = base.get_config()
    config.pretrained.model = "someone/model"
    assert weights_variant(config.pretrained) == variant


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"], ["tokenizer.json"]])
def test_a_painter_without_its_tokenizer_is_refused(world, tmp_path, left):
    """transformers would make one that knows no words, or no length, and say nothing."""
    shutil.copytree(world / "painter", tmp_path / "painter")
    for file in (tmp_path / "painter" / "tokenizer_2").iterdir():
        if file.name not in left:
            file.unlink()
    config = painter_config(world, pretrained__model=str(tmp_path / "painter"))
    if left == ["tokenizer.json"]:
        assert load_painter(config, "cpu").pipeline.tokenizer_2.model_max_length == 77
        return
    with pytest.raises(FileNotFoundError, match="nor tokenizer_2/vocab.json: give the complete folder"):
        load_painter(config, "cpu")


def test_a_lora_of_another_painter_is_refused(world):
    config = painter_config(
        world, pretrained__lora=str(Path(loading.__file__).parents[1] / "tiny/weights/painter_defect")
    )
    with pytest.raises(UserError, match="painter_defect' does not fit config.pretrained.model: .*; give a LoRA"):
        load_painter(config, "cpu")


def test_pictures_by_a_painter_need_no_reconstructor(tmp_path):
    """And they are the same however many are painted at a time."""
    world, pictures = make_world(tmp_path), []
    for batch in (1, 2):
        config = base.get_config()
        with config.unlocked():
            changes = dict(recon__checkpoint="", sample__batch_size=batch, train__batch_size=1)
            config.update_from_flattened_dict(settings(world, tmp_path, **changes))
        out = tmp_path / f"{batch}.png"
        show_painter.main(SimpleNamespace(config=config, count=3, out=str(out)))
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert pictures[0].std() > 0 and np.abs(pictures[0] - pictures[1]).max() <= 1
