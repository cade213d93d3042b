"""What a run does with its configuration and its seed: its own stages, in this process, on models of a few thousand
weights."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpo.sampling
import ddpo.update
from carve3d_train import Run
from config import base
from config.batches import gradients_while_painting
from config.validate import validate
from ddpo.advantages import epoch_advantages
from ddpo.calibration import trajectory_means
from ddpo.checkpoint import checkpoints, load_run
from ddpo.sampling import collect_samples, gather_uneven_scores, local_slice, make_generator
from ddpo.stat_tracking import make_trackers
from ddpo.update import micro_batch_losses
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.loading import load_painter, make_trainable
from diffusers_patch.rollout import rollout
from mrc.mrc import score_views
from mrc.rewards import ImageResult, load_mrc, load_reward
from tests.tiny_models import make_mvdream, make_world, settings


def config_of(world, logdir, **changes):
    """The configuration of a run of seconds, checked."""
    config = base.get_config()
    config.update_from_flattened_dict(settings(world, logdir, **changes))
    return validate(config, 1)


def brightness(views, prompts):
    """A reward that is computed in no time."""
    shape = views.shape[:2]
    return ImageResult(views.mean((1, 2, 3, 4)), torch.ones(shape), torch.zeros(shape, dtype=torch.bool))


def bright_run(world, logdir, **changes):
    """A run that wants bright pictures and validates nothing."""
    run = Run(config_of(world, logdir, reward_fn="jpeg_compressibility", recon__checkpoint="", **changes))
    run.reward_fn = brightness
    return run


def painted(config, prompts, policy=None):
    """`Samples` of the painter of `config`, one noise for each prompt."""
    policy = policy or load_painter(config, "cpu")
    generators = [make_generator(0, 0, i) for i in range(len(prompts))]
    return policy, collect_samples(policy, brightness, prompts, generators, config, score_reference=False)


def moved(policy, seed=0):
    """The policy with its LoRA away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("while_painting", [True, False])
def test_an_update_makes_good_samples_likelier_than_bad_ones(world, tmp_path, while_painting):
    """sum A dlog p > 0 for a small step, with advantages that are computed here."""
    changes = dict(train__gradients_while_painting=while_painting, kl_penalty=False, kl_in_reward=False, log_kl=False)
    run = bright_run(world, tmp_path, kl_per_prompt_stat_tracking=False, train__learning_rate=3e-4, **changes)
    run.config.per_prompt_stat_tracking, run.trackers["reward"] = None, None
    painted, collect = [], run.collect_samples
    run.collect_samples = lambda *args, **kwargs: painted.append(collect(*args, **kwargs)) or painted[-1]
    for epoch in range(2):
        run.epoch(epoch)
    samples = painted[1]
    reward = samples.reward
    advantages = (reward - reward.mean()) / reward.std(unbiased=False)
    steps = torch.arange(run.config.sample.num_steps).expand(len(reward), -1)
    with torch.no_grad():
        new = []
        for row in range(len(reward)):
            part = samples.trajectory.take(torch.tensor([row])).transitions(steps[:1])
            output = run.policy.predict(
                part.latents, part.timesteps, part.conditioning, run.config.sample.guidance_scale
            )
            mean, std = ddim_mean_std(run.policy.scheduler, output, part.timesteps, part.latents, 1.0)
            density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(part.next_latents)
            new.append(density.flatten(1).mean(1))
    change = (torch.stack(new) - samples.trajectory.log_probs).sum(1)
    assert advantages @ change > 1e-3  # rounding is 1e-6


def test_the_first_epoch_learns_nothing_and_a_spent_kl_ends_the_run(world, tmp_path):
    run = bright_run(world, tmp_path, stop_kl=1e-3)
    before = [p.detach().clone() for p in run.policy.trainable_parameters()]
    run.epoch(0)
    assert all(torch.equal(p, old) for p, old in zip(run.policy.trainable_parameters(), before, strict=True))
    assert run.trackers["reward"].get_stats() and not run.finished
    run.epoch(1)
    assert not all(torch.equal(p, old) for p, old in zip(run.policy.trainable_parameters(), before, strict=True))
    run.kl = 0.9e-3
    assert not run.finished
    run.kl = 1.1e-3
    assert run.finished


