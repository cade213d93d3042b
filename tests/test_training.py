"""The real training script on models of a few thousand weights: what it leaves, that it can be killed at any moment,
that two processes learn what one learns, and that every switch of the configuration runs."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from carve3d_train import Run
from config import base
from ddpo.checkpoint import checkpoints, find_checkpoint, load_checkpoint
from ddpo.pictures import load_views
from tests import children
from tests.tiny_models import FEW_FILES, flags, settings
from tools.rehearsal.checkpoints import LATENT

LORA = "pytorch_lora_weights.safetensors"
DEADLINE = 600  # seconds; a run takes a few, but machines are busy


def metrics(folder, kind=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same_files(folder, other, pattern):
    names = sorted(path.relative_to(folder) for path in folder.glob(pattern))
    assert names and names == sorted(path.relative_to(other) for path in other.glob(pattern))
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder_as_promised(whole_run):
    assert sorted(path.name for path in whole_run.iterdir()) == [
        "checkpoint_0000",
        "checkpoint_0001",
        "checkpoint_0002",
        "checkpoint_0003",
        "config.json",
        "curves.png",
        "environment.json",
        "final",
        "lora",
        "metrics.jsonl",
        "report.html",
        "run.lock",
        "samples",
        "validation",
    ]
    assert [(line["kind"], line["epoch"]) for line in metrics(whole_run)] == [
        ("validation", 0),
        ("epoch", 0),
        ("epoch", 1),
        ("update", 1),
        ("validation", 2),
        ("epoch", 2),
        ("update", 2),
        ("validation", 3),
    ]
    assert json.loads((whole_run / "config.json").read_text())["train"]["gradient_accumulation_steps"] == 2
    names = {path.name for path in (whole_run / "samples").iterdir()}
    validations = {f"validation_000{n}.png" for n in (0, 2, 3)}
    assert names == {f"epoch_000{n}.png" for n in (0, 1, 2)} | validations | {"before_after_0003.png"}
    assert np.asarray(Image.open(whole_run / "samples/epoch_0001.png")).std() > 0
    assert np.asarray(Image.open(whole_run / "curves.png")).std() > 0
    validation = whole_run / "validation/epoch_0003"
    assert sorted(file.name for file in validation.iterdir()) == ["0000.png", "0001.png", "0002.png", "scores.json"]
    images = load_views(validation / "0002.png")
    assert images["views"].shape == images["renders"].shape == (4, 3, 4 * LATENT, 4 * LATENT)
    scores = json.loads((validation / "scores.json").read_text())
    assert scores["rewards"] == metrics(whole_run, "validation")[-1]["rewards"] and len(scores["prompts"]) == 3
    rewards, means = np.array(scores["rewards"]), -np.mean(scores["lpips"], axis=1)
    assert np.allclose(means[rewards > -1], rewards[rewards > -1], atol=1e-6)  # -1: of a sample with an empty view
    assert len(json.loads((whole_run / "environment.json").read_text())) > 8
    assert "of 3 validation captions" in (whole_run / "report.html").read_text()
    assert same_files(whole_run / "final", whole_run / "lora/epoch_0003", LORA)


def test_metrics_say_what_happened(whole_run):
    first, *later = metrics(whole_run, "epoch")
    for line in (first, *later):
        assert -1 <= line["reward_mean"] < 0 and line["reward_std"] > 0
        assert sum(line["reward_histogram"]["counts"]) == 8
        assert set(line["seconds"]) == {"sampling", "reward", "update"}
        assert 0.01 < line["reward/foreground"] < 0.1  # blobs on white
    assert first["kl_mean"] == later[0]["kl_mean"] == 0 != later[1]["kl_mean"]  # no update before epoch 1
    for line in metrics(whole_run, "update"):
        assert line["grad_norm"] > 0 and np.isfinite(line["loss"])
        assert "ratio_min" not in line  # the update asked no second time
    empty = [line["reward/empty_views"] for line in (first, *later)]
    assert 0 in empty and 0 < max(empty) < 1 / 2  # both kinds are judged and learned from
    for line in metrics(whole_run, "validation"):
        assert line["rewards"].count(-1.0) == pytest.approx(3 * line["reward/empty_views"])
        assert len(line["rewards"]) == len(line["kls"]) == 3
        assert line["reward_mean"] == pytest.approx(np.mean(line["rewards"]))


def predict(unet):
    """The UNet's answer to fixed inputs."""
    torch.manual_seed(1)
    inputs = torch.randn(2, 4, LATENT, LATENT), torch.tensor([901, 5]), torch.randn(2, 24, 32)
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        return unet(*inputs, added_cond_kwargs=added).sample


