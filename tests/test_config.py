"""Configurations: reached as DDPO users expect, with the paper's values and the same totals on any machine."""

import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from config import base, dgx, tiny
from config.batches import batch_table, trained_steps, updates_per_epoch
from config.cli import check_flags
from config.validate import CHOICES, RANGES, flatten, resolve, validate
from diffusers_patch.loading import PAINTERS
from diffusers_patch.policy import DTYPES, LORA_TARGETS
from mrc.rewards import REWARDS
from recon import RECONSTRUCTORS
from tests import children

ROOT = Path(__file__).resolve().parent.parent


def complete(config):
    """A configuration with what the user has to give."""
    config.pretrained.model = config.pretrained.model or "someone/painter"
    config.recon.checkpoint = config.recon.checkpoint or "reconstructor.safetensors"
    return config


def refused(match, processes=1, device_type=None, config=None, **changes):
    """Whether tiny's configuration with `changes` ("train__batch_size": 3) is refused with a sentence like `match`."""
    config = complete(config or tiny.get_config())
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    with pytest.raises(ValueError, match=match) as error:
        validate(config, processes, device_type, check_files=False)
    assert "\n" not in str(error.value)


def parse(*arguments):
    """What `--config ...` on the command line gives."""
    values = flags.FlagValues()
    line = ["train", *arguments]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=line)
    values(line)
    return values.config


###### Flags ######


@pytest.mark.parametrize(
    "name",
    [
        "config/base.py",
        "config/tiny.py",
        "config/tiny.py:mvdream",
        "config/tiny.py:clean",
        "config/tiny.py:exact",
        "config/tiny.py:best",
        "config/tiny.py:pairs",
        "config/dgx.py",
        "config/dgx.py:carve3d_train",
        "config/dgx.py:instant3d_grm",
        "config/dgx.py:instant3d_instantmesh",
        "config/dgx.py:mvdream_lgm",
        "config/dgx.py:mvdream_instantmesh",
    ],
)
def test_flags_reach_every_configuration(name):
    config = parse(
        "--config",
        str(ROOT / name),
        "--config.train.learning_rate=1e-3",
        "--config.use_lora=False",
        "--config.resume_from=logs/x",
        "--config.kl_beta=1",
        "--config.per_prompt_stat_tracking.min_count=2",
    )
    assert config.train.learning_rate == 1e-3 and config.use_lora is False and config.resume_from == "logs/x"
    assert isinstance(config.kl_beta, float) and config.per_prompt_stat_tracking.min_count == 2


def test_flags_reach_a_sweep():
    config = parse("--config", f"{ROOT}/config/dgx.py:data_size(10)")
    assert config.prompts.num_train == 10
    assert (config.per_prompt_stat_tracking.min_count, config.per_prompt_stat_tracking.buffer_size) == (76, 228)


@pytest.mark.parametrize("run", ["instant3d_grm", "instant3d_instantmesh", "mvdream_lgm", "mvdream_instantmesh"])
def test_runs_for_smaller_gpus(run):
    large, small = dgx.get_config(run), dgx.get_config(f"{run}(24)")
    assert not large.train.gradient_checkpointing and small.train.gradient_checkpointing
    assert small.sample.batch_size < large.sample.batch_size and small.sample.decode_batch_size == 1
    validate(complete(small), 1, "cuda", check_files=False)
    with pytest.raises(ValueError, match="12 GB are too few"):
        dgx.get_config(f"{run}(12)")


@pytest.mark.parametrize("name", ["carve3d", "", "data_size(10", "get_config", "__import__('os')"])
def test_unknown_run_is_named(name):
    with pytest.raises(ValueError, match="has no run .*carve3d_train, .*data_size"):
        dgx.get_config(name)


