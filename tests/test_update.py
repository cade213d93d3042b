"""The update: golden cases of the published step, through the code that trains, and what that code promises besides."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

import ddpo.calibration
import ddpo.update
from config import base
from ddpo.calibration import StepCalibration, check_clip_range, kl_between, ratio_deviation, trajectory_means
from ddpo.setup import make_optimizer
from ddpo.update import micro_batch_losses, shuffled_micro_batches, update
from diffusers_patch.ddim_with_logprob import ddim_std
from diffusers_patch.rollout import Trajectory, rollout
from tests.tiny_models import GOLDEN, GOLDEN_CONFIG, golden_policy

GOLDEN_STEP = json.loads((GOLDEN / "ppo_step.json").read_text())
CASES = GOLDEN_STEP["cases"]
TENSORS = load_file(GOLDEN / "ppo_step.safetensors")
PROMPTS = GOLDEN_CONFIG["prompts"]


class Recorder(Accelerator):
    """An accelerator that keeps the gradients it is asked to clip."""

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        self.grads = getattr(self, "grads", []) + [[p.grad.clone() for p in parameters]]
        return super().clip_grad_norm_(parameters, max_norm, norm_type)


def golden_config(case):
    """The configuration of a golden case."""
    config = base.get_config()
    config.mixed_precision = "no"
    config.sample.num_steps = GOLDEN_STEP["num_inference_steps"]
    config.sample.guidance_scale, config.sample.eta = GOLDEN_STEP["guidance_scale"], GOLDEN_STEP["eta"]
    for key in ("batch_size", "gradient_accumulation_steps", "timestep_fraction", "clip_range", "max_grad_norm"):
        config.train[key] = case[key]
    config.train.adv_clip_max = float(case["adv_clip_max"])
    config.train.learning_rate, config.train.adam_epsilon = case["lr"], case["eps"]
    config.train.adam_beta1, config.train.adam_beta2 = case["betas"]
    config.train.adam_weight_decay = case["weight_decay"]
    for key in ("kl_penalty", "kl_in_reward", "kl_beta"):
        config[key] = case[key]
    return config


def golden_trajectory():
    stored = {key.split("/")[1]: value for key, value in TENSORS.items() if key.startswith("rollout/")}
    return Trajectory(
        latents=stored["latents"],
        timesteps=stored["timesteps"],
        log_probs=stored["log_probs"],
        log_probs_reference=stored["log_probs_reference"],
        kl_analytic=None,
        views=None,
        conditioning={"prompt_embeds": stored["prompt_embeds"], "pooled": stored["add_text_embeds"]},
    )


def of_lora(prefix, names):
    """The stored tensors under `prefix` for peft's parameter names."""
    return [TENSORS[f"{prefix}/{name.replace('.default', '')}"] for name in names]


def lora_policy(prefix):
    """The golden painter with the LoRA stored under `prefix`, ready for an update."""
    policy = golden_policy()
    policy.add_lora(rank=GOLDEN_STEP["lora_rank"])
    names = list(policy.trainable_state())
    policy.load_trainable_state(dict(zip(names, of_lora(prefix, names), strict=True)))
    policy.scheduler.set_timesteps(GOLDEN_STEP["num_inference_steps"])
    return policy


