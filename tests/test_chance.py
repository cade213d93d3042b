"""The length of a step: what an update foretells for its own samples, beside what shuffled advantages foretell."""

import itertools
import os

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import ddpo.chance
import ddpo.update
from ddpo.chance import FLOOR, WHOLE, beyond_chance, gain_products, momentum_of, share_beyond_chance
from tests import children
from tests.test_training import metrics
from tests.tiny_models import FEW_FILES, settings


@pytest.fixture
def one():
    """All that a process without others needs."""
    return Accelerator(cpu=True)


def samples(signal, seed, count=48, weights=5):
    """Gradients that are noise, advantages of a reward that one weight makes by `signal` of its spread, no momentum."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, weights, generator=generator)
    noise = torch.randn(count, generator=generator)
    return gradients, signal * gradients[:, 0] + (1 - signal**2) ** 0.5 * noise, torch.zeros(weights)


def test_products_are_of_gradients_as_adam_scales_them(one, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 10, generator=generator) * torch.logspace(-6, 0, 10)
    momentum = torch.randn(10, generator=generator)
    square = gradients.double().square().mean(0)
    scaled = gradients.double() / (square + FLOOR * square.mean()).sqrt()
    wanted = scaled @ torch.cat([gradients, momentum[None]]).double().T
    for together in (3, 100):
        monkeypatch.setattr(ddpo.chance, "TOGETHER", together)
        torch.testing.assert_close(gain_products(gradients, momentum, one), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_momentum_is_what_adams_step_has_beside_the_samples(beta):
    """Adam's mean is that of a step along advantages times gradients and momentum."""
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 1))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, betas=(beta, 0.9))
    generator, count = torch.Generator().manual_seed(0), 4
    for _ in range(3):
        total = torch.randn(5, generator=generator)  # over samples, of advantage times gradient
        step = total + momentum_of(optimizer, count)
        ddpo.update.set_gradient(weights, -total / count)
        optimizer.step()
        mean = torch.cat([optimizer.state[weight]["exp_avg"].flatten() for weight in weights])
        torch.testing.assert_close(-(1 - beta) / count * step, mean)
    torch.testing.assert_close(momentum_of(optimizer, count, scale=8.0), 8 * momentum_of(optimizer, count))


def test_chance_is_what_all_shuffles_foretell(monkeypatch):
    """Of five advantages there are 120."""
    monkeypatch.setattr(ddpo.chance, "DEVIATIONS", 0.5)
    generator = torch.Generator().manual_seed(1)
    gradients, momentum = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (5, 1))
    gram, advantages = gradients @ gradients.T, 3 * gradients[:, 0]
    past = (gradients @ momentum.T)[:, 0]
    orders = torch.tensor(list(itertools.permutations(range(5))))
    gains = (advantages[orders] @ gram * advantages[orders]).sum(1) + advantages[orders] @ past
    share = 1 - (gains.mean() + 0.5 * gains.std()) / (advantages @ gram @ advantages + advantages @ past)
    assert 0.1 < share < 0.9
    deviations = (advantages @ gram @ advantages + advantages @ past - gains.mean()) / gains.std()
    found = share_beyond_chance(torch.cat([gram, past[:, None]], 1), advantages)
    assert found == (pytest.approx(float(share), abs=0.03), pytest.approx(float(deviations), rel=0.1))


def test_rewards_that_say_nothing_move_nothing(one):
    found = torch.tensor([beyond_chance(*samples(0.0, seed, weights=50), one) for seed in range(200)])
    nothing, deviations = found.T
    assert nothing.min() == 0 and (nothing > 0).sum() <= 8
    assert abs(deviations.mean()) < 0.25 and 0.8 < deviations.std() < 1.2
    shares = [beyond_chance(*samples(signal, 0), one)[0] for signal in (0.5, 0.7, 0.9)]
    assert 0.03 < shares[0] < shares[1] < shares[2] < 1


def test_a_direction_that_is_confirmed_tells_more(one):
    """One that was found before, and one that these samples speak against."""
    gradients, advantages, momentum = samples(0.5, 0)
    shares = []
    for past in (-20.0, 0.0, 20.0):
        momentum[0] = past
        shares.append(beyond_chance(gradients, advantages, momentum, one)[0])
    assert shares[0] < shares[1] < shares[2]


def test_what_is_found_has_no_unit(one):
    """A loss scaler scales gradients, and advantages are in standard deviations of whatever reward."""
    gradients, advantages, momentum = samples(0.9, 0)
    momentum[0] = 1.0
    found = beyond_chance(gradients, advantages, momentum, one)
    scaled = beyond_chance(2**10 * gradients, 0.1 * advantages, 2**10 * 0.1 * momentum, one)
    assert scaled == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("spoil", [0.0, float("nan"), float("inf")])
def test_nothing_is_beyond_chance_in_gradients_that_are_no_numbers(one, spoil):
    gradients, advantages, momentum = samples(0.9, 0)
    assert beyond_chance(spoil * gradients, advantages, momentum, one) == (0, 0)
    assert beyond_chance(gradients, 0 * advantages, momentum, one) == (0, 0)


def what_a_process_finds(folder, gradients, advantages, momentum, environment):
    """A rank's part of the test below."""
    os.environ.update(environment)
    accelerator = Accelerator(cpu=True)
    with accelerator.split_between_processes(torch.arange(len(advantages))) as mine:
        found = beyond_chance(gradients[mine], advantages[mine], momentum, accelerator)
    save_file({"found": torch.tensor(found)}, folder / f"{accelerator.process_index}.safetensors")


def test_all_processes_find_what_all_samples_say(one, tmp_path):
    given = samples(0.9, 0)
    for rank in children.start_ranks(what_a_process_finds, 2, tmp_path, *given):
        rank.join()
        assert rank.exitcode == 0
    found = [load_file(tmp_path / f"{rank}.safetensors")["found"].tolist() for rank in range(2)]
    assert found[0] == found[1] == pytest.approx(list(beyond_chance(*given, one)), rel=1e-5)


def test_steps_of_a_run_are_as_long_as_their_shares(world, tmp_path):
    """In the real script: by half a step's share, half its rate; by none, no weight moves; and the calibration is of a
    whole step."""
    changes = dict(train__beyond_chance=True, train__kl_per_update=0.01, train__kl_calibration_updates=1, **FEW_FILES)
    for name, lengths in (("some", [0.5, 0.25]), ("none", [0.0, 0.0])):
        values = settings(world, tmp_path, run_name=name, **changes)
        assert children.run(train_with_shares, values, [WHOLE * length for length in lengths]) == 0
    half, later = metrics(tmp_path / "some", "update")
    assert (half["beyond_chance"], later["beyond_chance"]) == (0.5 * WHOLE, 0.25 * WHOLE)
    rate = half["learning_rate"] / 0.5
    factor = min(max((0.01 / (half["kl_of_update"] / 0.5**2)) ** 0.5, 0.1), 10)
    assert half["next_learning_rate"] == pytest.approx(rate * factor)
    assert later["learning_rate"] == pytest.approx(0.25 * rate * factor)
    for update in metrics(tmp_path / "none", "update"):
        assert update["learning_rate"] == 0 and "kl_of_update" not in update
    first, last = (load_file(tmp_path / f"none/checkpoint_000{n}/weights.safetensors") for n in (0, 3))
    assert all(torch.equal(first[name], last[name]) for name in last)


def train_with_shares(values, shares):
    """`children.train`, whose updates are beyond chance by these shares."""
    share = iter(shares)
    ddpo.update.beyond_chance = lambda *of_an_update: (next(share), 3.0)
    children.train(values)