def test_gradients_are_taken_while_painting_only_where_an_epoch_has_one_update(world, tmp_path):
    assert gradients_while_painting(config_of(world, tmp_path))
    for changes in (
        dict(train__total_batch_size=4),
        dict(train__num_inner_epochs=2),
        dict(use_lora=False),
        dict(kl_in_reward=False, kl_per_prompt_stat_tracking=False),
        dict(train__gradients_while_painting=False),
    ):
        assert not gradients_while_painting(config_of(world, tmp_path, **changes)), changes


# -- randomness --------------------------------------------------------------------------------------------------------


def randomness(world, logdir, monkeypatch, **changes):
    """What three epochs drew: (prompts, first latents, order of the samples in the update) of each; first LoRA."""
    run = bright_run(world, logdir, train__gradients_while_painting=False, train__learning_rate=1e-12, **changes)
    lora = torch.cat([p.detach().flatten() for p in run.policy.trainable_parameters()])
    prompts, latents, orders, collect = [], [], [], run.collect_samples

    def collecting(reward_fn, captions, *args, **kwargs):
        samples = collect(reward_fn, captions, *args, **kwargs)
        prompts.append(tuple(captions))
        latents.append(samples.trajectory.latents[:, 0])
        return samples

    def shuffling(*args):
        passes = list(shuffled(*args))
        orders.append(tuple(torch.cat([index for part in passes for index, _ in part]).tolist()))
        return passes

    run.collect_samples, shuffled = collecting, ddpo.update.shuffled_micro_batches
    with monkeypatch.context() as patch:
        patch.setattr(ddpo.update, "shuffled_micro_batches", shuffling)
        for epoch in range(3):
            run.epoch(epoch)
    return prompts, latents, orders, lora


def test_random_numbers_follow_from_seed_and_epoch(world, tmp_path, monkeypatch):
    prompts, latents, orders, lora = randomness(world, tmp_path / "a", monkeypatch)
    assert len(set(prompts[1:])) == len(set(orders)) == 2
    rows = torch.cat(latents).flatten(1)  # no two samples of a run start alike
    assert torch.cdist(rows, rows).fill_diagonal_(torch.inf).min() > 1
    again = randomness(world, tmp_path / "b", monkeypatch)
    assert again[0] == prompts and again[2] == orders and torch.equal(again[3], lora)
    assert torch.equal(torch.cat(again[1]), torch.cat(latents))
    other = randomness(world, tmp_path / "c", monkeypatch, seed=43)
    assert other[0][0] == prompts[0] and other[0][1:] != prompts[1:]  # the first epoch fills the trackers
    assert other[2] != orders and not torch.equal(other[3], lora)
    assert not any(torch.equal(a, b) for a, b in zip(other[1], latents, strict=True))


def test_validations_have_the_same_noise_in_every_run_and_each_prompt_its_own(world, tmp_path):
    latents = []
    for seed in (1, 2):
        run = bright_run(world, tmp_path / str(seed), seed=seed)
        collect = run.collect_samples

        def collecting(*args, collect=collect, **kwargs):
            samples = collect(*args, **kwargs)
            latents.append(samples.trajectory.latents[:, 0])
            return samples

        run.collect_samples = collecting
        run.validation()
        run.epochs_done = 1
        run.validation()
    assert all(torch.equal(latents[0], other) for other in latents[1:])
    rows = latents[0].flatten(1)
    assert torch.cdist(rows, rows).fill_diagonal_(torch.inf).min() > 1


def test_every_purpose_has_random_numbers_of_its_own():
    streams = [(seed, purpose, epoch) for seed in (0, 1) for purpose in range(8) for epoch in (0, 1)]
    firsts = {float(torch.rand((), generator=make_generator(*stream), dtype=torch.float64)) for stream in streams}
    assert len(firsts) == len(streams)


