"""Advantages against the published training script's numbers over several epochs."""

import json
from pathlib import Path

import numpy as np
import pytest

from ddpo.advantages import compute_advantages
from ddpo.stat_tracking import PerPromptStatTracker

VARIANTS = json.loads((Path(__file__).parent / "golden" / "advantages.json").read_text())["variants"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_variants(variant):
    def tracker(on):
        return PerPromptStatTracker(variant["buffer_size"], variant["min_count"]) if on else None

    # the terms are compared too, each with trackers of its own
    together, reward_alone = [tracker(variant["per_prompt_stat_tracking"]) for _ in range(2)]
    kl_together, kl_alone = [tracker(variant["kl_per_prompt_stat_tracking"]) for _ in range(2)]
    for epoch in variant["epochs"]:
        rewards, prompts = np.array(epoch["rewards"], dtype=np.float32), epoch["prompts"]
        kl = np.array(epoch["kl"], dtype=np.float32)
        found = compute_advantages(
            rewards,
            prompts,
            kl if variant["kl_in_reward"] else None,
            together,
            kl_together,
            variant["kl_normalized_coeff"],
        )
        assert found.dtype == np.float32
        terms = {"advantages": found, "reward_advantages": compute_advantages(rewards, prompts, None, reward_alone)}
        terms["advantages_clamped_5"] = found.clip(-5, 5)
        if epoch["kl_normalized"] is not None:
            terms["kl_normalized"] = kl_alone.update(prompts, kl)
        for key, term in terms.items():
            np.testing.assert_allclose(term, epoch[key], atol=1e-5, rtol=1e-5)
        per_process = np.concatenate(epoch["per_process"])  # contiguous slices in rank order
        np.testing.assert_allclose(found, per_process, atol=1e-5, rtol=1e-5)


def test_without_kl_the_advantage_is_the_normalised_reward():
    tracker = PerPromptStatTracker(4, 1)
    assert compute_advantages([1.0, 3.0], ["a", "b"], kl_tracker=tracker) == pytest.approx([-1, 1])
    assert not tracker.get_stats()


def test_bad_values_are_refused_before_any_tracker_changes():
    trackers = PerPromptStatTracker(4, 1), PerPromptStatTracker(4, 1)
    with pytest.raises(ValueError, match="kl holds 1 NaN or infinite values, the first of prompt 'b'"):
        compute_advantages([1.0, 3.0], ["a", "b"], [0.0, float("nan")], *trackers)
    with pytest.raises(ValueError, match="rewards has shape"):
        compute_advantages([1.0], ["a", "b"], [0.0, 1.0], *trackers)
    assert not any(tracker.get_stats() for tracker in trackers)


def test_an_empty_sample_gets_the_worst_advantage_and_spoils_no_statistics():
    prompts, rewards = ["a", "a", "a", "b"], np.array([-0.1, -0.2, -1.0, -0.3], np.float32)
    empty = [False, False, True, False]
    tracker, without = PerPromptStatTracker(8, 1), PerPromptStatTracker(8, 1)
    result = compute_advantages(rewards, prompts, reward_tracker=tracker, empty=empty, worst=-3.0)
    expected = without.update(["a", "a", "b"], rewards[[0, 1, 3]])
    assert result.tolist() == [*expected[:2], -3.0, expected[2]]
    assert tracker.get_stats() == without.get_stats() and tracker.get_stats()["a"]["count"] == 2
    published = compute_advantages(rewards, prompts, reward_tracker=PerPromptStatTracker(8, 1))
    assert np.ptp(published[:2]) < 0.3 * np.ptp(result[:2])  # what one empty sample did to "a"
    batch = compute_advantages(rewards, prompts, empty=empty, worst=-3.0)
    assert batch[2] == -3.0 and batch[[0, 1, 3]].mean() == pytest.approx(0, abs=1e-6)
    assert compute_advantages(rewards, prompts, empty=[True] * 4, worst=-3.0).tolist() == [-3.0] * 4


def test_an_empty_sample_still_pays_for_its_kl():
    kl = np.array([0.0, 2.0], np.float32)
    result = compute_advantages([-0.1, -1.0], ["a", "b"], kl, kl_normalized_coeff=0.5, empty=[False, True], worst=-3.0)
    assert result.tolist() == [0.0, -4.0]
