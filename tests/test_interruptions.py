"""What a run survives: signals, kills, a full disk, another run in its folder, numbers that are not finite. And what
resuming keeps, says and refuses. Whole trainings on models of a few thousand weights."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file

from config import base
from config.errors import UserError
from config.validate import ROOT, flatten, validate
from ddpo.calibration import StepCalibration
from ddpo.checkpoint import checkpoints, damage, find_checkpoint
from ddpo.files import append_whole, whole
from ddpo.pictures import load_views
from ddpo.run_folder import FIXED, MAY_DIFFER, differences, open_run, replaced_later, set_aside, take_lock
from ddpo.run_log import RunLog
from ddpo.sampling import VALIDATION, make_generator
from ddpo.stopping import CannotWrite, Stopped, Stopping, resume_command
from diffusers_patch.mv_sdxl import split_grid
from prompts.dataset import PromptDataset
from tests import children
from tests.test_training import DEADLINE, LORA, assert_learnt_alike, metrics, same_files, without_seconds
from tests.tiny_models import FEW_FILES, PROMPTS, flags, settings
from tools.rehearsal.checkpoints import LATENT


def config_of(world, logdir, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(settings(world, logdir, **changes))
    return validate(config, 1, "cpu")


def ends_alike(run, other):
    """Bitwise: metrics, the last checkpoint's weights and optimizer, and the final LoRA."""
    assert without_seconds(metrics(run)) == without_seconds(metrics(other))
    assert same_files(run, other, f"final/{LORA}")
    last = f"{checkpoints(other)[-1].name}/*"
    names = {path.name for path in run.glob(last)}
    for name in names - {"run.json", "manifest.json"}:  # which hold the configuration, and with it resume_from
        assert (run / last[:-1] / name).read_bytes() == (other / last[:-1] / name).read_bytes(), name


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_half_written_goes_and_what_was_there_stays(tmp_path, kind):
    place = tmp_path / "made" / "thing"

    def write(partial, text):
        partial = partial if kind == "file" else partial.mkdir() or partial / "part"
        partial.write_text(text)

    def read():
        return (place if kind == "file" else place / "part").read_text()

    with pytest.raises(OSError, match="No space"), whole(place) as partial:
        write(partial, "half")
        children.fill_disk()
    assert not list(tmp_path.iterdir())  # nor the empty folder around it
    for text in ("old", "new"):
        with whole(place) as partial:
            write(partial, text)
        assert read() == text
    with pytest.raises(OSError, match="unexpected pos"), whole(place) as partial:
        write(partial, "half")
        raise RuntimeError("unexpected pos 576 vs 534")  # what torch.save says on a full disk
    assert read() == "new" and [path.name for path in place.parent.iterdir()] == ["thing"]


def append_beyond_the_limit(file):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # bytes, for the rest of the process
    with pytest.raises(OSError):
        append_whole(file, "second")


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    """/dev/full is always full; a limit of the file size cuts a line in the middle."""
    file = tmp_path / "metrics.jsonl"
    append_whole(file, "first")
    assert children.run(append_beyond_the_limit, file) == 0
    assert file.read_text() == "first\n"
    append_whole(file, "third")
    assert file.read_text() == "first\nthird\n"


# -- the folder of a run -------------------------------------------------------------------------------------------