def test_processes_share_an_epoch_without_overlap():
    ranks = [SimpleNamespace(process_index=rank, num_processes=3) for rank in range(3)]
    assert [i for rank in ranks for i in range(12)[local_slice(12, rank)]] == list(range(12))


def test_uneven_scores_are_put_in_order(monkeypatch):
    mine = SimpleNamespace(scores=lambda: {"reward": torch.tensor([0.0, 2.0])})
    monkeypatch.setattr(ddpo.sampling, "gather_object", lambda rows: [*rows, (1, {"reward": np.float32(1)})])
    assert gather_uneven_scores(mine, [0, 2])["reward"].tolist() == [0, 1, 2]


# -- painting ----------------------------------------------------------------------------------------------------------


def test_the_suffix_is_painted_but_not_judged(world, tmp_path):
    plain, suffixed = (config_of(world, tmp_path, sample__prompt_suffix=suffix) for suffix in ("", ", white"))
    heard = []

    def listening(views, prompts):
        heard.extend(prompts)
        return brightness(views, prompts)

    policy, by_hand = painted(plain, ["a red cube, white"])
    generators = [make_generator(0, 0, 0)]
    by_key = collect_samples(policy, listening, ["a red cube"], generators, suffixed, score_reference=False)
    assert torch.equal(by_key.trajectory.latents, by_hand.trajectory.latents) and heard == ["a red cube"]
    _, without = painted(plain, ["a red cube"], policy)
    assert not torch.equal(by_key.trajectory.latents, without.trajectory.latents)


def test_the_noise_of_every_step_is_as_strong_as_eta_says(world, tmp_path):
    """In painting, in the ratios of an update, and in the KL by which a step is calibrated."""
    config = config_of(world, tmp_path, sample__eta=0.5, train__gradients_while_painting=False)
    policy, samples = painted(config, ["a red cube", "a blue sphere", "a green cone"])
    trajectory, steps = samples.trajectory, torch.arange(4).expand(3, -1)
    part = trajectory.transitions(steps)
    with torch.no_grad():
        output = policy.predict(part.latents, part.timesteps, part.conditioning, config.sample.guidance_scale)
    mean, std = ddim_mean_std(policy.scheduler, output, part.timesteps, part.latents, 0.5)
    noise = (part.next_latents - mean) / std
    assert noise.square().mean() == pytest.approx(1, abs=0.1)  # 3072 numbers: a standard error of 0.026
    make_trainable(policy, config)
    losses = micro_batch_losses(policy, trajectory, torch.ones(3), steps, config)
    assert all(abs(info["ratio_max"] - 1) <= 1e-5 for _, info in losses)
    stds = [trajectory_means(policy, trajectory, torch.tensor([0]), config)[1]]
    config.sample.eta = 1.0
    stds.append(trajectory_means(policy, trajectory, torch.tensor([0]), config)[1])
    assert torch.allclose(2 * stds[0], stds[1])


