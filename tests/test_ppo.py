"""The loss arithmetic on the stored log-probabilities of the published optimisation step, ties, weights, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpo.ppo import ppo_loss, timestep_weights

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "ppo_step.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "ppo_step.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_golden_losses(name):
    case = CASES[name]
    batch = case["batch_size"]
    perm, perms = TENSORS[f"{name}/perm"], TENSORS[f"{name}/perms"]
    log_probs = TENSORS[f"{name}/log_prob"]  # (micro-batches, timesteps, batch)
    kl_beta = 0.0 if case["kl_in_reward"] else case["kl_beta"]
    for m in range(log_probs.shape[0]):
        rows = slice(m * batch, (m + 1) * batch)
        for j in range(case["num_train_timesteps"]):
            sample, step = perm[rows], perms[rows, j]
            loss, info = ppo_loss(
                log_probs[m, j],
                TENSORS["rollout/log_probs"][sample, step],
                TENSORS["rollout/advantages"][sample],
                case["clip_range"],
                case["adv_clip_max"],
                TENSORS["rollout/log_probs_reference"][sample, step],
                kl_beta,
            )
            expected = {key: TENSORS[f"{name}/{key}"][m, j] for key in ("loss", "approx_kl", "clipfrac", "kl")}
            assert torch.isclose(loss, expected["loss"], atol=2e-5, rtol=0)
            assert torch.isclose(info["approx_kl"], expected["approx_kl"], rtol=1e-3, atol=1e-10)
            assert torch.isclose(info["clipfrac"], expected["clipfrac"])
            assert torch.isclose(info["kl"], expected["kl"], atol=2e-5, rtol=0)
            ratio = TENSORS[f"{name}/ratio"][m, j]
            assert torch.isclose(info["ratio_min"], ratio.min(), atol=1e-6)
            assert torch.isclose(info["ratio_max"], ratio.max(), atol=1e-6)


def test_on_policy_the_gradient_is_the_full_policy_gradient():
    old = torch.tensor([-1.3, 0.2, 0.7, 2.0])
    log_prob = old.clone().requires_grad_(True)
    a = torch.tensor([1.5, -0.5, 0.0, -7.0])
    loss, info = ppo_loss(log_prob, old, a, clip_range=1e-4, adv_clip_max=5)
    loss.backward()
    clamped = a.clamp(-5, 5)
    assert loss.item() == -clamped.mean().item()
    assert torch.equal(log_prob.grad, -clamped / 4)  # both branches of the max tie at ratio 1: nothing may be lost
    assert info["ratio_min"] == info["ratio_max"] == 1 and info["clipfrac"] == 0 and info["approx_kl"] == 0
    assert "kl" not in info


def test_the_clip_stops_the_gradient_on_the_far_side_only():
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, info = ppo_loss(log_prob, torch.zeros(4), a, clip_range=0.1, adv_clip_max=5)
    loss.backward()
    stopped = log_prob.grad == 0
    assert stopped.tolist() == [True, False, False, True] and info["clipfrac"] == 1


def test_weight_scales_each_sample_and_leaves_the_info_alone():
    torch.manual_seed(0)
    log_prob, old, reference = 1e-4 * torch.randn(3, 4)
    a, weight = torch.randn(2, 4)
    each = torch.stack(
        [ppo_loss(*(x[i : i + 1] for x in (log_prob, old, a)), 1e-4, 5, reference[i : i + 1], 0.3)[0] for i in range(4)]
    )
    loss, info = ppo_loss(log_prob, old, a, 1e-4, 5, reference, 0.3, weight)
    assert torch.isclose(loss, (weight * each).mean(), rtol=1e-6)
    assert all(torch.equal(info[k], v) for k, v in ppo_loss(log_prob, old, a, 1e-4, 5, reference, 0.3)[1].items())


def test_kl_beta_needs_a_reference():
    with pytest.raises(ValueError, match="no log_prob_reference"):
        ppo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), 1e-4, 5, kl_beta=0.1)


def test_timestep_weights():
    std = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.1, 0.4]])
    assert torch.equal(timestep_weights(std, "uniform"), torch.ones(2, 3))
    weights = timestep_weights(std, "noise")
    assert torch.allclose(weights.mean(dim=-1), torch.ones(2))
    assert torch.allclose(weights[0] / weights[0, 0], torch.tensor([1.0, 4.0, 9.0]))
    with pytest.raises(ValueError, match="'snr'"):
        timestep_weights(std, "snr")
