"""Rehearsals: checkpoints under the published names, and the whole path of every run in config/dgx.py."""

import contextlib
import inspect
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights

from config import dgx
from config.validate import ROOT
from diffusers_patch.instant3d_checkpoint import CONFIGS, PARTS, convert_instant3d
from diffusers_patch.mvdream import UNET_CONFIG
from diffusers_patch.mvdream_checkpoints import load_mvdream_pipeline
from recon import RECONSTRUCTORS
from recon.grm_checkpoint import convert
from recon.lgm import LGM
from recon.openlrm import OpenLRM
from tests import children
from tests.tiny_models import GOLDEN
from tools import rehearse
from tools.rehearsal import checkpoints as writers
from tools.rehearse import PROCESSES, Rehearsal

# as config/dgx.py itself shows them, with arguments
RUNS = sorted(set(re.findall(r"config/dgx\.py:(\w+(?:\([\d.]+\))?)", dgx.__doc__)))


def flat(tree, prefix=""):
    """{"a.b": shape} of {"a": {"b": shape}}."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def equal(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


# -- the checkpoints ------------------------------------------------------------------------------------------------


def test_instant3d_has_the_published_keys_and_shapes_at_full_size():
    with init_empty_weights():
        models = {name: part.make(CONFIGS[name]) for name, part in PARTS.items()}
    written = {key: list(value.shape) for key, value in writers.instant3d_weights(models).items()}
    assert written == flat(json.loads((GOLDEN / "instant3d_manifest.json").read_text()))


def test_the_unet_of_mvdream_has_the_published_keys_and_shapes_at_full_size():
    with torch.device("meta"):
        unet = writers.UNet2DConditionModel(**UNET_CONFIG)
    written = {key: list(value.shape) for key, value in writers.ldm_unet_weights(unet).items()}
    published = json.loads((GOLDEN / "mvdream_manifest.json").read_text())["ldm"]
    assert written == {f"model.diffusion_model.{key}": shape for key, shape in published.items()}


def test_conversion_is_the_inverse_of_writing(tmp_path):
    """Of what is stacked, transposed and renamed; and the weights of every other part."""
    models = writers.small_sdxl(tmp_path / "tokenizer")
    configs = {name: model.config for name, model in models.items()}
    for name, config in configs.items():
        configs[name] = config.to_diff_dict() if name.startswith("text") else config
    converted = convert_instant3d(writers.instant3d_weights(models), configs)
    assert all(equal(converted[name].state_dict(), model.state_dict()) for name, model in models.items())

    config = writers.text_config(writers.write_tokenizer(tmp_path / "clip"), num_hidden_layers=3)
    text = writers.CLIPTextModelWithProjection(config)
    unet, vae = writers.UNet2DConditionModel(**writers.MVDREAM_UNET), writers.AutoencoderKL(**writers.VAE)
    torch.save(writers.mvdream_weights(unet, vae, text), tmp_path / "mvdream.pt")
    pipeline = load_mvdream_pipeline(
        tmp_path / "mvdream.pt",
        tokenizer=str(tmp_path / "clip"),
        unet=writers.MVDREAM_UNET,
        vae=writers.VAE,
        text_encoder=config.to_diff_dict() | {"num_hidden_layers": 2},
    )
    assert equal(pipeline.unet.state_dict(), unet.state_dict()) and equal(pipeline.vae.state_dict(), vae.state_dict())
    whole = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
    read = {key.removeprefix("text_model."): value for key, value in pipeline.text_encoder.state_dict().items()}
    assert len(read) == 4 + 2 * 16 and all(torch.equal(value, whole[key]) for key, value in read.items())

    torch.manual_seed(3)
    written = OpenLRM(**writers.OPENLRM).state_dict()
    torch.manual_seed(3)
    assert equal(OpenLRM.from_pretrained(writers.write_openlrm(tmp_path).path).state_dict(), written)


@pytest.mark.parametrize("reconstructor", RECONSTRUCTORS)
def test_reconstructors_are_read_as_published(tmp_path, reconstructor):
    checkpoint = writers.WRITERS[reconstructor](tmp_path)
    if reconstructor == "grm":
        convert(checkpoint.path, tmp_path / "grm")
    if reconstructor == "lgm":
        assert LGM.from_pretrained(checkpoint.path).input_size == 32


# -- the whole path -------------------------------------------------------------------------------------------------


def test_every_run_is_rehearsed():
    """By the names of the functions in config/dgx.py, so that a new one must be shown there, and is rehearsed then."""
    functions = {
        name
        for name, function in inspect.getmembers(dgx, inspect.isfunction)
        if function.__module__ == dgx.__name__ and not name.startswith("_") and name != "get_config"
    }
    assert {run.partition("(")[0] for run in RUNS} == functions


def forked(command, log):
    """As `tools.rehearse.execute`, in processes that have imported everything already."""
    command = command[1:]
    processes = command[1] == "torch.distributed.run"
    _, module, *arguments = command[5:] if processes else command
    number = PROCESSES if processes else 1
    done = children.command(module, arguments, log.parent, number, rehearse.ENVIRONMENT)
    log.write_text(done.stdout + done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A rehearsal and what it said."""
    config = dgx.get_config("instant3d_grm")
    config.tracker = "none"
    flags = ["--config", str(ROOT / "config/dgx.py:instant3d_grm"), "--config.tracker=none"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        rehearsal = Rehearsal(config, flags, tmp_path_factory.mktemp("rehearsal") / "new", forked)
        rehearsal.run()
    return rehearsal, said.getvalue()


def test_a_rehearsal(rehearsed):
    rehearsal, said = rehearsed
    assert "sample.total_batch_size: 768 -> 8" in said and rehearse.NOT_SHOWN in said
    assert "sample.initial_latents" not in said and "recon.dtype" not in said  # stay as they are
    table = (rehearsal.folder / "table.md").read_text()
    assert table in said and table.count("| yes |") == 9 and "| NO |" not in table
    for words in ("2 epochs, 1 updates", "3 epochs, 2 updates", "2 of 3 prompts kept", "(trained), KL"):
        assert words in table


@pytest.mark.parametrize(
    "step, file, old, new, message",
    [
        ("resumption", "logs/run/metrics.jsonl", '"kind": "update"', '"kind": "other"', "0 updates instead of 3 and 2"),
        (
            "resumption",
            "logs/run/metrics.jsonl",
            '"grad_norm": ',
            '"grad_norm": null, "x": ',
            "grad_norm of the updates",
        ),
        ("resumption", "logs/run/metrics.jsonl", '"grad_norm": ', '"grad_norm": 0, "x": ', "gradient is zero"),
        ("resumption", "logs/run/metrics.jsonl", '"kind": "validation"', '"kind": "x"', "list index out of range"),
        (
            "evaluation",
            "evaluation/results.json",
            '"kl": {',
            '"kl": {"mean": 0.0}, "x": {',
            "the trained LoRA .* is 0.0",
        ),
        ("curation", "curated/kept.txt", "\n", " ", "1 kept of 3 prompts instead of 2 of 3"),
    ],
)
def test_what_did_not_come_out_is_noticed(rehearsed, step, file, old, new, message):
    rehearsal, _ = rehearsed
    (step,) = [one for one in rehearsal.steps() if one.name == step]
    rehearsal.execute = lambda command, log: 0
    file = rehearsal.folder / file
    content = file.read_text()
    assert rehearsal.attempt(step, None)[0] == "" and old in content
    file.write_text(content.replace(old, new))
    try:
        problem, outcome = rehearsal.attempt(step, None)
    finally:
        file.write_text(content)
    assert re.search(message, problem) and not outcome


@pytest.mark.parametrize("run", [run for run in RUNS if run != "instant3d_grm"])
def test_the_small_configuration_of_every_run_is_one_that_can_start(tmp_path, run):
    rehearsal = Rehearsal(dgx.get_config(run), ["--config", f"config/dgx.py:{run}"], tmp_path / "new", None)
    config = rehearsal.config
    assert config.sample.num_batches_per_epoch >= 2 and config.sample.batch_size > config.train.batch_size
    assert [step.name for step in rehearsal.steps()][-3:] == ["training", "resumption", "evaluation"]


@pytest.mark.parametrize("fault", ["exit status", "nothing came out"])
def test_a_step_that_fails_ends_a_rehearsal_with_its_log(tmp_path, capsys, fault):
    def execute(command, log):
        log.write_text("first words\nconvert_grm: the last words\n[E] torch/distributed/elastic/api.py\nnoise\n")
        return 3 if fault == "exit status" else 0

    rehearsal = Rehearsal(dgx.get_config("instant3d_grm"), [], tmp_path / "new", execute)
    with pytest.raises(ValueError, match="the step 'conversion of the painter' failed: its command ended") as error:
        rehearsal.run()
    said = capsys.readouterr().out
    assert ("exit status 3" if fault == "exit status" else "not all came out") in str(error.value)
    assert "| NO |" in said and "the last words" in said and "noise" not in said and "\n" not in str(error.value)


def test_an_old_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--out is '.*', which exists: name a new folder"):
        rehearse.main(SimpleNamespace(config=None, out=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_rehearsal_of_every_run(tmp_path, run):
    """As a user calls it."""
    command = [sys.executable, "-m", "tools.rehearse", "--config", f"config/dgx.py:{run}", "--out", tmp_path / "new"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| NO |" not in (tmp_path / "new" / "table.md").read_text()
