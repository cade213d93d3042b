"""Per-prompt statistics against the published tracker's numbers, and saving, loading and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpo.stat_tracking import PerPromptStatTracker

SEQUENCES = json.loads((Path(__file__).parent / "golden" / "stat_tracking.json").read_text())["sequences"]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_golden_sequences(sequence):
    tracker = PerPromptStatTracker(sequence["buffer_size"], sequence["min_count"])
    tolerance = 1e-12 if sequence["values_dtype"] == "float64" else 1e-5
    for update in sequence["updates"]:
        values = np.array(update["values"], dtype=sequence["values_dtype"])
        normalised = tracker.update(update["prompts"], values)
        expected = np.array(update["advantages"])
        assert normalised.dtype == update["advantages_dtype"]
        if "constant" in sequence.get("note", ""):
            tolerance = 1e-3  # a std of rounding errors only
        assert (np.abs(normalised - expected) <= tolerance * np.maximum(1, np.abs(expected))).all()
        stats = tracker.get_stats()
        assert stats.keys() == update["stats_after"].keys()
        for prompt, expected_stats in update["stats_after"].items():
            assert stats[prompt]["count"] == expected_stats["count"]
            for key in ("mean", "std"):
                assert stats[prompt][key] == pytest.approx(expected_stats[key], rel=1e-5, abs=1e-7)


def test_a_saved_tracker_goes_on_exactly():
    rng = np.random.default_rng(0)
    prompts = ["a chair", "a corgi"] * 4
    first, second = rng.normal(size=(2, 8)).astype(np.float32)
    tracker = PerPromptStatTracker(6, 2)
    tracker.update(prompts, first)
    restored = PerPromptStatTracker(6, 2)
    restored.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert (restored.update(prompts, second) == tracker.update(prompts, second)).all()
    assert restored.get_stats() == tracker.get_stats()


def test_a_saved_state_does_not_change_with_the_tracker():
    tracker = PerPromptStatTracker(4, 1)
    tracker.update(["a"], [1.0])
    state = tracker.state_dict()
    tracker.update(["a"], [2.0])
    assert state == {"history": {"a": [1.0]}}


def test_a_smaller_buffer_keeps_the_newest_values():
    tracker = PerPromptStatTracker(4, 1)
    tracker.update(["a"] * 4, [1.0, 2.0, 3.0, 4.0])
    smaller = PerPromptStatTracker(2, 1)
    smaller.load_state_dict(tracker.state_dict())
    assert smaller.state_dict() == {"history": {"a": [3.0, 4.0]}}


def test_takes_tensors():
    assert PerPromptStatTracker(4, 1).update(["a", "a"], torch.tensor([1.0, 3.0])) == pytest.approx([-1, 1], abs=1e-5)


def test_bad_values_are_refused_and_leave_no_trace():
    tracker = PerPromptStatTracker(4, 1)
    with pytest.raises(ValueError, match="prompt 'b'"):
        tracker.update(["a", "b"], [1.0, float("nan")])
    with pytest.raises(ValueError, match="give one value per prompt"):
        tracker.update(["a", "b"], [1.0])
    assert tracker.get_stats() == {}
    with pytest.raises(ValueError, match="buffer_size is 0"):
        PerPromptStatTracker(0, 1)
