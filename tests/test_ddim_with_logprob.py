"""The DDIM step: 72 golden cases of DDPO's step, and what they cannot say (rounding, KL, refused schedulers)."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

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
HALF = (torch.float16, torch.bfloat16)
UNIT = torch.finfo(torch.float32).eps / 2  # the largest relative error of one rounding to float32
ROUNDINGS = 8


def make_scheduler(num_steps=10, **config):
    defaults = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler = DDIMScheduler(**{**defaults, **config})
    scheduler.set_timesteps(num_steps)
    return scheduler


def golden_case(case):
    """The scheduler of a golden case, the case's tensors, and its rows with a finite log-probability."""
    tensors = {k.split("/")[1]: v for k, v in TENSORS.items() if k.startswith(case["id"] + "/")}
    scheduler = make_scheduler(case["num_inference_steps"], **case["config"])
    table = TENSORS[case["alphas_cumprod_key"]]
    # An entry is a product of t + 1 rounded factors: a rounding for each, and one for each multiplication. (Rescaling
    # to zero SNR subtracts close numbers near t = 998, which magnifies a few roundings 170-fold: less than these.)
    roundings = 2 * torch.arange(1, len(table) + 1)
    assert ((scheduler.alphas_cumprod - table).abs() <= roundings * UNIT * table).all()
    # The stock table differs between CPUs in its last bits, which 1 - a_t / a_prev would magnify a thousandfold.
    scheduler.alphas_cumprod = table
    good = torch.ones(len(tensors["sample"]), dtype=torch.bool)
    good[case["nonfinite_log_prob_rows"]] = False
    return scheduler, tensors, good


def of_mode(mode):
    return [pytest.param(case, id=f"{case['id']}-{case['name']}") for case in CASES if case["mode"] == mode]


