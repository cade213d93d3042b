"""Checkpoints: what is saved comes back, a half-written one never passes for a whole one, damaged ones are refused."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

import ddpo.checkpoint
from ddpo.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    damage,
    find_checkpoint,
    load_checkpoint,
    remove_later,
    save_checkpoint,
)
from ddpo.run_log import RunLog


def make_optimizer():
    """A parameter after two AdamW steps."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(2):
        parameter.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameter, optimizer


def save(folder, epochs_done, limit=5):
    weights = {"w": torch.full((4,), float(epochs_done))}
    return save_checkpoint(folder, epochs_done, weights, {"state": {}}, {"kl": epochs_done / 7}, limit)


def test_everything_comes_back_exactly(tmp_path):
    parameter, optimizer = make_optimizer()
    state = {"trackers": {"reward": {"history": {"a cube": [0.1, 1 / 3]}}, "kl": None}, "kl": 1e-7 / 3}
    folder = save_checkpoint(tmp_path, 12, {"w": parameter}, optimizer.state_dict(), state, limit=2)
    assert folder == tmp_path / "checkpoint_0012" and damage(folder) is None
    weights, optimizer_state, found = load_checkpoint(folder)
    assert torch.equal(weights["w"], parameter) and found == {"epochs_done": 12, **state}

    other = torch.nn.Parameter(weights["w"].clone())
    resumed = torch.optim.AdamW([other], lr=0.5)
    resumed.load_state_dict(optimizer_state)
    for p, o in ((parameter, optimizer), (other, resumed)):
        p.square().sum().backward()
        o.step()
    assert torch.equal(parameter, other)


def test_old_checkpoints_go_and_order_is_by_number(tmp_path):
    for epochs_done in (998, 9999, 10000):
        save(tmp_path, epochs_done, limit=2)
    (tmp_path / "checkpoint_0003_copy").mkdir()  # the user's own; neither counted nor removed
    (tmp_path / "checkpoint_0004").write_text("a file")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint_9999", "checkpoint_10000"]
    assert find_checkpoint(tmp_path).name == "checkpoint_10000"
    assert find_checkpoint(tmp_path / "checkpoint_9999").name == "checkpoint_9999"
    assert (tmp_path / "checkpoint_0003_copy").is_dir()


@pytest.mark.parametrize("moment", ["save_file", "torch.save", "_fingerprint", "os.replace", "_remove"])
def test_an_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, moment):
    """The interruption is an exception here; tests/test_training.py kills the process."""
    save(tmp_path, 0, limit=1)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        elsewhere = {"torch.save": (torch, "save"), "os.replace": (os, "replace")}
        patch.setattr(*elsewhere.get(moment, (ddpo.checkpoint, moment)), interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, limit=1)
    expected = 1 if moment == "_remove" else 0
    assert load_checkpoint(find_checkpoint(tmp_path))[2]["epochs_done"] == expected
    save(tmp_path, 2, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_0002"]


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda f: os.truncate(f / "weights.safetensors", 10), "weights.safetensors is not what"),
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda f: (f / "run.json").write_text((f / "run.json").read_text().replace("2", "3")), "run.json is not what"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is missing or unreadable"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is not what"),
        (lambda f: (shutil.rmtree(f), f.mkdir()), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used_if_asked(tmp_path, harm, words):
    for epochs_done in (0, 1, 2):
        save(tmp_path, epochs_done)
    harm(tmp_path / "checkpoint_0002")
    for path in (tmp_path, tmp_path / "checkpoint_0002"):
        with pytest.raises(DamagedCheckpoint, match=f"checkpoint_0002 is damaged.*{words}.*resume_previous_if_damaged"):
            find_checkpoint(path)
        assert find_checkpoint(path, previous_if_damaged=True).name == "checkpoint_0001"
    assert find_checkpoint(tmp_path / "checkpoint_0001").name == "checkpoint_0001"


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    save(tmp_path, 0)
    (tmp_path / "checkpoint_0000" / "run.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="every checkpoint"):
        find_checkpoint(tmp_path, previous_if_damaged=True)


def test_resuming_from_an_older_one_removes_the_newer(tmp_path):
    for epochs_done in range(4):
        save(tmp_path, epochs_done)
    remove_later(tmp_path / "checkpoint_0001")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint_0000", "checkpoint_0001"]
    assert find_checkpoint(tmp_path).name == "checkpoint_0001"


def test_resuming_from_an_older_one_drops_later_metrics_and_validations(tmp_path):
    main_process = SimpleNamespace(is_main_process=True, trackers=[], num_processes=1, print=print)
    config = ConfigDict({"sample": {"save_images": 0}})
    log = RunLog(tmp_path, main_process, config)
    for epoch in (0, 2, 4):
        scores = {"reward": np.full(2, -epoch / 10), "foreground": np.ones((2, 4)), "empty": np.zeros((2, 4))}
        log.validation_images(epoch, [0, 1], {"views": torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8)})
        log.validation(epoch, scores, ["a cube", "a cone"])
    log = RunLog(tmp_path, main_process, config)
    log.resume(epochs_done=2)
    assert [line["epoch"] for line in log.lines] == [0]
    assert [file.name for file in (tmp_path / "validation").iterdir()] == ["epoch_0000"]
