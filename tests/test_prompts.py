"""Prompt files, and drawing from them."""

import json
from pathlib import Path

import pytest
import torch

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