def float64_step(case, scheduler, g, prev_sample, nudge=lambda values: values):
    """The step on the inputs of a golden case in float64: the x_{t-1} that its noise draws (the mean if it has none),
    the log-probability of `prev_sample`, the gradient of its weighted sum, and the Gaussian.

    nudge: applied to every input."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.alphas_cumprod = nudge(scheduler.alphas_cumprod.double())
    output, x_t, x_prev = (nudge(x.double()) for x in (g["model_output"], g["sample"], prev_sample))
    arguments = output.requires_grad_(True), g["timestep"], x_t, case["eta"], case["use_clipped_model_output"]
    mean, std = ddim_mean_std(scheduler, *arguments)
    _, log_prob = ddim_step_with_logprob(scheduler, *arguments, prev_sample=x_prev)
    weight = g.get("grad_out_log_prob", torch.ones(len(mean))).double()
    (gradient,) = torch.autograd.grad((log_prob * weight).sum(), output)
    x = mean + std * g.get("variance_noise", torch.zeros(())).double()
    return SimpleNamespace(x=x.detach(), log_prob=log_prob.detach(), gradient=gradient, mean=mean.detach(), std=std)


def largest(values):
    """Per sample: the largest absolute value, (B,)."""
    return values.abs().reshape(len(values), -1).amax(dim=1)


def float32_error(name, exact, case, scheduler, g, prev_sample):
    """How far float32 arithmetic may bring the result `name` of the `float64_step` `exact` from its value: (B,).

    The condition of the step decides, not a CPU: how far the result moves when every input is off by one rounding, up
    or down, and by a rounding of its own. The step rounds about 20 times; errors of random sign grow like the root of
    their number, and ROUNDINGS is twice that root."""
    value = getattr(exact, name)
    moved = torch.zeros(len(prev_sample), dtype=torch.float64)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)

        def nudge(x, generator=generator):
            return x * (1 + UNIT * (2 * torch.randint(2, x.shape, generator=generator) - 1))

        nudged = float64_step(case, scheduler, g, prev_sample, nudge)
        moved = torch.maximum(moved, largest(getattr(nudged, name) - value))
    own = UNIT * largest(value)
    if name == "gradient" and case["config"]["thresholding"]:
        # all elements send a gradient to the quantile; those of clipped ones cancel, but their roundings do not
        own = own * value[0].numel()
    return ROUNDINGS * (moved + own)


def golden_error(t, at_end, before):
    """The golden file's own float32 rounding, (B,): what separates it from float64 arithmetic, on every machine.

    at_end, before: for t <= 1, where 1 - a_t / a_prev keeps four digits only, and above: the largest in any case as the
    test says, rounded up."""
    return torch.where(t <= 1, at_end, before).double()


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
    t = g["timestep"].expand(len(log_prob))
    exact = float64_step(case, scheduler, g, x_prev)
    unit_of_storage = torch.finfo(x_prev.dtype).eps * exact.x.abs() if x_prev.dtype in HALF else 0.0

    # Measured: 1.4e-5 and 3.9e-7, besides the golden draw's rounding to the storage type in half precision.
    error = ((expected.double() - exact.x).abs() - unit_of_storage / 2) / exact.x.abs().clamp(min=1)
    assert (error.flatten(1).amax(dim=1) <= golden_error(t, 2e-5, 1e-6)).all()
    # Measured: 1.4e-5 and 5.0e-7. DDPO scores its draw before that is rounded to the storage type.
    unrounded = gaussian_log_prob(exact.x, exact.mean, exact.std)
    error = (g["out_log_prob"] - unrounded).abs() / unrounded.abs().clamp(min=1)
    assert (error <= golden_error(t, 3e-5, 1e-6))[good].all()

    # The vector instructions of a CPU decide the last bits of a normal number: two kinds differed by up to 2.3e-6 in a
    # million of them. A draw in half precision may then round to the storage type's next number.
    allowed = float32_error("x", exact, case, scheduler, g, x_prev) + 5e-6 * exact.std.flatten()
    error = (x_prev.double() - exact.x).abs() - unit_of_storage
    assert (error.flatten(1).amax(dim=1) <= allowed).all()
    # Here the score is that of the stored number, whatever its type.
    allowed = float32_error("log_prob", exact, case, scheduler, g, x_prev)
    assert ((log_prob - exact.log_prob).abs() <= allowed)[good].all()
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
    exact = float64_step(case, scheduler, g, x_prev)
    # Measured: 1.8e-5 and 2.6e-7.
    error = (g["out_log_prob"] - exact.log_prob).abs() / exact.log_prob.abs().clamp(min=1)
    assert (error <= golden_error(t, 3e-5, 5e-7))[good].all()
    allowed = float32_error("log_prob", exact, case, scheduler, g, x_prev)
    assert ((log_prob - exact.log_prob).abs() <= allowed)[good].all()
    assert not torch.isfinite(log_prob[~good]).any()

    (log_prob * g["grad_out_log_prob"]).sum().backward()
    size = largest(exact.gradient)
    eps = torch.finfo(output.dtype).eps if output.dtype in HALF else 0.0
    # Measured: 1.2e-3 and 7.3e-6. In half precision DDPO rounds each of the gradient's two parts (through x0_hat and
    # eps_hat) to the storage type, and their sum: 1.3 units of it were measured.
    error = largest(g["grad_model_output"].double() - exact.gradient) / size
    assert (error <= golden_error(t, 2e-3, 1e-5) + 2 * eps)[good].all()
    # Here the gradient is rounded to the storage type once, by half a unit.
    allowed = float32_error("gradient", exact, case, scheduler, g, x_prev) + eps / 2 * size
    assert (largest(output.grad.double() - exact.gradient) <= allowed)[good].all()


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
    # 100 float64 terms of one sign: 1e-14 if every rounding were the largest and in one direction, and some room
    assert torch.allclose(gaussian_log_prob(x, mean, std), expected, rtol=1e-13, atol=0)


def test_an_action_has_no_gradient():
    action, mean = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    gaussian_log_prob(action + 1, mean, torch.ones(2, 1)).sum().backward()
    assert action.grad is None and (mean.grad == 1 / 3).all()


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
    # 256 positive terms: each of the two sums rounds 255 times at most
    assert kl.shape == (2000,) and torch.allclose(kl[0], divergence.mean(), rtol=2 * 256 * UNIT, atol=0)
    # four standard errors; with the seed fixed the draws differ between machines in their last bits only
    assert abs(log_ratio.mean() - kl[0]) < 4 * log_ratio.std() / 2000**0.5


def test_ddim_std_matches_the_step_and_keeps_the_shape():
    scheduler = make_scheduler(8)
    x = torch.zeros(8, 4, 2, 2)
    std = ddim_std(scheduler, scheduler.timesteps, eta=0.3)
    # eta inside the root or before it: three roundings each
    of_step = ddim_mean_std(scheduler, x, scheduler.timesteps, x, eta=0.3)[1].flatten()
    assert torch.allclose(std, of_step, rtol=6 * UNIT, atol=0)
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
    # the same arithmetic, but a logarithm's last bit may depend on how many are taken at once
    assert all(torch.allclose(score, scores[0], rtol=4 * UNIT, atol=0) for score in scores)


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
