"""Prompt files, drawing from them, and the resumable curation."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import base
from prompts import curate
from prompts.curate import score_all, write_ranking
from prompts.dataset import PromptDataset, load_prompts

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"


@pytest.fixture
def dataset(tmp_path):
    for name, prompts in (("train", "a cup\n\n  a hat \na dog\n"), ("val", "a cat\n"), ("test", "a bus\na car\n")):
        (tmp_path / f"{name}.txt").write_text(prompts)
    return PromptDataset(tmp_path / "train.txt", tmp_path / "val.txt", tmp_path / "test.txt")


def test_shipped_prompts_are_disjoint_and_complete():
    sets = {name: load_prompts(PROMPTS / f"{name}.txt") for name in ("train_candidates", "validation", "test")}
    assert [len(prompts) for prompts in sets.values()] == [100, 24, 60]
    everything = [prompt.lower() for prompts in sets.values() for prompt in prompts]
    assert len(set(everything)) == len(everything)


def test_text_is_stripped_and_blank_lines_skipped(dataset):
    assert dataset.train_set == ["a cup", "a hat", "a dog"]
    assert (dataset.val_set, dataset.test_set) == (["a cat"], ["a bus", "a car"])


def test_json_library_and_plain_list(tmp_path):
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"dreamfusion": ["a bear", "a boat"], "other": ["no"]}))
    assert load_prompts(library) == ["a bear", "a boat"]
    library.write_text(json.dumps(["a bear"]))
    assert load_prompts(library) == ["a bear"]


@pytest.mark.parametrize(
    "content, match",
    [
        ("{", "is not JSON"),
        ('{"magic": []}', "not 'dreamfusion'"),
        ('{"dreamfusion": [1]}', "list of texts"),
        ("[]", "has no prompts"),
    ],
)
def test_broken_json_is_refused(tmp_path, content, match):
    (tmp_path / "library.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        load_prompts(tmp_path / "library.json")


def test_missing_dreamfusion_prompts_say_where_to_put_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="put your copy at prompts/dreamfusion_415.txt .*prompt_library.json"):
        load_prompts(tmp_path / "dreamfusion_415.txt")


def test_num_train_takes_the_top_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    files = [tmp_path / "a.txt"] * 3
    assert PromptDataset(*files, num_train=2).train_set == ["one", "two"]
    with pytest.raises(ValueError, match="has 3 prompts, fewer than num_train = 4"):
        PromptDataset(*files, num_train=4)


def test_repeated_training_prompts_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\none\n")
    with pytest.raises(ValueError, match="prompt 3 repeats prompt 1, 'one'"):
        PromptDataset(*[tmp_path / "a.txt"] * 3)


def test_sampling_follows_the_generator(dataset):
    first, ids = dataset.sample(50, torch.Generator().manual_seed(1))
    again, _ = dataset.sample(50, torch.Generator().manual_seed(1))
    assert first == again == [dataset.train_set[index] for index in ids]
    assert set(ids.tolist()) == {0, 1, 2} and ids.dtype == torch.int64 and ids.shape == (50,)


def test_fill_epoch_goes_through_the_list_in_order(dataset):
    prompts, ids = dataset.fill_epoch(min_count=2, batch=4)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]  # two more make the second batch of 4 whole
    assert prompts[2] == "a hat"
    _, ids = dataset.fill_epoch(min_count=1, batch=2, at_least=8)
    assert ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_published_fill_epoch_is_one_ordinary_epoch():
    files = [PROMPTS / "train_candidates.txt", PROMPTS / "validation.txt", PROMPTS / "test.txt"]
    _, ids = PromptDataset(*files, num_train=30).fill_epoch(min_count=25, batch=8 * 48, at_least=768)
    counts = torch.bincount(ids)
    assert len(ids) == 768 and len(counts) == 30 and counts.min() == 25


###### Curation ######


REWARDS = {"a cup": [-0.1, -0.2], "a hat": [-0.5, -0.4], "a dog": [-0.3, -0.3]}


def test_ranking_keeps_the_lowest_mean(tmp_path):
    results = score_all(list(REWARDS), lambda index, prompt: REWARDS[prompt], tmp_path / "r.jsonl", {"seed": 1})
    assert write_ranking(results, tmp_path, keep=2) == ["a hat", "a dog"]
    assert (tmp_path / "kept.txt").read_text() == "a hat\na dog\n"
    rows = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert [(row["prompt"], row["kept"]) for row in rows] == [("a hat", "1"), ("a dog", "1"), ("a cup", "0")]
    assert float(rows[0]["mean_reward"]) == pytest.approx(-0.45)
    with pytest.raises(ValueError, match="--keep is 4"):
        write_ranking(results, tmp_path, keep=4)


def test_an_interrupted_curation_goes_on_where_it_was(tmp_path):
    file, calls = tmp_path / "r.jsonl", []

    def score(index, prompt):
        if prompt == "a dog" and not calls.count("a dog"):
            calls.append(prompt)
            raise KeyboardInterrupt
        calls.append(prompt)
        return REWARDS[prompt]

    with pytest.raises(KeyboardInterrupt):
        score_all(list(REWARDS), score, file, {"seed": 1})
    with file.open("a") as half:
        half.write('{"prompt": "a do')  # killed while writing
    assert score_all(list(REWARDS), score, file, {"seed": 1}) == REWARDS
    assert calls == ["a cup", "a hat", "a dog", "a dog"]
    assert len(file.read_text().splitlines()) == 4


def test_results_of_other_settings_and_damaged_ones_are_refused(tmp_path):
    file = tmp_path / "r.jsonl"
    score_all(["a cup"], lambda index, prompt: [0.0], file, {"seed": 1, "steps": 8})
    with pytest.raises(ValueError, match="other settings .seed.: remove it"):
        score_all(["a cup"], lambda index, prompt: [0.0], file, {"seed": 2, "steps": 8})
    file.write_text("nonsense\n")
    with pytest.raises(ValueError, match="is damaged"):
        score_all(["a cup"], lambda index, prompt: [0.0], file, {"seed": 1})


def test_the_command_trains_on_what_it_kept(tmp_path, monkeypatch):
    candidates = tmp_path / "candidates.txt"
    candidates.write_text("".join(f"{prompt}\n" for prompt in REWARDS))
    config = base.get_config()
    config.pretrained.model, config.reward_fn, config.mixed_precision = "someone/painter", "jpeg_compressibility", "no"
    monkeypatch.setattr(curate, "_painter_score", lambda config, samples: lambda index, prompt: REWARDS[prompt])
    out = tmp_path / "curated"
    curate.main(SimpleNamespace(config=config, out=str(out), candidates=str(candidates), samples=2, keep=1))
    assert load_prompts(out / "kept.txt") == ["a hat"]
    with pytest.raises(ValueError, match="--keep is 4 but .* has 3 prompts"):
        curate.main(SimpleNamespace(config=config, out=str(out), candidates=str(candidates), samples=2, keep=4))


def test_unrankable_rewards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be ranked"):
        score_all(["a cup"], lambda index, prompt: [float("nan")], tmp_path / "r.jsonl", {})
