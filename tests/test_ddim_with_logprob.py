"""The DDIM step: 72 golden cases of DDPO's step, and what they cannot say (rounding, KL, refused schedulers)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from diffusers_patch.ddim_with_logprob import (
    analytic_kl,
    check_scheduler,
    ddim_mean_std,
    ddim_std,
    ddim_step_with_logprob,
    draw,
    gaussian_log_prob,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "ddim_step.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "ddim_step.safetensors")


def make_scheduler(num_steps=10, **config):
    defaults = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler = DDIMScheduler(**{**defaults, **config})
    scheduler.set_timesteps(num_steps)
    return scheduler


def golden_case(case):
    tensors = {k.split("/")[1]: v for k, v in TENSORS.items() if k.startswith(case["id"] + "/")}
    scheduler = make_scheduler(case["num_inference_steps"], **case["config"])
    assert torch.allclose(scheduler.alphas_cumprod, TENSORS[case["alphas_cumprod_key"]], rtol=1e-6, atol=1e-9)
    good = torch.ones(len(tensors["sample"]), dtype=torch.bool)
    good[case["nonfinite_log_prob_rows"]] = False
    return scheduler, tensors, good


def of_mode(mode):
    return [pytest.param(case, id=f"{case['id']}-{case['name']}") for case in CASES if case["mode"] == mode]


def log_prob_tolerance(t):
    """Per row: the rounding of log_prob grows at t <= 1, where std is tiny."""
    return torch.where(t <= 1, 5e-5, 1e-5)


@pytest.mark.parametrize("case", of_mode("drawn"))
def test_golden_draw(case):
    scheduler, g, good = golden_case(case)
    generator = torch.Generator().manual_seed(case["generator_seed"])
    x_prev, log_prob = ddim_step_with_logprob(
        scheduler,
        g["model_output"],
        g["timestep"],
        g["sample"],
        case["eta"],
        case["use_clipped_model_output"],
        generator,
    )

    expected = g["out_prev_sample"]
    assert x_prev.dtype == expected.dtype and log_prob.dtype == g["out_log_prob"].dtype
    if case["dtype"] in ("float16", "bfloat16"):
        one_unit = torch.finfo(expected.dtype).eps * expected.double().abs().clamp(min=2.0**-14)
        assert ((x_prev.double() - expected.double()).abs() <= one_unit).all()
        # Ours scores the rounded draw, DDPO the unrounded one: the distance is rounding / std, largest at t = 1.
        rounding = torch.finfo(expected.dtype).eps * expected.float().abs().amax()
        allowed = 4 * rounding / ddim_std(scheduler, g["timestep"], case["eta"])
        assert ((log_prob - g["out_log_prob"]).abs() <= allowed).all()
        return
    error = (x_prev - expected).abs() / expected.abs().clamp(min=1)
    cancels = case["config"]["prediction_type"] == "sample"  # x0 against sqrt(1 - a_t) near t = 1
    assert error.max() <= (2e-5 if cancels else 2e-6)
    t = g["timestep"].expand(len(log_prob))
    assert ((log_prob - g["out_log_prob"]).abs() <= log_prob_tolerance(t))[good].all()
    assert not torch.isfinite(log_prob[~good]).any()


@pytest.mark.parametrize("case", of_mode("given"))
def test_golden_score_and_gradient(case):
    scheduler, g, good = golden_case(case)
    output = g["model_output"].clone().requires_grad_(True)
    x_prev, log_prob = ddim_step_with_logprob(
        scheduler,
        output,
        g["timestep"],
        g["sample"],
        case["eta"],
        case["use_clipped_model_output"],
        prev_sample=g["prev_sample"],
    )
    assert torch.equal(x_prev, g["prev_sample"])
    t = g["timestep"].expand(len(log_prob))
    error = (log_prob - g["out_log_prob"]).abs().detach() / g["out_log_prob"].abs().clamp(min=1)
    assert (error <= log_prob_tolerance(t))[good].all()
    assert not torch.isfinite(log_prob[~good]).any()

    (log_prob * g["grad_out_log_prob"]).sum().backward()
    expected = g["grad_model_output"].double().flatten(1)
    largest = expected.abs().amax(dim=1, keepdim=True)
    error = ((output.grad.double().flatten(1) - expected).abs() / largest).amax(dim=1)
    at_end = 2e-3 if case["config"]["prediction_type"] == "sample" else 5e-4
    # In half precision the two parts of the gradient (through x0_hat and eps_hat) are each rounded to the storage type.
    storage = 2 * torch.finfo(output.dtype).eps if output.dtype in (torch.float16, torch.bfloat16) else 0.0
    assert (error <= torch.where(t <= 1, at_end, 1e-5) + storage)[good].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sampling_and_scoring_agree_exactly(dtype):
    scheduler = make_scheduler(10)
    torch.manual_seed(0)
    output, x_t = torch.randn(2, 10, 4, 8, 8).to(dtype)
    x_prev, log_prob = ddim_step_with_logprob(scheduler, output, scheduler.timesteps, x_t, eta=1.0)
    _, log_prob_again = ddim_step_with_logprob(scheduler, output, scheduler.timesteps, x_t, eta=1.0, prev_sample=x_prev)
    assert x_prev.dtype == dtype
    assert torch.equal(log_prob, log_prob_again)  # so the on-policy ratio is exactly 1


def test_log_prob_is_the_mean_of_the_normal_density():
    torch.manual_seed(0)
    x, mean = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean(dim=(1, 2, 3))
    assert torch.allclose(gaussian_log_prob(x, mean, std), expected, rtol=1e-12)


def test_analytic_kl_is_the_expected_log_ratio():
    torch.manual_seed(0)
    mean, reference = torch.randn(2, 1, 4, 8, 8).expand(2, 2000, 4, 8, 8)
    std = torch.full((2000, 1, 1, 1), 0.7)
    x = draw(mean, std)
    log_ratio = gaussian_log_prob(x, mean, std) - gaussian_log_prob(x, reference, std)
    kl = analytic_kl(mean, reference, std)
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(m, 0.7) for m in (mean[0], reference[0]))
    )
    assert kl.shape == (2000,) and torch.allclose(kl[0], divergence.mean(), rtol=1e-5)
    assert abs(log_ratio.mean() - kl[0]) < 4 * log_ratio.std() / 2000**0.5


def test_ddim_std_matches_the_step_and_keeps_the_shape():
    scheduler = make_scheduler(8)
    x = torch.zeros(8, 4, 2, 2)
    std = ddim_std(scheduler, scheduler.timesteps, eta=0.3)
    assert torch.allclose(std, ddim_mean_std(scheduler, x, scheduler.timesteps, x, eta=0.3)[1].flatten())
    assert ddim_std(scheduler, torch.tensor([[1, 126], [251, 376]]), 1.0).shape == (2, 2)
    assert ddim_std(scheduler, 1, 1.0).shape == () and ddim_std(scheduler, 1, 1.0) > 0
    assert (std.diff() < 0).all()


def test_a_shared_timestep_equals_one_per_sample():
    scheduler = make_scheduler(8)
    torch.manual_seed(0)
    output, x_t, x_prev = torch.randn(3, 3, 4, 4, 4)
    scores = [
        ddim_step_with_logprob(scheduler, output, t, x_t, 1.0, prev_sample=x_prev)[1]
        for t in (251, torch.tensor(251), torch.tensor([251]), torch.full((3,), 251))
    ]
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_the_alpha_table_follows_the_latents_once():
    scheduler = make_scheduler(8)
    x = torch.zeros(1, 4, 2, 2, device="meta")
    ddim_mean_std(scheduler, x, torch.tensor([1], device="meta"), x, eta=1.0)
    table = scheduler.alphas_cumprod
    ddim_mean_std(scheduler, x, torch.tensor([1], device="meta"), x, eta=1.0)
    assert table.device.type == "meta" and scheduler.alphas_cumprod is table


def test_zero_terminal_snr_does_not_break_the_mean():
    scheduler = make_scheduler(
        50, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0
    )
    torch.manual_seed(0)
    output, x_t = torch.randn(2, 50, 4, 4, 4)
    _, log_prob = ddim_step_with_logprob(scheduler, output, scheduler.timesteps, x_t, eta=1.0)
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize("config", [dict(steps_offset=0), dict(timestep_spacing="linspace")])
def test_check_scheduler_refuses_a_last_timestep_of_zero(config):
    with pytest.raises(ValueError, match="set steps_offset = 1"):
        check_scheduler(make_scheduler(**config))


def test_check_scheduler_accepts_good_schedules_and_wants_timesteps():
    check_scheduler(make_scheduler())
    check_scheduler(make_scheduler(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="set_timesteps"):
        check_scheduler(DDIMScheduler())


def test_wrong_arguments_are_refused():
    scheduler = make_scheduler()
    x = torch.zeros(3, 4, 2, 2)
    with pytest.raises(ValueError, match="both generator and prev_sample"):
        ddim_step_with_logprob(scheduler, x, 1, x, 1.0, generator=torch.Generator(), prev_sample=x)
    with pytest.raises(ValueError, match="timestep has 2 elements"):
        ddim_step_with_logprob(scheduler, x, torch.tensor([1, 101]), x, 1.0)
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type is 'score'"):
        ddim_step_with_logprob(scheduler, x, 1, x, 1.0)