@pytest.mark.parametrize("painter", ["mv_sdxl", "mvdream"])
def test_guidance_is_rescaled_to_the_contrast_without_it(world, tmp_path, painter):
    """Lin et al. 2023: at 1 the prediction has the standard deviation of the conditional one."""
    changes = {}
    if painter == "mvdream":
        changes = dict(painter__name="mvdream", pretrained__model=str(make_mvdream(make_world(tmp_path)) / "mvdream"))
        changes |= dict(painter__elevation=20.0, painter__azimuth_start=315.0)
    config = config_of(world, tmp_path / "logs", sample__guidance_rescale=1.0, **changes)
    policy = load_painter(config, "cpu")
    conditioning, timesteps = policy.encode(["a red cube"]), torch.tensor([801])
    latents = policy.initial_latents(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        guided, plain = (policy.predict(latents, timesteps, conditioning, scale) for scale in (5.0, 1.0))
    assert guided.std() == pytest.approx(float(plain.std()), rel=1e-4) and not torch.allclose(guided, plain)


def test_a_lora_is_fused_into_the_base_model(world, tmp_path):
    """W' = W + B A, and the policy that starts from it is its own reference."""
    config = config_of(world, tmp_path)
    policy = load_painter(config, "cpu")
    plain = {name: value.clone() for name, value in policy.unet.state_dict().items()}
    make_trainable(policy, config)
    moved(policy).save_lora(tmp_path / "lora")
    factors = policy.trainable_state()
    config.pretrained.lora = str(tmp_path / "lora")
    fused = load_painter(config, "cpu").unet.state_dict()
    assert fused.keys() == plain.keys()
    for name in factors:
        if "lora_A" in name:
            weight = name.split(".lora_A")[0] + ".weight"
            product = factors[name.replace("lora_A", "lora_B")] @ factors[name]
            assert torch.allclose(fused[weight], plain[weight] + product, atol=1e-6) and product.abs().max() > 0.01


# -- judging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(bbox_lpips=False), dict(min_foreground=0.2), dict(min_foreground=0.2, empty_view_reward=-3.0)],
)
def test_keys_of_mrc_reach_the_reward(world, tmp_path, changes):
    config = config_of(world, tmp_path, **{f"mrc__{key}": value for key, value in changes.items()})
    views = torch.ones(2, 4, 3, 32, 32)
    views[..., 10:22, 8:24] = torch.rand(2, 4, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    views[1, 2, :, :18] = 1.0  # little is left: 64 pixels of 1024
    found = load_reward(config, "cpu")(views, ["a box"] * 2)
    expected = score_views(views, found.renders, load_mrc(config, "cpu").lpips, **changes)
    assert torch.equal(found.reward, expected.reward) and torch.equal(found.empty, expected.empty)
    if changes:
        assert not torch.equal(found.reward, score_views(views, found.renders, load_mrc(config, "cpu").lpips).reward)


# -- advantages and KL -------------------------------------------------------------------------------------------------

SCORES = {
    "reward": np.array([-0.3, -0.1, -0.4, -0.2, -1.0, -0.6], np.float32),
    "kl": np.array([1.0, 3.0, 2.0, 5.0, 4.0, 3.0], np.float32),
    "empty": np.zeros((6, 4), bool),
    "lpips": np.full((6, 4), 0.3, np.float32),
}
CAPTIONS = ["a", "a", "a", "b", "b", "b"]
EVERYTHING = np.ones(6, bool)


def normalized(values):
    """Each caption's values relative to its three."""
    return np.concatenate([(v - v.mean()) / v.std() for v in (values[:3], values[3:])])


def advantages_of(scores=SCORES, epoch=1, good=EVERYTHING, **changes):
    """(advantages, trackers after them) of two captions with three samples each."""
    config = base.get_config()
    config.per_prompt_stat_tracking.min_count = 1
    config.update_from_flattened_dict(changes)
    trackers = make_trackers(config)
    return epoch_advantages(scores, CAPTIONS, good, trackers, config, epoch).numpy(), trackers


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, normalized(SCORES["reward"]) - 0.2 * normalized(SCORES["kl"])),
        ({"kl_normalized_coeff": 0.5}, normalized(SCORES["reward"]) - 0.5 * normalized(SCORES["kl"])),
        ({"kl_per_prompt_stat_tracking": False}, normalized(SCORES["reward"]) - 0.2 * SCORES["kl"]),
        ({"kl_in_reward": False}, normalized(SCORES["reward"])),
        ({"kl_penalty": False}, normalized(SCORES["reward"])),
    ],
    ids=lambda value: "-".join(value) or "published" if isinstance(value, dict) else "",
)
def test_the_kl_is_weighted_as_its_keys_say(changes, expected):
    found, trackers = advantages_of(**changes)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert trackers["reward"].get_stats()["a"]["mean"] == pytest.approx(SCORES["reward"][:3].mean())
    if changes.get("kl_in_reward") is False:
        assert trackers["kl"] is None  # nobody would read it
    if not changes:
        assert trackers["kl"].get_stats()["b"]["mean"] == pytest.approx(SCORES["kl"][3:].mean())