@pytest.mark.parametrize(
    "name",
    [
        "data_size",
        "data_size()",
        "data_size(0)",
        "data_size(2.5)",
        "multi_round(5)",
        "data_size(x)",
        "batch_size(-1)",
        "kl_coefficient",
        "data_size(700)",
    ],
)
def test_wrong_arguments_of_a_run_are_refused(name):
    with pytest.raises(ValueError):
        dgx.get_config(name)


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("--config.train.learning_rat=1", "config.train.learning_rate"),
        ("--config.trian.batch_size=1", "config.train.batch_size"),
        ("--config.learning_rate=1", "config.train.learning_rate"),
        ("--noconfig.use_lra", "config.use_lora"),
        ("--config.lora_rank=4", "config.lora.rank"),
        ("--config.kl_log=True", "config.log_kl"),
        ("--config.per_prompt_stat_tracking=None", "buffer_size=0"),
    ],
)
def test_misspelled_flag_is_refused_with_the_right_one(flag, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        check_flags(["train", "--config=config/tiny.py", flag])


def test_right_flags_pass():
    check_flags(
        [
            "train",
            "--config",
            "config/tiny.py",
            "--config.train.learning_rate=1",
            "--noconfig.use_lora",
            "--config.sample.prompt_suffix=, a = b",
            "--other.flag=1",
        ]
    )


###### Values ######


def test_defaults_are_the_papers():
    config = dgx.carve3d_train()
    assert (config.sample.num_steps, config.sample.eta, config.sample.guidance_scale) == (100, 1.0, 5.0)
    assert (config.lora.rank, config.lora.targets, config.mixed_precision) == (4, "attention", "fp16")
    train = config.train
    assert (
        train.learning_rate,
        train.adam_beta1,
        train.adam_beta2,
        train.adam_epsilon,
        train.adam_weight_decay,
        train.max_grad_norm,
    ) == (3e-4, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    assert (train.clip_range, train.adv_clip_max, train.num_inner_epochs) == (1e-4, 5.0, 1)
    assert train.timestep_fraction == 1.0
    assert (train.timestep_weighting, train.skip_last_steps, train.kl_per_update) == ("uniform", 0, 0.0)
    assert config.kl_penalty and config.kl_in_reward and config.kl_per_prompt_stat_tracking
    assert (config.kl_normalized_coeff, config.kl_estimator, config.num_epochs) == (0.2, "log_ratio", 55)
    assert config.prompts.num_train == 30
    assert (config.per_prompt_stat_tracking.min_count, config.per_prompt_stat_tracking.buffer_size) == (25, 75)


def test_published_machine_gives_published_numbers():
    config = validate(complete(dgx.carve3d_train()), 48, "cuda", check_files=False)
    assert (config.sample.batch_size, config.sample.num_batches_per_epoch) == (8, 2)
    assert (config.train.batch_size, config.train.gradient_accumulation_steps) == (4, 4)


@pytest.mark.parametrize("processes", [1, 2, 3, 6, 8, 16, 48, 64, 96, 768])
@pytest.mark.parametrize(
    "run, updates",
    [
        ("carve3d_train", 1),
        ("multi_round(2)", 2),
        ("multi_round(3)", 3),
        ("batch_size(768)", 1),
        ("kl_coefficient(0)", 1),
        ("instant3d_grm", 1),
    ],
)
def test_totals_do_not_depend_on_the_number_of_processes(processes, run, updates):
    config = complete(dgx.get_config(run))
    if config.train.total_batch_size % processes:
        return refused("cannot share evenly", processes, config=config)
    config = validate(config, processes, check_files=False)
    sample, train = config.sample, config.train
    assert sample.batch_size * processes * sample.num_batches_per_epoch == 768 == sample.total_batch_size
    assert train.batch_size * processes * train.gradient_accumulation_steps == 768 // updates
    assert sample.batch_size * sample.num_batches_per_epoch % train.batch_size == 0
    assert train.batch_size <= sample.batch_size
    assert updates_per_epoch(config) == updates


def test_per_process_numbers_win_over_totals_as_ddpo_users_expect():
    config = tiny.get_config()
    config.sample.batch_size, config.sample.num_batches_per_epoch = 4, 3
    config.train.batch_size, config.train.gradient_accumulation_steps = 2, 2
    validate(config, 2, check_files=False)
    assert (config.sample.total_batch_size, config.train.total_batch_size) == (24, 8)
    assert updates_per_epoch(config) == 3


def test_resolving_twice_changes_nothing():
    once = resolve(tiny.get_config(), 4)
    assert resolve(once.copy_and_resolve_references(), 4).to_dict() == once.to_dict()


def test_batch_table_tells_on_policy_from_off_policy():
    assert "purely on-policy" in batch_table(dgx.carve3d_train(), 8)
    table = batch_table(dgx.multi_round(3), 8)
    assert "off-policy" in table and "768 = 8 at a time x 12 batches x 8 processes" in table


@pytest.mark.parametrize("while_painting", [True, False])
def test_batch_table_tells_how_many_samples_are_painted_at_a_time(while_painting):
    config = dgx.carve3d_train()
    config.train.gradients_while_painting = while_painting
    line = next(line for line in batch_table(config, 8).splitlines() if "samples per epoch" in line)
    assert line.endswith("8 processes; after the first epoch 4 at a time" if while_painting else "8 processes")
    config.train.batch_size = config.sample.batch_size
    assert "after the first epoch" not in batch_table(config, 8)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, "gradients taken while painting, its step as long as chance leaves it"),
        (
            {"train.gradients_while_painting": False},
            "beyond_chance is not used: it needs gradients taken while painting",
        ),
        ({"train.use_8bit_adam": True}, "beyond_chance is not used"),
        ({"train.total_batch_size": 32}, "of 2 updates on the same samples; beyond_chance is not used"),
        ({"train.beyond_chance": False}, "gradients taken while painting\n"),
    ],
)
def test_batch_table_tells_how_long_steps_are(changes, told):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    assert told in batch_table(config, 1)