def assert_stock_diffusers_paints_with(run_folder, world):
    """Stock diffusers loads final/ beside the base model and then computes what the trained policy computed."""
    base = StableDiffusionXLPipeline.from_pretrained(world / "painter")
    before = predict(base.unet)
    base.load_lora_weights(run_folder / "final")
    stock = {name.replace(".default_0.", ".default."): value for name, value in base.unet.state_dict().items()}
    trained = load_file(checkpoints(run_folder)[-1] / "weights.safetensors")
    assert trained and all(torch.equal(stock[name], value) for name, value in trained.items())
    assert (predict(base.unet) - before).abs().max() > 0
    scales = {layer.scaling["default_0"] for layer in base.unet.modules() if hasattr(layer, "scaling")}
    assert scales == {1.0}


def test_stock_diffusers_loads_what_was_learned(whole_run, world):
    assert_stock_diffusers_paints_with(whole_run, world)


# -- killed and resumed ------------------------------------------------------------------------------------------------

MOMENTS = [  # the call in which the process dies, counted from where the run resumes
    ("diffusers_patch.rollout.gaussian_log_prob", 1),  # the first validation
    ("diffusers_patch.rollout.gaussian_log_prob", 4 + 8 + 3),  # sampling of epoch 1, the first that learns
    ("ddpo.update.average_gradients", 1),  # update of epoch 1
    ("torch.save", 1),  # saving checkpoint 2, half of it is there
    ("os.fsync", 4),  # saving checkpoint 2, all but its name is there
    ("matplotlib.pyplot.close", 2),  # saving what belongs to checkpoint 3, before the checkpoint
    ("ddpo.run_log.paired_p_value", 1),  # the very end
]
RESUMED_FROM = [0, 1, 1, 1, 1, 2, 3]


def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(whole_run, world, tmp_path):
    values = settings(world, tmp_path)
    run = tmp_path / "run"
    for (target, call), epochs_done in zip(MOMENTS, RESUMED_FROM, strict=True):
        assert children.run(children.train_and_die, values, target, call) == -signal.SIGKILL, target
        assert find_checkpoint(run).name == f"checkpoint_000{epochs_done}"
        values = settings(world, tmp_path, resume_from=str(run))
        if target == "ddpo.update.average_gradients":
            with open(run / "metrics.jsonl", "a") as file:  # as if it had died writing
                file.write('{"kind": "epo')
    assert children.run(children.train, values) == 0
    assert without_seconds(metrics(run)) == without_seconds(metrics(whole_run))
    for pattern in (f"final/{LORA}", "lora/*/*", "checkpoint_*/weights.safetensors"):
        assert same_files(run, whole_run, pattern), pattern
    ends = [load_checkpoint(folder / "checkpoint_0003") for folder in (run, whole_run)]
    (_, optimizer, state), (_, optimizer_of_whole, state_of_whole) = ends
    assert state | {"config": None} == state_of_whole | {"config": None}  # the statistics of every prompt among it
    assert optimizer["param_groups"] == optimizer_of_whole["param_groups"]
    for moments, expected in zip(optimizer["state"].values(), optimizer_of_whole["state"].values(), strict=True):
        assert all(torch.equal(moments[name], expected[name]) for name in expected)
    assert not list(run.glob("partial_*"))


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_random_ends_like_one_that_was_not(whole_run, world, tmp_path):
    run, rng, kills = tmp_path / "run", random.Random(), 0
    while True:
        resume = str(run) if checkpoints(run) else ""
        process = children.start(children.train, settings(world, tmp_path, resume_from=resume))
        process.join(rng.uniform(0.5, 4) * (1 + kills / 4))  # ever longer, so that it ends
        if process.exitcode == 0:
            break
        assert process.exitcode is None
        process.kill()
        process.join()
        kills += 1
    print(f"killed {kills} times")
    assert without_seconds(metrics(run)) == without_seconds(metrics(whole_run))
    assert same_files(run, whole_run, f"final/{LORA}") and same_files(
        run, whole_run, "checkpoint_0003/weights.safetensors"
    )


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole_run, world, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    os.truncate(tmp_path / "run/checkpoint_0003/optimizer.pt", 100)
    # and with another learning rate: the configuration wins over the checkpoint
    values = settings(
        world, tmp_path, resume_from=str(tmp_path / "run"), resume_previous_if_damaged=True, train__learning_rate=1e-9
    )
    assert children.run(children.train, values) == 0
    assert without_seconds(metrics(tmp_path / "run"))[:5] == without_seconds(metrics(whole_run))[:5]
    assert metrics(tmp_path / "run", "epoch")[-1]["learning_rate"] == 1e-9
    old, new = (load_file(tmp_path / f"run/checkpoint_000{n}/weights.safetensors") for n in (2, 3))
    assert all(torch.allclose(old[name], new[name], atol=1e-8) for name in old)