def test_one_empty_view_is_enough_for_the_worst_advantage():
    empty = SCORES["empty"].copy()
    empty[4, 2] = True
    changes = {"kl_in_reward": False, "train.adv_clip_max": 3.0}
    found, trackers = advantages_of({**SCORES, "empty": empty}, **changes)
    assert found[4] == -3.0 and trackers["reward"].get_stats()["b"]["count"] == 2
    counted, trackers = advantages_of({**SCORES, "empty": empty}, **changes, **{"mrc.empty_in_statistics": True})
    np.testing.assert_allclose(counted, normalized(SCORES["reward"]), atol=1e-4)
    assert trackers["reward"].get_stats()["b"]["count"] == 3
    measured = {name: value for name, value in SCORES.items() if name != "lpips"} | {"empty": empty}
    assert advantages_of(measured, **changes)[0] == pytest.approx(counted)  # of a reward that has no penalty for it


def test_a_control_gives_advantages_to_others_and_to_other_ones_in_every_epoch():
    plain, _ = advantages_of()
    shuffled = [advantages_of(epoch=epoch, shuffle_advantages=True)[0] for epoch in (1, 2)]
    for one in shuffled:
        np.testing.assert_array_equal(np.sort(one), np.sort(plain))
        assert not np.array_equal(one, plain)
    assert not np.array_equal(*shuffled)


def test_a_control_gives_the_nothing_of_bad_samples_to_no_other():
    good = np.array([True, False, True, True, True, False])
    plain, _ = advantages_of(good=good)
    for epoch in range(1, 9):
        shuffled, _ = advantages_of(epoch=epoch, good=good, shuffle_advantages=True)
        assert (shuffled[~good] == 0).all()
        np.testing.assert_array_equal(np.sort(shuffled[good]), np.sort(plain[good]))


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """(configuration, policy away from its reference, its scored trajectory)"""
    config = config_of(world, tmp_path_factory.mktemp("scored"), train__gradients_while_painting=False)
    policy = load_painter(config, "cpu")
    make_trainable(policy, config)
    noise = [make_generator(0, 0, i) for i in range(2)]
    return config, policy, rollout(moved(policy), ["a red cube", "a blue sphere"], 4, 5.0, 1.0, noise, True)


def test_the_kl_is_estimated_as_its_key_says(scored, monkeypatch):
    config, policy, trajectory = scored
    monkeypatch.setattr(ddpo.sampling, "rollout", lambda *args, **kwargs: trajectory)
    estimates = {"log_ratio": trajectory.log_probs - trajectory.log_probs_reference, "analytic": trajectory.kl_analytic}
    config = config.copy_and_resolve_references()
    for name, per_step in estimates.items():
        config.kl_estimator = name
        noise = [None, None]
        found = collect_samples(policy, brightness, ["", ""], noise, config, score_reference=True).kl
        assert torch.allclose(found, per_step.mean(1)) and found.abs().min() > 0


@pytest.mark.parametrize("penalty, in_reward, beta", [(True, False, 0.5), (False, False, 0.5), (True, True, 0.5)])
def test_the_kl_in_the_loss_is_weighted_by_beta(scored, penalty, in_reward, beta):
    config, policy, trajectory = scored
    config = config.copy_and_resolve_references()
    config.kl_penalty, config.kl_in_reward, config.kl_beta = penalty, in_reward, beta
    steps = torch.arange(4).expand(2, -1)
    losses = [float(loss.detach()) for loss, _ in micro_batch_losses(policy, trajectory, torch.zeros(2), steps, config)]
    kl = (trajectory.log_probs - trajectory.log_probs_reference).mean(0)  # advantages of 0 leave the KL alone
    expected = beta * kl if penalty and not in_reward else torch.zeros(4)
    assert losses == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    assert beta * kl.abs().max() > 1e-3