@pytest.mark.parametrize("name", CASES)
def test_golden_update(name, monkeypatch):
    case = CASES[name]
    config, policy, accelerator = golden_config(case), lora_policy(case["lora_init"]), Recorder(cpu=True)
    names = list(policy.trainable_state())
    optimizer = accelerator.prepare(make_optimizer(policy, config))
    steps = []  # (log_prob, loss, info) of every micro-batch and timestep

    def recording_loss(log_prob, *args, **kwargs):
        loss, info = loss_function(log_prob, *args, **kwargs)
        steps.append((log_prob.detach(), loss.detach(), info))
        return loss, info

    loss_function = ddpo.update.ppo_loss
    monkeypatch.setattr(ddpo.update, "ppo_loss", recording_loss)
    after = []
    logs = update(
        policy,
        optimizer,
        accelerator,
        golden_trajectory(),
        TENSORS["rollout/advantages"],
        config,
        torch.Generator().manual_seed(case["shuffle_seed"]),
        lambda: after.append([value.clone() for value in policy.trainable_state().values()]) or {},
    )

    grid = TENSORS[f"{name}/loss"].shape  # (micro-batches, timesteps)

    def as_grid(values):
        return torch.stack(values).unflatten(0, grid)

    assert torch.allclose(as_grid([s[0] for s in steps]), TENSORS[f"{name}/log_prob"], atol=2e-5, rtol=0)
    assert torch.allclose(as_grid([s[1] for s in steps]), TENSORS[f"{name}/loss"], atol=2e-5, rtol=0)
    for key, atol in (("approx_kl", 1e-9), ("clipfrac", 0), ("kl", 4e-5)):
        assert torch.allclose(as_grid([s[2][key] for s in steps]), TENSORS[f"{name}/{key}"], atol=atol, rtol=2e-2), key

    assert len(logs) == len(after) == case["optimizer_steps"]
    for k, (log, grads, weights) in enumerate(zip(logs, accelerator.grads, after, strict=True)):
        assert log["grad_norm"] == pytest.approx(float(TENSORS[f"{name}/grad_norm"][k]), rel=1e-4)
        expected = of_lora(f"{name}/grad/{k}", names)
        largest = max(float(grad.abs().max()) for grad in expected)
        for parameter, mine, theirs in zip(names, grads, expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-4 * largest, parameter
        for parameter, mine, theirs, grad in zip(
            names, weights, of_lora(f"{name}/lora_after/{k}", names), expected, strict=True
        ):
            error, clear = (mine - theirs).abs(), grad.abs() > 1e-3 * largest
            assert error.max() <= 0.1 * case["lr"], parameter
            # Adam's first step divides by |gradient|: only a gradient that is not rounding noise gives sharp weights
            assert k > 0 or not clear.any() or error[clear].max() <= 2e-6, parameter
    rows = slice(0, grid[0] // case["optimizer_steps"])
    assert logs[0]["loss"] == pytest.approx(float(TENSORS[f"{name}/loss"][rows].mean()), abs=2e-5)
    assert logs[0]["ratio_min"] == pytest.approx(float(TENSORS[f"{name}/ratio"][rows].min()), abs=2e-5)


def gradient_of(policy, trajectory, advantages, index, steps, config):
    """The gradient of one micro-batch (flattened), its loss, and its list of infos."""
    total, infos = 0.0, []
    for loss, info in micro_batch_losses(policy, trajectory.take(index), advantages[index], steps, config):
        loss.backward()
        total += loss.item()
        infos.append(info)
    gradient = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    policy.unet.zero_grad()
    return gradient / steps.shape[1], total / steps.shape[1], infos


def test_timesteps_that_share_a_forward_pass_give_the_same_gradient():
    config, policy = golden_config(CASES["C"]), lora_policy("C/lora_init")
    config.train.timestep_weighting = "noise"
    config.train.batch_size = 4
    (index, steps), *_ = next(shuffled_micro_batches(8, config, torch.Generator().manual_seed(0)))
    arguments = policy, golden_trajectory(), TENSORS["rollout/advantages"], index, steps
    alone, loss_alone, _ = gradient_of(*arguments, config)
    for together in (2, 5):  # 2 leaves a remainder of 1
        config.train.timesteps_per_forward = together
        gradient, loss, infos = gradient_of(*arguments, config)
        assert len(infos) == -(-5 // together) and sum(info["steps"] for info in infos) == 5
        assert (gradient - alone).abs().max() <= 1e-4 * alone.abs().max()
        assert loss == pytest.approx(loss_alone, abs=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    config, policy = golden_config(CASES["C"]), lora_policy("C/lora_init")
    index, steps = torch.arange(4), torch.stack([torch.randperm(5) for _ in range(4)])
    arguments = policy, golden_trajectory(), TENSORS["rollout/advantages"], index, steps, config
    kept, _, _ = gradient_of(*arguments)
    calls = []
    policy.unet.enable_gradient_checkpointing()
    for module in policy.unet.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, f=function: calls.append(None) or f(*a)
    again, _, _ = gradient_of(*arguments)
    assert calls and torch.equal(again, kept)


def test_noise_weights_do_not_depend_on_the_steps_drawn():
    config, policy = golden_config(CASES["A"]), lora_policy("A/lora_init")
    trajectory, advantages, index = golden_trajectory(), TENSORS["rollout/advantages"], torch.tensor([3])
    variance = ddim_std(policy.scheduler, trajectory.timesteps[3], 1.0) ** 2
    config.train.skip_last_steps = 1
    for step in (0, 3):
        steps = torch.tensor([[step]])
        config.train.timestep_weighting = "uniform"
        plain, _, _ = gradient_of(policy, trajectory, advantages, index, steps, config)
        config.train.timestep_weighting = "noise"
        weighted, _, _ = gradient_of(policy, trajectory, advantages, index, steps, config)
        weight = variance[step] / variance[:4].mean()
        assert torch.allclose(weighted, weight * plain, rtol=1e-4, atol=1e-6 * plain.abs().max())


def test_micro_batches_hold_every_sample_once_per_pass_and_no_skipped_step():
    config = golden_config(CASES["A"])
    config.train.skip_last_steps, config.train.timestep_fraction = 1, 0.5
    config.train.batch_size, config.train.gradient_accumulation_steps, config.train.num_inner_epochs = 2, 3, 2
    passes = list(shuffled_micro_batches(6, config, torch.Generator().manual_seed(1)))
    assert [len(micro_batches) for micro_batches in passes] == [3, 3]  # an optimizer step each
    order, steps = (torch.cat(parts) for parts in zip(*passes[0], strict=True))
    assert sorted(order.tolist()) == list(range(6)) and order.tolist() != list(range(6))
    assert steps.shape == (6, 2) and steps.max() <= 3 and (steps[:, 0] != steps[:, 1]).all()
    assert len({tuple(row.tolist()) for row in steps}) > 1  # independently per sample


@pytest.mark.parametrize("composition", ["same", "other"])
def test_on_policy_the_ratio_is_one(composition):
    config, policy = golden_config(CASES["A"]), lora_policy("lora_sampling")
    policy.to("cpu")
    prompts = PROMPTS * 2
    trajectory = rollout(policy, prompts, 5, 5.0, generator=torch.Generator().manual_seed(5))
    index = torch.arange(4) if composition == "same" else torch.tensor([2, 0])
    steps = torch.arange(5).expand(len(index), 5)
    part, advantages = trajectory.take(index), torch.ones(len(index))
    infos = [info for _, info in micro_batch_losses(policy, part, advantages, steps, config)]
    for info in infos:
        if composition == "same":
            assert info["ratio_min"] == info["ratio_max"] == 1
        assert abs(info["ratio_min"] - 1) <= 1e-5 and abs(info["ratio_max"] - 1) <= 1e-5


def test_kl_between_is_the_sum_over_steps_and_dimensions():
    torch.manual_seed(0)
    mean, other = torch.randn(2, 3, 2, 4, 8, 8, dtype=torch.float64)
    std = torch.tensor([0.5, 2.0], dtype=torch.float64).view(1, 2, 1, 1, 1).expand(3, 2, 1, 1, 1)

    def normal(m):
        return torch.distributions.Normal(m, std)

    expected = torch.distributions.kl_divergence(normal(mean), normal(other)).flatten(1).sum(1)
    assert torch.allclose(kl_between((mean, std), (other, std)), expected)


def test_trajectory_means_leaves_out_skipped_steps_and_is_exact_in_half_precision():
    config, policy = golden_config(CASES["A"]), lora_policy("lora_sampling")
    config.train.skip_last_steps = 2
    index = torch.tensor([5, 1])
    means, stds = trajectory_means(policy, golden_trajectory(), index, config)
    assert means.shape == (2, 3, 4, 8, 8) and stds.shape == (2, 3, 1, 1, 1)
    policy.to("cpu", "bf16")
    rounded, _ = trajectory_means(policy, golden_trajectory(), index, config)
    assert rounded.dtype == torch.float32
    nothing = kl_between((rounded, stds), (trajectory_means(policy, golden_trajectory(), index, config)[0], stds))
    assert (nothing == 0).all()  # no rounding noise where nothing has moved


def test_calibration_reaches_the_wanted_kl():
    config, policy, accelerator = golden_config(CASES["A"]), lora_policy("lora_sampling"), Accelerator(cpu=True)
    config.train.kl_per_update, config.train.kl_calibration_updates = 0.01, 3
    config.train.batch_size, config.train.gradient_accumulation_steps, config.train.timesteps_per_forward = 8, 1, 5
    optimizer = accelerator.prepare(make_optimizer(policy, config))
    calibration = StepCalibration(policy, optimizer, accelerator, config)
    logs, rates = [], []
    for epoch in range(4):
        calibration.start(golden_trajectory())
        rates.append(optimizer.param_groups[0]["lr"])
        logs += update(
            policy,
            optimizer,
            accelerator,
            golden_trajectory(),
            TENSORS["rollout/advantages"],
            config,
            torch.Generator().manual_seed(epoch),
            calibration.after_update,
        )
    assert rates[0] == config.train.learning_rate and calibration.remaining == 0
    for log, rate, following in zip(logs, rates, rates[1:], strict=False):
        factor = min(max((0.01 / log["kl_of_update"]) ** 0.5, 0.1), 10)
        assert log["next_learning_rate"] == following == pytest.approx(rate * factor)
    assert "kl_of_update" not in logs[3] and calibration.trajectory is None
    assert 0.3 < logs[2]["kl_of_update"] / 0.01 < 3


def test_a_step_that_the_loss_scaler_skipped_is_named_and_calibrates_nothing():
    """A gradient that overflows in the first step of two."""
    config, policy, accelerator = golden_config(CASES["A"]), lora_policy("lora_sampling"), Accelerator(cpu=True)
    config.train.batch_size, config.train.gradient_accumulation_steps, config.train.timesteps_per_forward = 4, 1, 5
    scaler, overflow = torch.amp.GradScaler("cpu", init_scale=2.0), iter([True, False])
    optimizer = AcceleratedOptimizer(make_optimizer(policy, config), scaler=scaler)
    accelerator.clip_grad_norm_ = lambda parameters, _: (
        parameters[0].grad.fill_(math.inf if next(overflow) else 1).sum()
    )
    accelerator.backward = lambda loss: scaler.scale(loss).backward()
    calls = []
    advantages = TENSORS["rollout/advantages"]
    generator = torch.Generator().manual_seed(0)
    arguments = policy, optimizer, accelerator, golden_trajectory(), advantages, config, generator
    logs = update(*arguments, lambda: calls.append(None) or {"kl_of_update": 1.0})
    assert [log["step_skipped"] for log in logs] == [True, False] and len(calls) == 1
    assert "kl_of_update" not in logs[0] and logs[1]["kl_of_update"] == 1.0


@pytest.mark.parametrize(
    "processes, per_process, expected",
    [
        (1, 64, [[0, 8, 16, 24, 32, 40, 48, 56]]),
        (2, 32, [[0, 8, 16, 24]] * 2),
        (16, 4, [[0]] * 16),
        (1, 6, [[*range(6)]]),
    ],
)
def test_calibration_measures_the_same_samples_for_any_number_of_processes(
    processes, per_process, expected, monkeypatch
):
    picked = []
    monkeypatch.setattr(ddpo.calibration, "trajectory_means", lambda p, t, index, c: picked.append(index.tolist()))
    config, policy = golden_config(CASES["A"]), lora_policy("A/lora_init")
    config.train.kl_per_update = 0.1
    for process in range(processes):
        accelerator = type("Rank", (), {"process_index": process, "num_processes": processes})
        trajectory = Trajectory(None, torch.zeros(per_process, 5), None, None, None, None, None)
        StepCalibration(policy, None, accelerator, config).start(trajectory)
    assert picked == expected


def test_a_clip_range_below_rounding_is_refused(monkeypatch):
    """With a network whose output depends on the size of its batch as that of a half-precision one may."""
    config, policy = golden_config(CASES["A"]), lora_policy("lora_sampling")
    config.mixed_precision, config.sample.batch_size, config.train.batch_size = "bf16", 4, 2
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, *args: predict(x, *args) + 1e-3 * (len(x) == 4))
    with pytest.raises(ValueError, match=r"clip_range is 0.0001, but .*'bf16' rounding alone moves \d+ % .*set it to"):
        check_clip_range(policy, PROMPTS, config)
    deviation = ratio_deviation(policy, PROMPTS, config)
    assert deviation.shape == (8,) and deviation.max() > 1e-4
    config.train.batch_size = 4  # the same batches: exactly 1
    assert (ratio_deviation(policy, PROMPTS, config) == 0).all()
    check_clip_range(policy, PROMPTS, config)
    config.train.batch_size, config.train.clip_range = 2, 2 * float(deviation.max())
    check_clip_range(policy, PROMPTS, config)
    config.train.clip_range, config.mixed_precision = 1e-4, "no"
    check_clip_range(policy, PROMPTS, config)