def test_batch_table_tells_when_gradients_are_taken():
    config = dgx.carve3d_train()
    for objective, painting in (("ddpo", True), ("awm", False)):
        config.train.objective = objective
        for words in ("taken while painting", "in the passes that paint them"):
            assert (words in batch_table(config, 8)) is painting


def test_every_enumerated_and_bounded_key_exists_and_has_an_allowed_default():
    keys = flatten(base.get_config())
    assert set(CHOICES) | set(RANGES) <= set(keys)
    numbers = {key for key, value in keys.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    assert numbers == set(RANGES)


def test_allowed_names_are_those_of_the_registries():
    registries = {"painter.name": PAINTERS, "recon.name": RECONSTRUCTORS, "reward_fn": REWARDS}
    registries |= {"mixed_precision": DTYPES, "lora.targets": LORA_TARGETS}
    for key, registry in registries.items():
        assert sorted(CHOICES[key]) == sorted(registry), key


def test_every_key_of_base_is_documented():
    lines = (ROOT / "config" / "base.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"    config\.[\w.]+ = (?!ConfigDict)", line) and "train.adam_" not in line:
            assert lines[number - 1].startswith("    #"), line


def test_tracking_is_turned_off_by_an_empty_buffer():
    config = tiny.get_config()
    config.per_prompt_stat_tracking.buffer_size = 0
    config.kl_per_prompt_stat_tracking = False
    assert validate(config, 1, check_files=False).per_prompt_stat_tracking is None
    assert validate(config, 1, check_files=False) is config


def test_paths_of_the_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(base.get_config(), 1)
    assert config.prompts.test_file == str(ROOT / "prompts" / "test.txt")


###### Contradictions ######


@pytest.mark.parametrize("run", ["grid", "mvdream", "clean", "exact", "pairs"])
def test_tiny_is_free_of_contradictions(run):
    for processes in (1, 2, 4, 8):
        validate(tiny.get_config(run), processes, "cpu", check_files=False)
    assert trained_steps(tiny.get_config(run)) == 4


def test_batch_contradictions():
    refused("train.batch_size is 64, larger than", train__batch_size=64)
    refused(
        "does not divide the 32 samples .* set it to 4",
        sample__batch_size=32,
        sample__num_batches_per_epoch=1,
        train__batch_size=5,
        train__gradient_accumulation_steps=2,
    )
    refused("an update takes 48 samples", train__batch_size=16, train__gradient_accumulation_steps=3)
    refused("an update takes 128 samples", train__total_batch_size=128)
    refused("cannot share evenly: run on 2, or set it to 66", processes=3)
    refused("are both 0", sample__total_batch_size=0)
    refused("are both 0", train__total_batch_size=0)


def test_step_contradictions():
    refused("leaves no step", train__skip_last_steps=8, train__timesteps_per_forward=1)
    refused("leaves no step to train: set it to 0.25", train__timestep_fraction=0.1)
    refused("only 2 steps", train__timestep_fraction=0.5, train__gradients_while_painting=False)
    refused("config.train.cfg is False", train__cfg=False)
    refused(r"sample.eta is 0.0: set it to a value in \(0, 1\]", sample__eta=0.0)


def test_a_run_may_end_before_its_step_is_calibrated():
    config = tiny.get_config()
    config.num_epochs, config.train.kl_calibration_updates = 3, 5
    validate(config, 1, check_files=False)


def test_the_advised_fraction_is_enough():
    """Also for fewer steps than would share a pass of the update: painting takes the gradient of each step apart."""
    config = tiny.get_config()
    config.train.timestep_fraction = 0.25
    assert trained_steps(validate(config, 1, check_files=False)) == 1


def test_keys_that_only_some_models_read_are_refused_for_others():
    refused("config.recon.input_views is 1, which only the reconstructor 'openlrm'", recon__input_views=1)
    refused(
        "initial_latents is 'gaussian_blob', which only the painter 'mv_sdxl' can follow",
        config=tiny.get_config("mvdream"),
        sample__initial_latents="gaussian_blob",
    )
    refused("config.sample.blob_std is 0.2, but config.sample.initial_latents is 'noise'", sample__blob_std=0.2)
    config = tiny.get_config()
    config.sample.initial_latents, config.sample.blob_std = "gaussian_blob", 0.2
    config.recon.name, config.recon.input_views = "openlrm", 1
    validate(config, 1, check_files=False)


def test_statistics_and_kl_contradictions():
    refused("smaller than min_count", per_prompt_stat_tracking__buffer_size=3)
    refused("there is no KL to put into", kl_penalty=False)
    refused("is off", per_prompt_stat_tracking__buffer_size=0)
    in_loss = dict(kl_in_reward=False)
    refused("a KL in the loss is one of every trained step", kl_timestep_fraction=0.5, **in_loss)
    refused("no KL is computed", kl_penalty=False, kl_in_reward=False, log_kl=False, stop_kl=1e-3)


def test_precision_contradictions():
    refused("needs a GPU", device_type="cpu", mixed_precision="fp16")
    refused("recon.dtype is 'fp16', which needs a GPU", device_type="cpu", recon__dtype="fp16")
    refused("needs a GPU", device_type="cpu", train__use_8bit_adam=True)


@pytest.mark.parametrize("key", sorted(CHOICES))
def test_unknown_names_are_refused_with_the_known_ones(key):
    refused(
        f"config.{re.escape(key)} is 'qqq': set it to one of {re.escape(repr(CHOICES[key][0]))}",
        **{key.replace(".", "__"): "qqq"},
    )


@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_out_of_range_are_refused(key):
    value = -2 if not key.endswith("empty_view_reward") else 1.0
    refused(f"config.{re.escape(key)} is .*: set it to a value in", **{key.replace(".", "__"): value})


def test_nan_is_refused():
    refused("learning_rate is nan", train__learning_rate=float("nan"))


def test_unknown_keys_and_wrong_types_are_refused_where_they_are_written():
    config = tiny.get_config()
    with pytest.raises(AttributeError, match="learning_rat"):
        config.train.learning_rat = 1.0
    for key, value in (("use_lora", "yes"), ("seed", "1"), ("num_epochs", 1.5), ("run_name", 3)):
        with pytest.raises(TypeError, match=key):
            config[key] = value
    config.seed = None  # the only value that the lock lets through for any type
    with pytest.raises(ValueError, match="config.seed is None: give it a value"):
        validate(config, 1, check_files=False)


def test_what_the_user_must_give():
    config = dgx.carve3d_train()
    with pytest.raises(ValueError, match="config.pretrained.model is empty: set --config.pretrained.model"):
        validate(config, 48, check_files=False)
    config.pretrained.model = "someone/painter"
    with pytest.raises(ValueError, match="config.recon.checkpoint is empty"):
        validate(config, 48, check_files=False)
    config.reward_fn = "jpeg_compressibility"  # needs no reconstructor
    validate(config, 48, check_files=False)


def test_missing_files_are_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    config = complete(base.get_config())
    with pytest.raises(FileNotFoundError, match="config.recon.checkpoint is 'reconstructor.safetensors'"):
        validate(config, 1)
    config.recon.checkpoint = str(file)
    validate(config, 1)
    config.pretrained.vae = "someone/vae"
    validate(config, 1)
    config.pretrained.vae = "vae.safetensors"
    with pytest.raises(FileNotFoundError, match="config.pretrained.vae is 'vae.safetensors', which does not exist"):
        validate(config, 1)
    config.pretrained.vae = ""
    config.pretrained.model = "tiny/nothing"  # looks like a hub id, but its first part is a folder of the repository
    with pytest.raises(FileNotFoundError, match="config.pretrained.model"):
        validate(config, 1)


###### The command line ######

BAD_FILES = {  # what a configuration file says, and words of the sentence that it gets
    "config.train.learning_rat = 1": "learning_rat",
    "config.num_epochs = 'many'": "num_epochs",
    "raise ValueError('no such world')": "no such world",
}


@pytest.fixture
def check_config(tmp_path):
    """check_config(*arguments): the finished command."""
    return lambda *arguments: children.command("tools.check_config", arguments, tmp_path)


def test_the_command_shows_the_batches(check_config):
    done = check_config("--processes", 2, "--config", "config/tiny.py", "--config.seed=1")
    assert done.returncode == 0 and "64 = 32 at a time x 1 batches x 2 processes" in done.stdout
    done = check_config("--help")
    assert done.returncode == 0 and "--processes" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.train.learning_rat=1"], "did you mean config.train.learning_rate"),
        (["--config.num_epochs=abc"], "config.num_epochs is 'abc': set it to a whole number"),
        (["--config.use_lora=maybe"], "config.use_lora is 'maybe': set it to True or False"),
        (["--config=nope.py"], "'nope.py', which does not exist"),
        (["--config=config/dgx.py:data_size(ten)"], "data_size(ten) has wrong arguments"),
        (["--config=config/dgx.py:nope"], "has no run 'nope': write one of carve3d_train, "),
        (["--config=config/dgx.py"], "prompts/curated/kept.txt does not exist"),
        (["tiny"], "'tiny' is not a flag"),
        (["--nope=1"], "nope"),
    ],
)
def test_mistakes_get_one_sentence(check_config, arguments, words):
    given = ["--config.pretrained.model=someone/painter", "--config.recon.checkpoint=someone/reconstructor"]
    done = check_config(*given, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("carve3d_train: ") and words in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("line", BAD_FILES)
def test_mistakes_in_a_configuration_file_get_one_sentence(check_config, line, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from config import base\n\ndef get_config():\n    config = base.get_config()\n    {line}\n")
    done = check_config("--config", file)
    assert done.returncode == 2 and BAD_FILES[line] in done.stderr and done.stderr.strip().count("\n") == 0