@pytest.mark.parametrize("learning", [False, True])
def test_an_epoch_is_in_memory_once(world, tmp_path, monkeypatch, learning):
    """What was painted batch by batch is not kept until the last: joined then, it would be there twice."""
    run = bright_run(world, tmp_path, sample__batch_size=2, train__batch_size=2)
    painted = []

    def remembered(*args, **kwargs):
        assert sum(part() is not None for part in painted) <= 1 + learning  # of the batch before
        trajectory = rollout(*args, **kwargs)
        painted.extend(map(weakref.ref, (trajectory.latents, trajectory.gradients)[: 1 + learning]))
        return trajectory

    monkeypatch.setattr(ddpo.sampling, "rollout", remembered)
    generators = [make_generator(0, 0, i) for i in range(5)]
    backward = torch.Tensor.backward if learning else None
    samples = run.collect_samples(brightness, ["a red cube"] * 5, generators, backward=backward)
    assert len(painted) == 3 * (1 + learning) and len(samples.trajectory) == 5
    alone = run.collect_samples(brightness, ["a red cube"], [make_generator(0, 0, 4)], backward=backward)
    assert torch.allclose(samples.trajectory.latents[4], alone.trajectory.latents[0], atol=1e-4)
    assert not learning or torch.allclose(samples.gradients[4], alone.gradients[0], atol=1e-4)


def test_the_base_model_is_asked_as_often_as_wanted(world, tmp_path):
    run = bright_run(world, tmp_path, kl_timestep_fraction=0.5)
    moved(run.policy)
    generators = [make_generator(0, 0, i) for i in range(4)]
    arguments = brightness, ["a red cube"] * 4, generators
    samples = run.collect_samples(*arguments, step_generator=torch.Generator().manual_seed(0))
    assert samples.trajectory.log_probs_reference.isnan().sum(1).tolist() == [2] * 4
    assert not run.collect_samples(*arguments).trajectory.log_probs_reference.isnan().any()


@pytest.mark.parametrize("penalty, log", [(True, False), (False, True), (False, False)])
def test_the_base_model_is_asked_where_its_kl_is_wanted(world, tmp_path, penalty, log):
    changes = dict(kl_penalty=penalty, log_kl=log, kl_in_reward=penalty, kl_per_prompt_stat_tracking=penalty)
    run = bright_run(world, tmp_path, **changes)
    samples = run.collect_samples(brightness, ["a red cube"], [make_generator(0, 0)])
    assert (samples.kl is not None) == (penalty or log)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_everything_that_training_changes_is_restored(world, tmp_path):
    """With a loss scaler as on a GPU, and trackers that differ."""
    changed = dict(train__kl_per_update=0.01, train__kl_calibration_updates=2, train__hold_foreground=True)
    run = bright_run(world, tmp_path, **changed)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    moved(run.policy)
    for parameter in run.policy.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.trackers["reward"].update(["a", "b"], [1.0, 2.0])
    run.trackers["kl"].update(["a", "b"], [3.0, 4.0])
    run.area_control.start, run.area_control.growth = {"a": -2.0}, [0.0, 0.125]
    run.calibration.done, run.epochs_done, run.kl = 1, 5, 0.25
    run.save()
    other = bright_run(world, tmp_path / "other", **changed)
    other.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_run(other, checkpoints(run.folder)[-1])
    assert other.accelerator.scaler.get_scale() == 8.0
    assert (other.epochs_done, other.kl, other.calibration.remaining) == (5, 0.25, 1)
    assert {name: tracker.state_dict() for name, tracker in other.trackers.items()} == {
        "reward": {"history": {"a": [1.0], "b": [2.0]}},
        "kl": {"history": {"a": [3.0], "b": [4.0]}},
    }
    assert (other.area_control.start, other.area_control.growth) == ({"a": -2.0}, [0.0, 0.125])
    moments, expected = (one.optimizer.state_dict()["state"] for one in (other, run))
    assert moments[0]["step"] == expected[0]["step"] == 1
    assert all(torch.equal(moments[i]["exp_avg"], expected[i]["exp_avg"]) for i in expected)
    pairs = zip(other.policy.trainable_parameters(), run.policy.trainable_parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
