"""Choosing the training prompts: the ranking, and a curation that can be interrupted."""

import csv
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from config import base
from prompts.dataset import load_prompts
from tests.tiny_models import make_world, settings
from tools import curate_prompts
from tools.curate_prompts import Scores, score_all, write_ranking

REWARDS = {"a cup": [-0.1, -0.2], "a hat": [-0.5, -0.4], "a dog": [-0.3, -0.3]}


def scores(prompt):
    return Scores(REWARDS[prompt], [False, False])


def test_ranking_keeps_the_lowest_mean(tmp_path):
    results = score_all(list(REWARDS), lambda index, prompt: scores(prompt), tmp_path / "r", {"seed": 1})
    assert write_ranking(results, tmp_path, keep=2) == ["a hat", "a dog"]
    assert (tmp_path / "kept.txt").read_text() == "a hat\na dog\n"
    rows = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert [(row["prompt"], row["kept"]) for row in rows] == [("a hat", "1"), ("a dog", "1"), ("a cup", "0")]
    assert float(rows[0]["mean_reward"]) == pytest.approx(-0.45)
    with pytest.raises(ValueError, match="--keep is 4"):
        write_ranking(results, tmp_path, keep=4)


def test_an_interrupted_curation_resumes(tmp_path):
    folder, calls = tmp_path / "r", []
    file = folder / "results_000.jsonl"

    def score(index, prompt):
        if prompt == "a dog" and not calls.count("a dog"):
            calls.append(prompt)
            raise KeyboardInterrupt
        calls.append(prompt)
        return scores(prompt)

    with pytest.raises(KeyboardInterrupt):
        score_all(list(REWARDS), score, folder, {"seed": 1})
    with file.open("a") as half:
        half.write('{"prompt": "a do')  # killed while writing
    assert score_all(list(REWARDS), score, folder, {"seed": 1}) == {prompt: scores(prompt) for prompt in REWARDS}
    assert calls == ["a cup", "a hat", "a dog", "a dog"]
    assert len(file.read_text().splitlines()) == 4


def test_results_of_other_settings_and_damaged_ones_are_refused(tmp_path):
    file = tmp_path / "results_000.jsonl"
    score_all(["a cup"], lambda index, prompt: Scores([0.0], [False]), tmp_path, {"seed": 1, "steps": 8})
    with pytest.raises(ValueError, match="other settings .seed.: remove it"):
        score_all(["a cup"], lambda index, prompt: Scores([0.0], [False]), tmp_path, {"seed": 2, "steps": 8})
    file.write_text("nonsense\n")
    with pytest.raises(ValueError, match="is damaged"):
        score_all(["a cup"], lambda index, prompt: Scores([0.0], [False]), tmp_path, {"seed": 1})


def test_the_command_trains_on_what_it_kept(tmp_path, monkeypatch):
    candidates = tmp_path / "candidates.txt"
    candidates.write_text("".join(f"{prompt}\n" for prompt in REWARDS))
    config = base.get_config()
    config.pretrained.model, config.reward_fn, config.mixed_precision = "someone/painter", "jpeg_compressibility", "no"
    monkeypatch.setattr(
        curate_prompts, "painter_score", lambda config, samples, device: lambda index, prompt: scores(prompt)
    )
    out = tmp_path / "curated"
    curate_prompts.main(SimpleNamespace(config=config, out=str(out), candidates=str(candidates), samples=2, keep=1))
    assert load_prompts(out / "kept.txt") == ["a hat"]
    with pytest.raises(ValueError, match="--keep is 4 but .* has 3 prompts"):
        curate_prompts.main(SimpleNamespace(config=config, out=str(out), candidates=str(candidates), samples=2, keep=4))
    monkeypatch.setattr(curate_prompts, "painter_score", None)  # other settings are refused before models are loaded
    with pytest.raises(ValueError, match="was made with other settings .--samples.: remove it to start again"):
        curate_prompts.main(SimpleNamespace(config=config, out=str(out), candidates=str(candidates), samples=3, keep=1))


def test_candidates_are_given_once(tmp_path):
    (tmp_path / "candidates.txt").write_text("a cup\na hat\na cup\n")
    args = dict(config=base.get_config(), out=str(tmp_path / "out"), samples=1, keep=1)
    with pytest.raises(ValueError, match="has 'a cup' more than once"):
        curate_prompts.main(SimpleNamespace(candidates=str(tmp_path / "candidates.txt"), **args))


def test_a_prompt_may_have_characters_that_end_lines(tmp_path):
    prompt = "a cup\u2028of tea\x85"
    for _ in range(2):  # the second time from the file
        found = score_all([prompt], lambda index, prompt: Scores([-0.5], [False]), tmp_path, {})
        assert found == {prompt: Scores([-0.5], [False])}


def test_samples_are_painted_in_batches(tmp_path):
    """The noise of a sample does not depend on the others, so neither do the rewards."""
    world, found = make_world(tmp_path), []
    for batch in (3, 2):
        config = base.get_config()
        with config.unlocked():
            config.update_from_flattened_dict(settings(world, tmp_path, sample__batch_size=batch))
        found.append(curate_prompts.painter_score(config, 3, torch.device("cpu"))(7, "a red cube"))
    assert found[0].rewards == pytest.approx(found[1].rewards, abs=1e-5) and len(set(found[0].rewards)) == 3
    assert found[0].empty == found[1].empty and len(found[0].empty) == 3


def test_unrankable_rewards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be ranked"):
        score_all(["a cup"], lambda index, prompt: Scores([float("nan")], [False]), tmp_path, {})


def test_samples_that_show_nothing_do_not_count(tmp_path):
    results = {
        "a cup": Scores([-0.3, -1.0], [False, True]),
        "a hat": Scores([-0.4, -0.4], [False, False]),
        "a dog": Scores([-1.0, -1.0], [True, True]),
    }
    assert write_ranking(results, tmp_path, keep=2) == ["a hat", "a cup"]  # by -1.0 the dog and the cup would be kept
    rows = {row["prompt"]: row for row in csv.DictReader((tmp_path / "ranking.csv").open())}
    assert [rows[prompt]["empty"] for prompt in results] == ["1", "0", "2"]
    assert float(rows["a cup"]["mean_reward"]) == pytest.approx(-0.3) and rows["a dog"]["rank"] == "3"


def test_processes_share_the_prompts(tmp_path):
    """Two threads in place of two processes."""
    calls, barrier = {0: [], 1: []}, threading.Barrier(2)

    def run(process):
        def score(index, prompt):
            calls[process].append(prompt)
            return scores(prompt)

        return score_all(list(REWARDS), score, tmp_path, {"seed": 1}, process, 2, barrier.wait)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(run, (0, 1)))
    assert results[0] == results[1] == {prompt: scores(prompt) for prompt in REWARDS}
    assert calls == {0: ["a cup", "a dog"], 1: ["a hat"]}