def test_a_folder_is_in_use_until_its_process_ends_however(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock = take_lock(tmp_path / "run")
            os.write(writer, b"taken")
            signal.pause()
            lock.close()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 5) == b"taken"
        with pytest.raises(UserError, match=f"run is in use by process {child} on .*: wait .*config.run_name"):
            take_lock(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with take_lock(tmp_path / "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        take_lock(tmp_path / "run")


def test_a_second_run_in_the_same_folder_is_refused_before_it_loads_anything(world, tmp_path):
    config = config_of(world, tmp_path, resume_from="auto")
    accelerator, prompts = Accelerator(cpu=True), PromptDataset.from_config(config.prompts)
    opened = open_run(config, accelerator, prompts)
    assert opened.folder == tmp_path / "run" and opened.checkpoint is None
    with pytest.raises(UserError, match="in use by"):
        open_run(config, accelerator, prompts)
    opened.lock.close()
    open_run(config, accelerator, prompts).lock.close()


def test_auto_takes_the_newest_good_checkpoint_or_begins(whole_run, world, tmp_path):
    config = config_of(world, whole_run.parent, resume_from="auto", report=True)
    accelerator, prompts = Accelerator(cpu=True), PromptDataset.from_config(config.prompts)
    with contextlib.closing(open_run(config, accelerator, prompts).lock):
        pass
    opened = open_run(config, accelerator, prompts)
    opened.lock.close()
    assert opened.checkpoint == whole_run / "checkpoint_0003" and opened.changes == ()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    with pytest.raises(UserError, match="already holds a run"):  # without a checkpoint it cannot be gone on with
        open_run(config_of(world, tmp_path, resume_from="auto"), accelerator, prompts)


def test_every_key_that_differs_is_said():
    config = base.get_config()
    saved = json.loads(json.dumps(config.to_dict()))
    assert differences(saved, config) == {}
    config.train.learning_rate, config.seed, config.resume_from = 1e-3, 7, "logs/run"
    config.per_prompt_stat_tracking = None
    del saved["max_bad_samples"]  # saved before the key was there
    found = differences(saved, config)
    assert found.pop("train.learning_rate") == (3e-4, 1e-3) and found.pop("seed") == (42, 7)
    assert found and all(key.startswith("per_prompt_stat_tracking") for key in found)


def test_what_cannot_be_resumed_is_refused_and_nothing_is_written(whole_run, world):
    other = {"use_lora": False, "lora.rank": 8, "lora.targets": "attention+conv", "painter.name": "mvdream"}
    before = {path: path.read_bytes() for path in sorted(whole_run.rglob("*")) if path.is_file()}
    for key, value in other.items():
        config = config_of(world, whole_run.parent, resume_from=str(whole_run), **{key: value})
        prompts = PromptDataset.from_config(config.prompts)
        with pytest.raises(UserError, match=f"config.{key} is {re.escape(repr(value))}, but .*checkpoint_0003 was"):
            open_run(config, Accelerator(cpu=True), prompts)
    assert set(other) < set(FIXED)
    other = {"reward_fn": "jpeg_compressibility", "sample.guidance_scale": 2.0, "recon.render_size": 64}
    other |= {"sample.prompt_suffix": ", on white", "mrc.bbox_lpips": False}
    for key, value in other.items():
        config = config_of(world, whole_run.parent, resume_from=str(whole_run), **{key: value})
        prompts = PromptDataset.from_config(config.prompts)
        words = f"config.{key} is {re.escape(repr(value))}, but .*run were measured with .*lora = '{whole_run}/final'"
        with pytest.raises(UserError, match=words):
            open_run(config, Accelerator(cpu=True), prompts)
    keys = flatten(config)
    assert all(any(key.startswith(start) for key in keys) for start in MAY_DIFFER)
    for key, value in {"sample.decode_batch_size": 1, "recon.chunk_size": 100, "mrc.empty_in_statistics": True}.items():
        config = config_of(world, whole_run.parent, resume_from=str(whole_run), **{key: value})
        open_run(config, Accelerator(cpu=True), PromptDataset.from_config(config.prompts)).lock.close()
    values = settings(world, whole_run.parent, resume_from=str(whole_run), **{"pretrained.model": str(whole_run)})
    assert children.run(children.train, values) == 1  # found when it is loaded, and still nothing is written
    after = {path: path.read_bytes() for path in sorted(whole_run.rglob("*")) if path.is_file()}
    assert before.keys() == after.keys()
    assert [path.name for path in before if before[path] != after[path]] in ([], ["run.lock"])


def test_a_run_does_not_resume_under_another_name(whole_run, world, tmp_path):
    """But it does under its own, however that is written, and under none."""
    link, accelerator = tmp_path / "link", Accelerator(cpu=True)
    link.symlink_to(whole_run.parent)

    def opened_as(logdir, run_name):
        config = config_of(world, logdir, run_name=run_name, resume_from=str(whole_run / "checkpoint_0001"))
        opened = open_run(config, accelerator, PromptDataset.from_config(config.prompts))
        opened.lock.close()
        return opened.folder

    assert opened_as(link, "run") == opened_as(tmp_path, "") == whole_run
    for logdir, run_name in ((whole_run.parent, "fork"), (tmp_path, "run")):
        with pytest.raises(UserError, match=f"checkpoint_0001.* name {logdir}/{run_name}: .* copy the folder there"):
            opened_as(logdir, run_name)


def test_what_a_resumed_run_replaces_is_kept_as_a_branch(whole_run, world, tmp_path):
    """A real run resumes from its first checkpoint with another learning rate."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole_run), str(run)], check=True)
    values = settings(world, tmp_path, resume_from=str(run / "checkpoint_0001"), num_epochs=2, train__learning_rate=0.1)
    assert children.run(children.train, values) == 0
    kept = {str(path.relative_to(run / "branch_1")) for path in (run / "branch_1").rglob("*") if path.is_file()}
    names = [*(f"checkpoint_000{n}/weights.safetensors" for n in (2, 3)), "metrics.jsonl", "config.json", "curves.png"]
    names += [f"lora/epoch_000{n}/{LORA}" for n in (2, 3)] + [f"final/{LORA}", "final/README.md"]
    names += [f"samples/{name}.png" for name in ("epoch_0001", "epoch_0002", "validation_0002", "before_after_0003")]
    names += [f"validation/epoch_000{n}/{name}" for n in (2, 3) for name in ("0002.png", "scores.json")]
    assert set(names) <= kept and "checkpoint_0001/run.json" not in kept and "samples/epoch_0000.png" not in kept
    for name in kept:
        assert (run / "branch_1" / name).read_bytes() == (whole_run / name).read_bytes(), name
    assert [path.name for path in checkpoints(run)] == ["checkpoint_0000", "checkpoint_0001", "checkpoint_0002"]
    assert metrics(run, "epoch")[-1]["learning_rate"] == 0.1 and metrics(run)[:2] == metrics(whole_run)[:2]


def test_only_what_is_replaced_by_something_else_is_set_aside(tmp_path):
    for name in ("checkpoint_0004", "lora/epoch_0004", "final", "validation/epoch_0004", "bad_samples/epoch_0002"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/epoch_0004.png").touch()
    assert replaced_later(tmp_path, 4, finished=True) == []  # the end of a run is repeated
    longer = replaced_later(tmp_path, 4, finished=False)  # a run that had ended gets more epochs
    assert [path.name for path in longer] == ["final", "epoch_0004.png", "epoch_0004"]
    assert set_aside(tmp_path, longer) == tmp_path / "branch_1"
    assert replaced_later(tmp_path, 4, finished=False) == []
    (tmp_path / "branch_1").rename(tmp_path / "branch_7")
    assert set_aside(tmp_path, [tmp_path / "checkpoint_0004"]).name == "branch_8"


def test_missing_reports_are_noticed(whole_run, world, tmp_path, capsys):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole_run), str(run)], check=True)
    main_process = SimpleNamespace(is_main_process=True, num_processes=1, print=lambda *words, **_: print(*words))
    opened = SimpleNamespace(checkpoint=run / "checkpoint_0003", changes=())

    def said():
        log = RunLog(run, main_process, ConfigDict({}))
        log.start(3, True, opened)
        return capsys.readouterr().out

    assert "metrics.jsonl lacks" not in said() and "is missing" not in said()
    subprocess.run(["rm", "-r", str(run / "validation/epoch_0000")], check=True)
    assert "validation/epoch_0000 is missing" in said()
    (run / "metrics.jsonl").unlink()
    text = said()
    assert "metrics.jsonl lacks 3 of the 3 epochs done, the first is 0" in text and "validation before training" in text
    # and such a run ends with what there is
    values = settings(world, tmp_path, resume_from=str(run))
    assert children.run(children.recorded, tmp_path / "said", children.train, values) == 0
    assert "validation reward before (3 epochs)" in (tmp_path / "said").read_text()


# -- signals -------------------------------------------------------------------------------------------------------


def test_a_signal_is_obeyed_at_the_next_safe_point(tmp_path):
    stopping = Stopping(tmp_path, Accelerator(cpu=True))
    handler = signal.getsignal(signal.SIGTERM)
    with stopping.listening():
        stopping.check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first one counts
        with pytest.raises(Stopped, match="SIGTERM") as stopped:
            stopping.check()
        assert stopped.value.status == 143
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.check()  # while it saves
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_command_that_resumes(monkeypatch):
    monkeypatch.delenv("CARVE3D_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", ["carve3d_train.py", "--config", "config/dgx.py:batch_size(384)"])
    folder = Path("logs/my run")
    expected = "carve3d_train.py --config 'config/dgx.py:batch_size(384)' '--config.resume_from=logs/my run'"
    assert resume_command(folder) == f"python {expected}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command(folder) == f"torchrun --nproc_per_node 4 {expected}"
    monkeypatch.setenv("CARVE3D_COMMAND", "bash carve3d_train.sh 6 --config.resume_from=auto --config.seed=1")
    assert resume_command(Path("r")) == "bash carve3d_train.sh 6 --config.seed=1 --config.resume_from=r"


def test_a_run_that_is_told_to_stop_saves_and_ends_like_one_that_was_not(whole_run, world, tmp_path):
    """While it paints, it drops the epoch; in the update, it finishes it. Checkpoints are rare."""
    values = settings(world, tmp_path, save_freq=3)
    paint, learn = ("ddpo.sampling.rollout", 1 + 2 + 1), ("ddpo.update.average_gradients", 1)
    assert children.run(children.train_until, values, *paint, children.terminate) == 143
    run = tmp_path / "run"
    assert [path.name for path in checkpoints(run)] == ["checkpoint_0000", "checkpoint_0001"]
    values |= {"resume_from": str(run)}
    assert children.run(children.train_until, values, *learn, children.interrupt) == 130
    assert checkpoints(run)[-1].name == "checkpoint_0002" and not (run / "branch_1").exists()
    assert children.run(children.train, values) == 0
    ends_alike(run, whole_run)


def wait_for(condition, seconds=DEADLINE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_two_processes_stop_together_and_do_not_outlive_their_launcher(world, tmp_path):
    """Through tools.launch. First SIGTERM to the launcher alone; then it is killed."""
    values = flags(world, tmp_path, resume_from="auto", num_epochs=1000, val_freq=1000, save_freq=1000)
    command = [sys.executable, "-m", "tools.launch", "--standalone", "--nproc_per_node", "2", "carve3d_train.py"]
    run, output = tmp_path / "run", tmp_path / "output"

    def launch():
        with open(output, "w") as file:
            arguments = [*command, "--config", "config/base.py", *values]
            return subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    launcher = launch()
    wait_for(lambda: "\nepoch   1" in output.read_text())
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(DEADLINE) == 143
    text = output.read_text()
    assert "Traceback" not in text and text.count("stopped by SIGTERM") == 1
    assert text.splitlines()[-1].endswith(f"--config.resume_from={run}")
    (done,) = {int(number) for number in re.findall(r"SIGTERM, (\d+) epochs are done", text)}
    assert done >= 2 and find_checkpoint(run).name == f"checkpoint_{done:04d}"

    launcher = launch()
    wait_for(lambda: f"\nepoch {done + 1:3d}" in output.read_text())
    assert f"resumed from {run}/checkpoint_{done:04d}" in output.read_text()
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(workers) >= 2 and all(is_alive(pid) for pid in workers)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in workers), 20)


MOMENTS = {  # what a process does when it dies -> in which call of what, at most
    "painting": ("ddpo.sampling.rollout", 5),
    "judging": ("mrc.mrc.MRC.__call__", 5),
    "updating": ("ddpo.update.average_gradients", 2),
    "writing pictures": ("ddpo.pictures.Image.fromarray", 8),
    "saving weights": ("ddpo.checkpoint.save_file", 2),
    "saving the optimizer": ("torch.save", 2),
    "naming a checkpoint": ("os.fsync", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_moments_change_nothing(world, tmp_path, processes):
    """One process dies by itself, in a random one of `MOMENTS` and at a random call, and takes the others with it."""
    rng, tally, run, undisturbed = random.Random(processes), [], tmp_path / "run", tmp_path / "whole"
    small = dict(num_epochs=6, val_freq=3, save_freq=2, prompts__num_train=2, sample__num_steps=2, sample__batch_size=2)
    small |= dict(sample__total_batch_size=4, train__total_batch_size=4, train__batch_size=2, sample__save_images=1)
    small |= dict(prompts__val_file=str(world / "test.txt"))

    def train(name, *death):
        values = settings(world, tmp_path, run_name=name, resume_from="auto", **small)
        return children.start_ranks(children.train_until if death else children.train, processes, values, *death)

    def end(ranks):
        for rank in ranks:
            rank.join(DEADLINE)
            assert rank.exitcode == 0

    end(train("whole"))
    while len(tally) < 20:
        stage = rng.choice(list(MOMENTS))
        target, calls = MOMENTS[stage]
        ranks = train("run", target, rng.randint(1, calls), children.die)
        wait_for(lambda ranks=ranks: any(rank.exitcode is not None for rank in ranks))
        if any(rank.exitcode == -signal.SIGKILL for rank in ranks):
            for rank in ranks:
                rank.kill()
                rank.join()
            tally.append(f"{stage}, resumed from {checkpoints(run)[-1].name if checkpoints(run) else 'nothing'}")
        else:  # it ended before its moment: the next one begins anew
            end(ranks)
            ends_alike(run, undisturbed)
            subprocess.run(["rm", "-r", str(run)], check=True)
    end(train("run"))
    print(*tally, sep="\n")
    ends_alike(run, undisturbed)


@pytest.mark.slow
def test_four_processes_learn_what_two_and_one_learn(whole_run, world, tmp_path):
    for number in (2, 4):
        ranks = children.start_ranks(children.train, number, settings(world, tmp_path, run_name=str(number)))
        for rank in ranks:
            rank.join(DEADLINE)
            assert rank.exitcode == 0
        assert_learnt_alike(tmp_path / str(number), whole_run)
    assert_learnt_alike(tmp_path / "4", tmp_path / "2")


# -- a full disk ---------------------------------------------------------------------------------------------------

FULL = [  # where the disk is full, and the checkpoint that is left
    ("ddpo.run_log.append_whole", 2, 0),  # the metrics of epoch 0
    ("ddpo.pictures.Image.fromarray", 4, 0),  # a picture of a validation
    ("ddpo.checkpoint.save_file", 1, 0),  # the weights of checkpoint 1
    ("ddpo.run_log.plt.close", 2, 1),  # the LoRA and curves before checkpoint 2
    ("ddpo.checkpoint._fingerprint", 7, 2),  # the end of checkpoint 3
]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_a_sentence_and_leaves_its_last_checkpoint(whole_run, world, tmp_path):
    run, values = tmp_path / "run", settings(world, tmp_path, resume_from="auto")
    for target, call, last in FULL:
        filled = (children.train_until, values, target, call, children.fill_disk)
        assert children.run(children.recorded, tmp_path / "said", *filled) == 1, target
        text = (tmp_path / "said").read_text()
        assert "CannotWrite" in text and "could not be written (No space left on device; " in text, target
        assert f"the last good checkpoint is {run}/checkpoint_000{last}; go on with" in text, target
        assert find_checkpoint(run).name == f"checkpoint_000{last}"
        assert not list(run.rglob("partial_*")) and all(damage(path) is None for path in checkpoints(run))
        assert all(list(folder.iterdir()) for folder in run.rglob("*") if folder.is_dir())  # no empty one
        for line in (run / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
    assert children.run(children.train, values) == 0
    ends_alike(run, whole_run)


def test_a_process_with_a_full_disk_names_the_checkpoint_that_is_left(tmp_path):
    stopping = Stopping(tmp_path, Accelerator(cpu=True))
    with pytest.raises(CannotWrite, match=r"x.png could not be written \(No space .*there is no checkpoint yet"):
        with stopping.safely():
            raise OSError(28, "No space left on device", "x.png")


# -- numbers that are not finite -----------------------------------------------------------------------------------


def bad_rewards(values, bad, environment=None):
    """`children.train` where rewards are NaN: bad is {call of the reward: (samples, ...)}."""
    import mrc.mrc

    judge, calls = mrc.mrc.MRC.__call__, []

    def spoiled(self, views):
        result = judge(self, views)
        result.reward[list(bad.get(len(calls), ()))] = torch.nan
        calls.append(None)
        return result

    mrc.mrc.MRC.__call__ = spoiled
    children.train(values, environment)


def test_few_bad_samples_are_left_out_and_saved(world, tmp_path):
    """Validation: call 0, then two batches of 4 per epoch. Epoch 1, the first that learns, has two bad samples."""
    values = settings(world, tmp_path, max_bad_samples=3, num_epochs=2, **FEW_FILES)
    assert children.run(children.recorded, tmp_path / "said", bad_rewards, values, {0: (1,), 4: (0, 3)}) == 0
    run, said = tmp_path / "run", (tmp_path / "said").read_text()
    assert "1 of 3 validation prompts got NaN" in said and repr(PROMPTS[1]) in said
    assert "2 of the 8 samples of epoch 1 have NaN or infinite numbers" in said and "left out" in said
    assert metrics(run, "validation")[0]["rewards"][1] is None
    assert all(np.isfinite(line["reward_mean"]) for line in metrics(run) if "reward_mean" in line)
    assert sum(metrics(run, "epoch")[1]["reward_histogram"]["counts"]) == 6
    saved = run / "bad_samples/epoch_0001"
    assert sorted(path.name for path in saved.iterdir()) == [
        f"sample_0000{n}.{s}" for n in (4, 7) for s in ("json", "png")
    ]
    about = json.loads((saved / "sample_00004.json").read_text())
    assert about["prompt"] in PROMPTS and (about["seed"], about["epoch"], about["sample"]) == (42, 1, 4)
    assert load_views(saved / "sample_00004.png")["views"].shape == (4, 3, 4 * LATENT, 4 * LATENT)
    weights = load_file(run / "checkpoint_0002/weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)  # it learned
    history = json.loads((run / "checkpoint_0002/run.json").read_text())["trackers"]["reward"]["history"]
    assert all(np.isfinite(values).all() for values in history.values())

    values = settings(world, tmp_path, max_bad_samples=2, num_epochs=2, run_name="many")
    assert children.run(children.recorded, tmp_path / "said", bad_rewards, values, {4: (0, 3)}) == 1
    text = (tmp_path / "said").read_text()
    assert "UserError: 2 of the 8 samples of epoch 1 have NaN" in text and "config.max_bad_samples is 2" in text
    assert len(list((tmp_path / "many/bad_samples/epoch_0001").iterdir())) == 4


def test_a_painter_of_nan_is_not_taken_for_one_of_empty_views(world, tmp_path):
    painter = tmp_path / "painter"
    subprocess.run(["cp", "-r", str(world / "painter"), str(painter)], check=True)
    file = painter / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"].fill_(torch.nan)
    save_file(weights, file, {"format": "pt"})
    values = settings(world, tmp_path, **{"pretrained.model": str(painter)})
    assert children.run(children.recorded, tmp_path / "said", children.train, values) == 1
    assert "UserError: no validation prompt got a reward that is a number" in (tmp_path / "said").read_text()


# -- calibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_kl", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("done", [0, 2, 3])
@pytest.mark.parametrize("wanted_kl", [0.0, 0.05])
def test_calibration_resumes_on_and_off(saved_kl, done, wanted_kl):
    config = base.get_config()
    config.train.kl_per_update, config.train.kl_calibration_updates, config.train.learning_rate = wanted_kl, 3, 1e-4
    done = done if saved_kl else 0
    optimizer = SimpleNamespace(param_groups=[{"lr": config.train.learning_rate}])  # the configuration's, as load_run
    calibration = StepCalibration(None, optimizer, None, config)
    calibration.load_state_dict({"kl_per_update": saved_kl, "done": done}, 7e-4)
    rate = optimizer.param_groups[0]["lr"]
    if wanted_kl == 0:  # off: the configured rate, and nothing is measured
        assert rate == 1e-4 and calibration.remaining == 0 and calibration.after_update() == {}
    elif done == 0:  # it had not begun, or was off
        assert rate == 1e-4 and calibration.remaining == 3
    elif saved_kl == wanted_kl:
        assert rate == 7e-4 and calibration.remaining == 3 - done
    else:  # another step is wanted: anew, from the rate that there was
        assert rate == 7e-4 and calibration.remaining == 3
    assert calibration.state_dict()["kl_per_update"] == wanted_kl


@pytest.mark.slow
def test_a_run_resumes_with_its_calibration_on_or_off(world, tmp_path):
    """All four, in real runs: the rates in the metrics are those that were used."""
    on = dict(train__kl_per_update=0.01, train__kl_calibration_updates=3)
    for first, then in ((on, on), (on, {}), ({}, on), ({}, {})):
        name = f"{len(first)}{len(then)}"
        values = settings(world, tmp_path, run_name=name, num_epochs=5, **first)
        assert (
            children.run(children.train_until, values, "ddpo.update.average_gradients", 2, children.die)
            == -signal.SIGKILL
        )
        values = settings(world, tmp_path, run_name=name, num_epochs=5, resume_from="auto", **then)
        assert children.run(children.train, values) == 0
        updates = metrics(tmp_path / name, "update")
        rates = [line["learning_rate"] for line in updates]
        following = [line.get("next_learning_rate") for line in updates]
        assert rates[0] == 3e-4 and len(rates) == 4
        expected = {
            "22": [3e-4, following[0], following[1], following[2]],
            "20": [3e-4] * 4,
            "02": [3e-4, 3e-4, following[1], following[2]],
            "00": [3e-4] * 4,
        }[name]
        assert rates == expected, name
        measured = ["kl_of_update" in line for line in updates]
        assert measured == {"22": [1, 1, 1, 0], "20": [1, 0, 0, 0], "02": [0, 1, 1, 1], "00": [0, 0, 0, 0]}[name]
        assert [line["learning_rate"] for line in metrics(tmp_path / name, "epoch")] == [None, *rates]


# -- what is left for others ---------------------------------------------------------------------------------------


def test_stock_diffusers_paints_the_validation_with_the_code_in_final(whole_run, world, tmp_path):
    """A run on top of a fused LoRA that changes much, with all that can be told of painting: final/README.md says it,
    and that paints the run's own pictures. Without any of it, it does not."""
    lora = {
        name: 100 * value if "lora_B" in name else value
        for name, value in load_file(whole_run / "final" / LORA).items()
    }
    (tmp_path / "fused").mkdir()
    save_file(lora, tmp_path / "fused" / LORA, {"format": "pt"})
    how = {
        "initial_latents": "gaussian_blob",
        "blob_std": 0.2,
        "eta": 0.7,
        "guidance_scale": 40.0,
        "guidance_rescale": 1.0,
    }
    how = {f"sample.{key}": value for key, value in how.items()} | {"sample.prompt_suffix": ", a blue sphere on a cone"}
    changes = {"pretrained.lora": str(tmp_path / "fused"), "train.learning_rate": 3e-3, **how, **FEW_FILES}
    assert children.run(children.train, settings(world, tmp_path, **changes)) == 0
    run = tmp_path / "run"
    (code,) = re.findall(r"```python\n(.*?)```", (run / "final/README.md").read_text(), flags=re.DOTALL)
    shown = torch.stack([load_views(file)["views"] for file in sorted((run / "validation/epoch_0003").glob("*.png"))])

    def off(without):
        """How far the pictures are from the run's, mean in [0, 1], with these words of the code left out."""
        assert without in code
        names = {}
        exec(code.replace(without, ""), names)
        names["pipeline"].set_progress_bar_config(disable=True)
        grids = [names["paint"](prompt, make_generator(0, VALIDATION, i)) for i, prompt in enumerate(PROMPTS[:3])]
        grids = torch.stack([torch.from_numpy(np.array(grid)).permute(2, 0, 1) for grid in grids])
        return float((split_grid(grids).int() - shown.int()).abs().float().mean()) / 255

    assert off("") <= 1e-4
    told = ["pipeline.fuse_lora()\n", "latents=fused_start(pipeline.scheduler, blob, noise),", "eta=0.7,"]
    for words in (*told, "guidance_rescale=1.0,", " + ', a blue sphere on a cone'"):
        assert off(words) > 5e-4, words