# -- two processes -----------------------------------------------------------------------------------------------------


def assert_learnt_alike(run, other):
    """Two runs on the same samples, up to the order in which floats are added."""
    mine, theirs = metrics(run), metrics(other)
    assert [(line["kind"], line["epoch"]) for line in mine] == [(line["kind"], line["epoch"]) for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for key in ("reward_mean", "reward_std", "rewards", "kl_mean", "reward/foreground"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-5), (b["kind"], b["epoch"], key)
        for key in ("loss", "grad_norm", "kl_of_update"):  # looser: the KL is normalised, and its rounding with it
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-5), (b["epoch"], key)
    weights, other_weights = (load_file(checkpoints(folder)[-1] / "weights.safetensors") for folder in (run, other))
    largest = max(value.abs().max() for value in other_weights.values())
    for name, value in other_weights.items():
        if "lora_B" in name:  # they start at 0
            assert (weights[name] - value).abs().max() <= 1e-3 * largest, name


def test_two_processes_learn_what_one_learns(whole_run, world, tmp_path):
    """Three validation prompts for two processes."""
    line = ["--config=config/base.py", *flags(world, tmp_path, save_freq=100)]
    done = children.command("carve3d_train", line, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nepoch   1") == 1  # one summary line, not one per process
    assert "8 = 4 at a time x 1 batches x 2 processes" in done.stdout
    first, first_of_whole = metrics(tmp_path / "run")[1], metrics(whole_run)[1]
    assert first["reward_histogram"] == first_of_whole["reward_histogram"]  # exactly the same samples
    assert_learnt_alike(tmp_path / "run", whole_run)


def test_more_processes_than_validation_prompts(world, tmp_path):
    """One validation prompt, a calibrated step, two updates per epoch, a run that goes on with one process less."""
    changes = dict(
        prompts__val_file=str(world / "test.txt"),
        num_epochs=2,
        train__kl_per_update=0.01,
        train__kl_calibration_updates=1,
        train__timesteps_per_forward=4,
        **FEW_FILES,
    )
    ranks = children.start_ranks(children.train, 2, settings(world, tmp_path, **changes))
    alone = children.start(children.train, settings(world, tmp_path, run_name="alone", **changes))
    for process in (*ranks, alone):
        process.join(DEADLINE)
        assert process.exitcode == 0
    assert_learnt_alike(tmp_path / "run", tmp_path / "alone")
    assert len(metrics(tmp_path / "run", "validation")[0]["rewards"]) == 1
    values = settings(world, tmp_path, **{**changes, "num_epochs": 3, "resume_from": str(tmp_path / "run")})
    assert children.run(children.train, values) == 0
    assert metrics(tmp_path / "run", "epoch")[-1]["epoch"] == 2


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reward_rises_and_not_by_chance(tmp_path):
    """The embedded painter learns in three updates to paint what compresses well, as the captions of the validation
    show. With the advantages given to other samples it does not."""
    gains = {}
    for shuffled in (False, True):
        line = [
            "--config=config/tiny.py",
            f"--config.logdir={tmp_path}",
            f"--config.run_name={shuffled}",
            f"--config.shuffle_advantages={shuffled}",
            "--config.reward_fn=jpeg_compressibility",
            "--config.num_epochs=4",
            "--config.val_freq=4",
            "--config.train.kl_per_update=0.2",
            "--config.train.kl_calibration_updates=3",
            "--config.train.hold_foreground=False",
            "--config.report=False",
        ]
        done = children.command("carve3d_train", line, tmp_path)
        assert done.returncode == 0, done.stderr
        before, after = (np.array(line["rewards"]) for line in metrics(tmp_path / str(shuffled), "validation"))
        gains[shuffled] = after - before
    learned = gains[False]
    assert learned.mean() > 5 * learned.std(ddof=1) / np.sqrt(len(learned))
    assert learned.mean() > 2 * gains[True].mean()


# -- the switches of the configuration ---------------------------------------------------------------------------------


def test_on_policy_ratios_are_one_to_the_last_bit(world, tmp_path):
    """Samples are painted and trained on one by one, so that both see the same batches."""
    values = settings(
        world,
        tmp_path,
        num_epochs=2,
        prompts__val_file=str(world / "test.txt"),
        sample__num_steps=2,
        sample__batch_size=1,
        train__batch_size=1,
        sample__total_batch_size=4,
        train__total_batch_size=4,
        per_prompt_stat_tracking__min_count=1,
        train__gradients_while_painting=False,
        **FEW_FILES,
    )
    assert children.run(children.train, values) == 0
    (update,) = metrics(tmp_path / "run", "update")
    assert update["ratio_min"] == update["ratio_max"] == 1 and update["approx_kl"] == update["clipfrac"] == 0


def test_every_weight_off_policy_with_the_kl_in_the_loss(world, tmp_path):
    values = settings(
        world,
        tmp_path,
        num_epochs=2,
        use_lora=False,
        train__learning_rate=1e-5,
        kl_in_reward=False,
        kl_per_prompt_stat_tracking=False,
        train__total_batch_size=4,
        train__num_inner_epochs=2,
        train__timestep_fraction=0.5,
        reward_fn="jpeg_compressibility",
        recon__checkpoint="",
        tracker="tensorboard",
        sample__prompt_suffix=", white background",
        shuffle_advantages=True,
        **FEW_FILES,
    )
    assert children.run(children.train, values) == 0
    run = tmp_path / "run"
    updates = metrics(run, "update")
    assert [line["update"] for line in updates] == [0, 1, 2, 3]
    assert updates[0]["kl"] == 0 and abs(updates[0]["ratio_max"] - 1) <= 1e-5
    assert all(line["approx_kl"] > updates[0]["approx_kl"] and line["kl"] != 0 for line in updates[1:])  # off-policy
    assert metrics(run, "epoch")[0]["reward_mean"] < -1  # kilobytes
    assert list(run.glob("carve3d/events.out.tfevents*"))
    assert not (run / "lora").exists()
    unet = UNet2DConditionModel.from_pretrained(run / "final/unet")
    trained = load_file(checkpoints(run)[-1] / "weights.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in unet.state_dict().items())


def test_the_small_world_s_settings(whole_run, world, tmp_path):
    """bf16, LoRA on convolutions on top of a fused LoRA, noise weights, a calibrated step; wandb without an account."""
    values = settings(
        world,
        tmp_path,
        mixed_precision="bf16",
        recon__dtype="bf16",
        lora__targets="attention+conv",
        pretrained__lora=str(whole_run / "final"),
        train__timestep_weighting="noise",
        train__skip_last_steps=1,
        train__timesteps_per_forward=2,
        train__kl_per_update=0.01,
        train__kl_calibration_updates=1,
        kl_estimator="analytic",
        per_prompt_stat_tracking__buffer_size=0,
        kl_per_prompt_stat_tracking=False,
        tracker="wandb",
        mrc__bbox_lpips=False,
        train__adv_clip_max=3.0,
        **FEW_FILES,
    )
    environment = {"HOME": str(tmp_path), "WANDB_MODE": None, "WANDB_API_KEY": None, "NETRC": None}
    assert children.run(children.train, values, environment) == 0
    run = tmp_path / "run"
    first, second = metrics(run, "update")
    assert first["kl_of_update"] > 0 and "kl_of_update" not in second
    assert metrics(run, "epoch")[2]["learning_rate"] == first["next_learning_rate"] != 3e-4
    assert metrics(run, "epoch")[2]["kl_mean"] > 0
    assert list(run.glob("wandb/offline-run-*"))
    assert_stock_diffusers_paints_with(run, world)
    names = load_file(run / "final" / LORA)
    assert any("conv1.lora_A" in name for name in names) and any("attn2.to_q" in name for name in names)


def test_no_reference_no_guidance_and_a_kl_that_is_spent(world, tmp_path):
    plain = dict(sample__guidance_scale=1.0, **FEW_FILES)
    no_reference = settings(
        world,
        tmp_path,
        run_name="no_reference",
        num_epochs=2,
        kl_penalty=False,
        log_kl=False,
        kl_in_reward=False,
        kl_per_prompt_stat_tracking=False,
        sample__save_images=0,
        **plain,
    )
    spent = settings(world, tmp_path, run_name="spent", stop_kl=1e-9, kl_estimator="analytic", num_epochs=50, **plain)
    processes = [children.start(children.train, values) for values in (no_reference, spent)]
    for process in processes:
        process.join(DEADLINE)
        assert process.exitcode == 0
    for line in metrics(tmp_path / "no_reference"):
        assert not [key for key in line if "kl" in key and key != "approx_kl"]
    assert not (tmp_path / "no_reference/samples").exists()
    # the first update is made in epoch 1, so the KL is seen in epoch 2
    assert [line["epoch"] for line in metrics(tmp_path / "spent", "epoch")] == [0, 1, 2]
    assert [folder.name for folder in checkpoints(tmp_path / "spent")] == ["checkpoint_0000", "checkpoint_0003"]
    resumed = dict(run_name="spent", resume_from=str(tmp_path / "spent"), num_epochs=50, stop_kl=1e-9, **plain)
    assert children.run(children.train, settings(world, tmp_path, kl_estimator="analytic", **resumed)) == 0
    assert [line["epoch"] for line in metrics(tmp_path / "spent", "epoch")] == [0, 1, 2]  # it stays stopped


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("--config.train.lerning_rate=1", "lerning_rate does not exist: did you mean config.train.learning_rate"),
        ("--config.resume_from=nowhere", "config.resume_from = 'nowhere' does not exist: give a run's folder"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(world, tmp_path, mistake, words):
    line = ["--config=config/base.py", *flags(world, tmp_path), mistake]
    done = children.command("carve3d_train", line, tmp_path)
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_resume_with_other_validation_prompts(whole_run, world, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    config = base.get_config()
    changes = dict(resume_from=str(tmp_path / "run"), prompts__val_file=str(world / "train.txt"))
    config.update_from_flattened_dict(settings(world, tmp_path, **changes))
    with pytest.raises(ValueError, match="val_file has other prompts .4. than those .*run was .* on .3.: .*tools.eval"):
        Run(config)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_not_written_over(whole_run, world):
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert children.run(children.train, settings(world, whole_run.parent)) == 1
    assert (whole_run / "metrics.jsonl").read_bytes() == before
