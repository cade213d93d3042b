"""What long work says in a file, and what a tracker gets."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from config import base
from ddpo import progress
from ddpo.progress import Progress
from ddpo.run_log import RunLog
from ddpo.tracking import start_tracker, wandb_id
from tests import children
from tests.tiny_models import make_world, settings


def test_a_file_gets_a_line_after_the_first_pieces_and_then_every_half_minute(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0, 41.0, 50.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("sampling", 50) as work:
        for _ in range(5):
            work.update(10)
    assert capsys.readouterr().out.splitlines() == [
        "sampling: 10 of 50 samples, 1 samples/s, 0:00:40 left",
        "sampling: 30 of 50 samples, 0.732 samples/s, 0:00:27 left",
    ]


def test_short_or_silent_work_says_nothing(capsys):
    with Progress("sampling", 4) as work:
        work.update(0)
        work.update(4)
    assert list(Progress("painting", 3, show=False).over("abc")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress("sampling", 4) as work:
        work.update(1)
    assert capsys.readouterr().out == ""


class Tracker:
    """Remembers what it is given."""

    def __init__(self, name):
        self.name, self.given, self.pictures, self.texts = name, [], [], []
        self.writer = SimpleNamespace(
            add_histogram=lambda *_: None, add_text=lambda name, text: self.texts.append((name, text))
        )

    def log(self, values, step=None):
        self.given.append((values, step))

    def log_images(self, values, step, dataformats):
        self.pictures.append((next(iter(values)), step))


def log_two_epochs(tracker, folder):
    process = SimpleNamespace(is_main_process=True, trackers=[tracker], num_processes=1, print=lambda *_, **__: None)
    log = RunLog(folder, process, ConfigDict({"sample": {"save_images": 1}}))
    scores = {"reward": np.zeros(2), "foreground": np.ones((2, 4)), "empty": np.zeros((2, 4))}
    samples = SimpleNamespace(images={"views": torch.zeros(1, 4, 3, 8, 8, dtype=torch.uint8)}, reward=torch.zeros(1))
    for epoch in (1, 2):
        updates = [
            {"loss": 10.0 * epoch + i, "grad_norm": 1.0, "learning_rate": 1e-3, "step_skipped": False} for i in range(2)
        ]
        log.epoch(epoch, samples, ["a cube"], scores, updates, {"sampling": 1.0})
    return log


def test_updates_of_an_epoch_have_steps_of_their_own(tmp_path):
    board = Tracker("tensorboard")
    log = log_two_epochs(board, tmp_path)
    losses = [(values["update/loss"], step) for values, step in board.given if "update/loss" in values]
    assert losses == [(10, 1), (11, 2), (20, 3), (21, 4)]
    assert [step for values, step in board.given if "epoch/reward_mean" in values] == [1, 2]
    assert board.pictures == [("samples/epoch", 1), ("samples/epoch", 2)]
    log.report(tmp_path / "report.html")
    assert board.texts == [("report", str(tmp_path / "report.html"))]


def test_wandb_gets_places_instead_of_steps_that_cannot_go_back(tmp_path):
    wandb = Tracker("wandb")
    log = log_two_epochs(wandb, tmp_path)
    (tmp_path / "report.html").write_text("<p>The report.</p>")
    log.report(tmp_path / "report.html")
    assert {step for _, step in wandb.given} == {None}
    losses = [(values["update/loss"], values["updates"]) for values, _ in wandb.given if "update/loss" in values]
    assert losses == [(10, 1), (11, 2), (20, 3), (21, 4)]
    assert [values["epoch"] for values, _ in wandb.given if "samples/epoch" in values] == [1, 2]
    assert type(wandb.given[-1][0]["report"]).__name__ == "Html"


def test_a_resumed_run_goes_on_with_its_wandb_run(tmp_path):
    def started():
        run = SimpleNamespace(define_metric=lambda name, step_metric: axes.append((name, step_metric)))
        accelerator = SimpleNamespace(
            is_main_process=True,
            project_configuration=SimpleNamespace(),
            trackers=[SimpleNamespace(name="wandb", run=run)],
            init_trackers=lambda project, settings, options: asked.append(options["wandb"]),
        )
        start_tracker(accelerator, base.get_config(), tmp_path)

    asked, axes = [], []
    started()
    started()
    assert asked[0] == asked[1] and asked[0]["resume"] == "allow" and asked[0]["id"] == wandb_id(tmp_path)
    assert ("update/*", "updates") in axes and ("validation/*", "epoch") in axes


@pytest.mark.slow
def test_tensorboard_of_a_run_has_numbers_pictures_and_the_report(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    world = make_world(tmp_path / "world")
    changes = {"tracker": "tensorboard", "report": True, "train__total_batch_size": 4, "train__batch_size": 2}
    assert children.run(children.train, settings(world, tmp_path, **changes)) == 0
    (events,) = (tmp_path / "run/carve3d").glob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("update/loss")] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    means = [line["reward_mean"] for line in lines if line["kind"] == "validation"]
    assert np.allclose([event.value for event in found.Scalars("validation/reward_mean")], means)
    assert "samples/validation" in found.Tags()["images"] and "report/text_summary" in found.Tags()["tensors"]


@pytest.mark.slow
def test_wandb_of_a_run_is_one_run_when_it_resumes(tmp_path):
    world = make_world(tmp_path / "world")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for changes in ({"num_epochs": 2}, {"resume_from": str(tmp_path / "run"), "report": True}):
        values = settings(world, tmp_path, tracker="wandb", **changes)
        assert children.run(children.train, values, offline) == 0
    names = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(names) == 2 and all(name.endswith(wandb_id(tmp_path / "run")) for name in names)
    assert list((tmp_path / "run/wandb").rglob("report*.html"))
