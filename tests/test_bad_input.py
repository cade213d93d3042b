"""A mistake of the user gets one sentence that names the key or file, what was found and what to do, as the only line,
with exit status 2, before anything slow, and nothing is left behind. The whole list, through the commands."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import bad_files, children

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # most for any of them, on a machine that is busy with other tests
TRAIN = "carve3d_train.sh"
MVDREAM = "--config=config/tiny.py:mvdream"


@dataclass(frozen=True)
class Bad:
    """One bad input.

    name: of the row. arguments: of the command, in one string; {bad} = the folder of tests/bad_files.py.
    words: what the sentence must say. command: TRAIN or the module of a tool.
    loads: it takes weights to find the mistake, so that TRAIN finds it in its workers and not in its check.
    environment: variables for TRAIN.
    """

    name: str
    arguments: str
    words: tuple[str, ...]
    command: str = TRAIN
    loads: bool = False
    environment: dict = field(default_factory=dict)


def prompts(file):
    return f"--config.prompts.train_file={{bad}}/prompts/{file}"


def painter(folder, lora=""):
    return f"--config.pretrained.model={{bad}}/painter/{folder} --config.pretrained.lora={lora}"


def lora(folder):
    return f"--config.pretrained.lora={{bad}}/lora/{folder}"


def recon(file):
    return f"--config.recon.checkpoint={{bad}}/recon/{file}"


def lpips(kind):
    return f"--config.mrc.lpips_checkpoint={{bad}}/recon/lpips_{kind}.safetensors"


FLAGS = [
    Bad("word for a number", "--config.num_epochs=abc", ("config.num_epochs", "'abc'", "whole number")),
    Bad("fraction for a whole number", "--config.num_epochs=1.5", ("config.num_epochs", "'1.5'", "whole number")),
    Bad("word for a fraction", "--config.train.learning_rate=fast", ("config.train.learning_rate", "'fast'", "number")),
    Bad("word for a switch", "--config.use_lora=maybe", ("config.use_lora", "'maybe'", "True or False")),
    Bad("abbreviated key", "--config.train.lr=1e-3", ("config.train.lr ", "config.train.learning_rate")),
    Bad("misspelled key", "--config.train.batchsize=4", ("config.train.batch_size",)),
    Bad("a section", "--config.train=3", ("config.train ", "config.train.")),
    Bad("seed of 23 digits", "--config.seed=12345678901234567890123", ("config.seed", "1234567890123456789012")),
    Bad("leftover word", "--config.seed=1 foo", ("'foo'", "--config.KEY=VALUE")),
    Bad("leftover words after --", "--config.seed=1 -- foo", ("'foo'", "--config.KEY=VALUE")),
    Bad("number behind flags", "--config.seed=1 2", ("'2'", "--config.KEY=VALUE")),
    Bad("value apart from its key", "--config.seed= 1", ("config.seed", "whole number")),
    Bad("two --config", "--config=config/tiny.py --config=config/dgx.py", ("--config", "twice")),
    Bad("two --config apart", "--config config/tiny.py --config.seed=1 --config config/dgx.py", ("--config", "twice")),
    Bad("no such configuration", "--config=nope.py", ("'nope.py'", "does not exist", "config/tiny.py")),
    Bad("configuration is a folder", "--config=config", ("'config'", "config/tiny.py")),
    Bad("configuration is no Python", "--config=README.md", ("README.md", "CARVE3D_DEBUG")),
    Bad("--config without a value", "--config", ("--config", "config/tiny.py")),
    Bad("words for a number of a run", "--config=config/dgx.py:data_size(ten)", ("data_size(ten)", "data_size(10)")),
    Bad("word for kl_coefficient", "--config=config/dgx.py:kl_coefficient('a')", ("kl_coefficient('a')", "number")),
    Bad("word for gigabytes", "--config=config/dgx.py:mvdream_lgm('a')", ("mvdream_lgm('a')", "number")),
    Bad("no such run", "--config=config/tiny.py:nope", ("'nope'", "grid, mvdream")),
    Bad("steps outside the table", "--config.sample.num_steps=1001", ("config.sample.num_steps", "1000")),
    Bad("a billion samples", "--config.sample.total_batch_size=1000000000 --config.train.total_batch_size=1000000000",
        ("config.sample.total_batch_size", "1000000000")),
    Bad("a billion samples by batches", "--config.sample.num_batches_per_epoch=100000000",
        ("config.sample.num_batches_per_epoch",)),
    Bad("a billion pixels", "--config.recon.render_size=1000000000", ("config.recon.render_size",)),
    Bad("rank of a billion", "--config.lora.rank=1000000000", ("config.lora.rank",)),
    Bad("infinite learning rate", "--config.train.learning_rate=inf", ("config.train.learning_rate", "inf")),
    Bad("no such device", "--config.recon.device=gpu", ("config.recon.device", "'gpu'", "cuda:1")),
    Bad("device that is not there", "--config.recon.device=cuda:7", ("config.recon.device", "'cuda:7'")),
    Bad("steps outside the scheduler's table", "--config.sample.num_steps=1000 --config.pretrained.lora= "
        "--config.pretrained.model={bad}/painter/leading", ("config.sample.num_steps", "1000", "999 or less")),
    Bad("fp16 without a GPU", "--config.mixed_precision=fp16", ("config.mixed_precision", "GPU", "bf16")),
    Bad("fp16 reconstructor without a GPU", "--config.recon.dtype=fp16", ("config.recon.dtype", "GPU", "bf16")),
    Bad("8-bit Adam without a GPU", "--config.train.use_8bit_adam=True", ("config.train.use_8bit_adam", "GPU")),
    Bad("cameras that differ", "--config.recon.name=lgm", ("'mv_sdxl'", "'lgm'", "config.painter.name")),
]  # fmt: skip

PROMPTS = [
    Bad("Latin-1", prompts("latin1.txt"), ("latin1.txt", "line 3", "UTF-8")),
    Bad("a folder of prompts", prompts("folder"), ("prompts/folder", "is a folder")),
    Bad("no prompt file", prompts("none.txt"), ("prompts/none.txt", "does not exist")),
    Bad(
        "a prompt twice", prompts("twice.txt") + " --config.prompts.num_train=0", ("twice.txt", "prompt 21", "prompt 5")
    ),
    Bad("500 words", prompts("long.txt"), ("long.txt", "line 7", "501 words")),
    Bad("no prompts", prompts("empty.txt"), ("empty.txt", "no prompts")),
    Bad("damaged JSON", prompts("no.json"), ("no.json", "not JSON")),
    Bad("JSON of something else", prompts("other.json"), ("other.json", "dreamfusion")),
    Bad("too few prompts", prompts("good.txt") + " --config.prompts.num_train=50", ("good.txt", "20", "num_train")),
    Bad("validation prompts in Latin-1", "--config.prompts.val_file={bad}/prompts/latin1.txt", ("latin1.txt", "UTF-8")),
]

PAINTER = [
    Bad("painter without a UNet", painter("no_unet"), ("no_unet/unet/config.json", "does not exist")),
    Bad("painter without VAE weights", painter("no_vae_weights"), ("no_vae_weights", "vae")),
    Bad("painter without a tokenizer", painter("no_tokenizer"), ("no_tokenizer", "tokenizer")),
    Bad("painter without an index", painter("no_index"), ("no_index", "model_index.json")),
    Bad("painter with a damaged index", painter("bad_index"), ("bad_index", "model_index.json")),
    Bad("painter with a damaged scheduler", painter("bad_scheduler"), ("bad_scheduler", "scheduler_config.json")),
    Bad("painter that is pickled", painter("pickled"), ("pickled", "unet", "no code in it was run")),
    Bad("pickle under a painter's safetensors", painter("pickle_renamed"), ("pickle_renamed", "safetensors")),
    Bad("truncated painter", painter("truncated"), ("truncated", "diffusion_pytorch_model", "incomplete")),
    Bad("weights of another UNet", painter("other_unet"), ("other_unet", "unet"), loads=True),
    Bad("code in place of the UNet", painter("code"), ("code", "my_unet", "never run")),
    Bad("code in place of the pipeline", painter("code_pipeline"), ("code_pipeline", "never run")),
    Bad("MVDream given as mv_sdxl", "--config.pretrained.model=tiny/weights/mvdream --config.pretrained.lora=",
        ("tiny/weights/mvdream", "StableDiffusionPipeline", "config.painter.name", "'mvdream'")),
    Bad("mv_sdxl given as MVDream", MVDREAM + " --config.pretrained.model=tiny/weights/painter "
        "--config.pretrained.lora=",
        ("tiny/weights/painter", "StableDiffusionXLPipeline", "config.painter.name", "'mv_sdxl'")),
    Bad("file given as mv_sdxl", "--config.pretrained.model={bad}/file", ("is a file", "convert_instant3d")),
    Bad("hub id without a network", "--config.pretrained.model=someone/painter",
        ("config.pretrained.model", "someone/painter", "no network", "give a folder")),
    Bad("hub id of a VAE without a network", "--config.pretrained.vae=someone/vae",
        ("config.pretrained.vae", "someone/vae", "no network", "give a folder")),
    Bad("harmful ldm file", MVDREAM + " --config.pretrained.model={bad}/painter/ldm.pt "
        "--config.pretrained.tokenizer={bad}/painter/vocabulary", ("ldm.pt", "no code in it was run")),
    Bad("ldm file without a tokenizer", MVDREAM + " --config.pretrained.model={bad}/painter/ldm.pt",
        ("ldm.pt", "config.pretrained.tokenizer")),
    Bad("harmful UNet of MVDream's layout", MVDREAM + " --config.pretrained.model={bad}/painter/mvdream_layout "
        "--config.pretrained.lora=", ("diffusion_pytorch_model.bin", "no code in it was run")),
    Bad("VAE that is none", "--config.pretrained.vae=tiny/weights/painter/unet", ("config.pretrained.vae", "UNet2D")),
    Bad("VAE that is empty", "--config.pretrained.vae={bad}/empty_folder", ("config.pretrained.vae", "empty_folder")),
    Bad("LoRA truncated", lora("truncated"), ("lora/truncated", "incomplete")),
    Bad("LoRA that is a pickle", lora("pickle"), ("lora/pickle", "not a safetensors file")),
    Bad("LoRA of other shapes", lora("shapes"), ("config.pretrained.lora", "lora/shapes", "does not fit")),
    Bad("LoRA of another painter", "--config.pretrained.lora=tiny/weights/mvdream_defect",
        ("config.pretrained.lora", "mvdream_defect", "does not fit")),
    Bad("LoRA without tensors", lora("empty"), ("config.pretrained.lora", "lora/empty", "no weights")),
    Bad("half a LoRA", lora("half"), ("config.pretrained.lora", "lora/half", "lora_")),
    Bad("LoRA with NaN", lora("nan"), ("config.pretrained.lora", "lora/nan", "NaN")),
    Bad("file of a LoRA", "--config.pretrained.lora={bad}/lora/good/pytorch_lora_weights.safetensors",
        ("config.pretrained.lora", "is a file", "folder")),
    Bad("folder without a LoRA", lora("nothing"), ("config.pretrained.lora", "pytorch_lora_weights.safetensors")),
]  # fmt: skip

JUDGE = [
    Bad("reconstructor truncated", recon("truncated"), ("recon/truncated/model.safetensors", "incomplete")),
    Bad("hub id of a reconstructor without a network", "--config.recon.checkpoint=someone/lrm",
        ("config.recon.checkpoint", "someone/lrm", "no network", "give a folder")),
    Bad("reconstructor that is another model", recon("other"), ("recon/other", "TinyLRM"), loads=True),
    Bad("reconstructor that is a pickle", recon("pickle"), ("recon/pickle/model.safetensors",)),
    Bad("configuration that is not JSON", recon("config_not_json"), ("config_not_json/config.json",)),
    Bad("configuration with another key", recon("config_key"), ("config_key/config.json", "widht"), loads=True),
    Bad("configuration with a negative size", recon("config_value"), ("config_value/config.json",), loads=True),
    Bad("configuration with a word", recon("config_word"), ("config_word/config.json",), loads=True),
    Bad("configuration that is a list", recon("config_list"), ("config_list/config.json",)),
    Bad("reconstructor that is a file", "--config.recon.checkpoint={bad}/file", ("config.recon.checkpoint"),
        loads=True),
    Bad("harmful LGM", "--config.recon.name=lgm --config.recon.checkpoint={bad}/recon/pickle.pth " + MVDREAM
        + " --config.painter.elevation=0. --config.painter.azimuth_start=90.",
        ("pickle.pth", "no code in it was run")),
    Bad("LPIPS truncated", lpips("truncated"), ("config.mrc.lpips_checkpoint", "incomplete")),
    Bad("LPIPS that is a pickle", lpips("pickle"), ("config.mrc.lpips_checkpoint", "safetensors")),
    Bad("LPIPS of another model", lpips("other"), ("config.mrc.lpips_checkpoint", "missing"), loads=True),
]  # fmt: skip

PLACES = [
    Bad("logdir is a file", "--config.logdir={bad}/file", ("config.logdir", "is a file")),
    Bad("logdir below a file", "--config.logdir={bad}/file/logs", ("config.logdir", "/file", "is a file")),
    Bad("logdir not writable", "--config.logdir=/proc/carve3d", ("config.logdir", "/proc", "cannot be written")),
    Bad("run_name with ..", "--config.run_name=../x", ("config.run_name", "'../x'", "config.logdir")),
    Bad("run_name with .. inside", "--config.run_name=a/../../x", ("config.run_name", "config.logdir")),
    Bad("run_name .", "--config.run_name=.", ("config.run_name", "'.'")),
    Bad("run_name absolute", "--config.run_name=/tmp/x", ("config.run_name", "'/tmp/x'", "config.logdir")),
    Bad("run_name too long", f"--config.run_name={'x' * 300}", ("config.run_name", "255")),
    Bad("resume_from a file", "--config.resume_from={bad}/file", ("config.resume_from", "is a file")),
    Bad("resume_from an empty folder", "--config.resume_from={bad}/empty_folder", ("config.resume_from", "checkpoint")),
    Bad("resume_from nothing", "--config.resume_from={bad}/nope", ("config.resume_from", "does not exist")),
]

SHOW = "tools.show_scene"
GOOD = " ".join(f"{{bad}}/pictures/good{i}.png" for i in range(4))
VALIDATE, EVALUATE, CURATE = "tools.validate_mrc", "tools.evaluate", "tools.curate_prompts"
PAINT = "tools.show_painter"
TOOLS = [
    Bad("too few pictures", "{bad}/pictures/good0.png", ("1 picture", "4"), SHOW),
    Bad("damaged picture", GOOD.replace("good2", "cut"), ("cut.png", "damaged"), SHOW),
    Bad("picture that is text", GOOD.replace("good2", "text"), ("text.png", "PNG"), SHOW),
    Bad("picture that is missing", GOOD.replace("good2", "none"), ("none.png", "does not exist"), SHOW),
    Bad("picture that is a folder", GOOD.replace("good2.png", ""), ("pictures/", "is a folder"), SHOW),
    Bad("oblong picture", GOOD.replace("good2", "oblong"), ("oblong.png", "64x32"), SHOW),
    Bad("pictures of one pixel", GOOD.replace("good", "pixel"), ("pixel0.png", "1 pixel"), SHOW),
    Bad("show_scene --out a file", GOOD + " --out={bad}/file", ("--out", "is a file"), SHOW),
    Bad("show_scene: not a size", GOOD + " --config.recon.render_size=8", ("config.recon.render_size", "8"), SHOW),
    Bad("show_scene: no such model", GOOD + " --config.recon.name=nope", ("config.recon.name", "'nope'"), SHOW),
    Bad("show_scene: no weights", GOOD + " --config.recon.checkpoint=", ("config.recon.checkpoint",), SHOW),
    Bad("show_scene: fp16", GOOD + " --config.recon.dtype=fp16", ("config.recon.dtype", "GPU"), SHOW),
    Bad("validate_mrc --out a file", "--out={bad}/file", ("--out", "is a file"), VALIDATE),
    Bad("validate_mrc --out not writable", "--out=/proc/carve3d", ("--out", "cannot be written"), VALIDATE),
    Bad("validate_mrc --objects 0", "--objects=0", ("objects",), VALIDATE),
    Bad("validate_mrc: a picture", "{bad}/pictures/cut.png", ("cut.png", "is not a flag"), VALIDATE),
    Bad("validate_mrc: not a size", "--config.recon.render_size=-5", ("config.recon.render_size", "-5"), VALIDATE),
    Bad("validate_mrc: no such arithmetic", "--config.recon.dtype=half", ("config.recon.dtype", "'half'"), VALIDATE),
    Bad("validate_mrc: no such device", "--config.recon.device=gpu", ("config.recon.device", "'gpu'"), VALIDATE),
    Bad("validate_mrc: foreground of all", "--config.mrc.min_foreground=7.0", ("config.mrc.min_foreground",), VALIDATE),
    Bad("validate_mrc: no LPIPS", "--config.mrc.lpips_checkpoint=x", ("config.mrc.lpips_checkpoint", "'x'"), VALIDATE),
    Bad("evaluate --out a file", "--out={bad}/file", ("--out", "is a file"), EVALUATE),
    Bad("evaluate --out below a file", "--out={bad}/file/out", ("--out", "is a file"), EVALUATE),
    Bad("evaluate --out not writable", "--out=/proc/carve3d", ("--out", "cannot be written"), EVALUATE),
    Bad("evaluate --lora truncated", "--lora={bad}/lora/truncated", ("--lora", "incomplete"), EVALUATE),
    Bad("evaluate --lora a pickle", "--lora={bad}/lora/pickle", ("--lora", "not a safetensors file"), EVALUATE),
    Bad("evaluate --lora without tensors", "--lora={bad}/lora/empty", ("--lora", "no weights"), EVALUATE),
    Bad("evaluate --lora with NaN", "--lora={bad}/lora/nan", ("--lora", "NaN"), EVALUATE),
    Bad("evaluate --lora a file", "--lora={bad}/lora/good/pytorch_lora_weights.safetensors", ("--lora", "is a file"),
        EVALUATE),
    Bad("evaluate --lora nothing", "--lora={bad}/lora/none", ("--lora", "does not exist"), EVALUATE),
    Bad("evaluate --lora of other shapes", "--lora={bad}/lora/shapes", ("lora/shapes", "does not fit"), EVALUATE),
    Bad("evaluate --lora of another painter", "--lora=tiny/weights/mvdream_defect", ("does not fit",), EVALUATE),
    Bad("evaluate --prompts in Latin-1", "--prompts={bad}/prompts/latin1.txt", ("latin1.txt", "UTF-8"), EVALUATE),
    Bad("evaluate --samples 0", "--samples=0", ("samples",), EVALUATE),
    Bad("evaluate --samples many", "--samples=many", ("samples", "many"), EVALUATE),
    Bad("evaluate --judge unknown", "--judge=nope", ("judge", "nope"), EVALUATE),
    Bad("evaluate --clip nothing", "--clip=nope", ("--clip", "'nope'"), EVALUATE),
    Bad("evaluate leftover word", "foo", ("'foo'", "not a flag"), EVALUATE),
    Bad("curate --out a file", "--config=config/tiny.py --out={bad}/file", ("--out", "is a file"), CURATE),
    Bad("curate --candidates in Latin-1", "--config=config/tiny.py --candidates={bad}/prompts/latin1.txt",
        ("latin1.txt", "UTF-8"), CURATE),
    Bad("curate --keep too many", "--config=config/tiny.py --keep=1000", ("--keep", "1000"), CURATE),
    Bad("show_painter --out a folder", "--out={bad}/empty_folder", ("--out", "is a folder"), PAINT),
    Bad("show_painter --out below a file", "--out={bad}/file/x.png", ("--out", "is a file"), PAINT),
    Bad("show_painter --out no picture", "--out={bad}/x.txt", ("--out", "x.txt", ".png"), PAINT),
    Bad("check_config --processes 0", "--processes=0", ("processes",), "tools.check_config"),
    Bad("check_config --processes many", "--processes=many", ("processes", "many"), "tools.check_config"),
    Bad("plan --gpus none", "--gpus=0", ("gpus",), "tools.plan"),
    Bad("plot_sweep of nothing", "{bad}/empty_folder", ("results.json", "does not exist"), "tools.plot_sweep"),
    Bad("plot_sweep without folders", "", ("folders",), "tools.plot_sweep"),
    Bad("convert_grm of a pickle", "{bad}/recon/pickle.pth {bad}/out", ("pickle.pth", "no code in it was run"),
        "tools.convert_grm"),
    Bad("convert_grm of nothing", "{bad}/nope {bad}/out", ("nope", "grm_u.pth"), "tools.convert_grm"),
    Bad("convert_grm to a file", "{bad}/recon/pickle.pth {bad}/file", ("file",), "tools.convert_grm"),
    Bad("convert_instant3d of a pickle", "{bad}/recon/pickle.pth {bad}/out "
        "--tokenizer=tiny/weights/painter", ("49408",), "tools.convert_instant3d"),
    Bad("convert_instant3d to a file", "{bad}/file {bad}/file", ("file", "exists"), "tools.convert_instant3d"),
    Bad("convert_mvdream of a pickle", "{bad}/painter/ldm.pt {bad}/out --tokenizer {bad}/painter/vocabulary",
        ("ldm.pt", "no code in it was run"), "tools.convert_mvdream"),
    Bad("convert_mvdream to a file", "tiny/weights/mvdream {bad}/file", ("OUT", "exists"), "tools.convert_mvdream"),
    Bad("convert_mvdream of nothing", "{bad}/nope {bad}/out", ("nope",), "tools.convert_mvdream"),
]  # fmt: skip

JUDGED = "tiny.evaluate"
RUNS = [
    Bad("no run", "{bad}/runs/none", ("runs/none", "validation"), JUDGED),
    Bad("run that is a file", "{bad}/file", ("file",), JUDGED),
    Bad("one validation", "{bad}/runs/one_validation", ("one_validation", "two"), JUDGED),
    Bad("scores cut", "{bad}/runs/scores_cut", ("scores.json", "damaged"), JUDGED),
    Bad("scores that are a list", "{bad}/runs/scores_list", ("scores.json", "damaged"), JUDGED),
    Bad("prompts that are a number", "{bad}/runs/scores_number", ("scores.json", "damaged"), JUDGED),
    Bad("prompts that are numbers", "{bad}/runs/scores_numbers", ("scores.json", "damaged"), JUDGED),
    Bad("rewards that are NaN", "{bad}/runs/scores_nan", ("scores.json", "finite"), JUDGED),
    Bad("captions of another world", "{bad}/runs/scores_foreign", ("epoch_0000", "'a lion'"), JUDGED),
    Bad("picture missing", "{bad}/runs/picture_missing", ("epoch_0001/0001.png", "missing"), JUDGED),
    Bad("picture cut", "{bad}/runs/picture_cut", ("epoch_0001/0000.png",), JUDGED),
    Bad("picture of something else", "{bad}/runs/picture_other", ("epoch_0001/0000.png",), JUDGED),
    Bad("picture with a list of rows", "{bad}/runs/picture_rows", ("epoch_0000/0000.png",), JUDGED),
    Bad("picture with other rows", "{bad}/runs/picture_rows_many", ("epoch_0000/0000.png",), JUDGED),
    Bad("picture without rows", "{bad}/runs/picture_no_rows", ("epoch_0000/0000.png",), JUDGED),
    Bad("views of one pixel", "{bad}/runs/pictures_small", ("epoch_0000/0000.png", "64"), JUDGED),
    Bad("result that cannot be written", "{bad}/runs/unwritable_result", ("evaluation.json",), JUDGED),
    Bad("no such defect", "{bad}/runs/none --defect=nope", ("nope",), JUDGED),
    Bad("comparison of damaged runs", "{bad}/runs/scores_cut --out={bad}/x.png", ("scores.json",), "tiny.compare_runs"),
]

LAUNCH = [
    Bad("minus one", "-1", ("'-1'", "NUM_NODES")),
    Bad("zero machines", "0", ("'0'", "NUM_NODES")),
    Bad("word for a number of machines", "tiny", ("'tiny'", "NUM_NODES")),
    Bad("one machine without a GPU", "1", ("GPU",)),
    Bad("two machines without an address", "2", ("MASTER_ADDR",)),
    Bad("environment that cannot be written", "", ("CARVE3D_VENV", "/proc/venv"), environment={"CARVE3D_VENV":
        "/proc/venv"}),
    Bad("environment that is a file", "", ("CARVE3D_VENV", "is a file"), environment={"CARVE3D_VENV": "{bad}/file"}),
    Bad("no number of processes", "", ("CARVE3D_PROCESSES", "'x'"), environment={"CARVE3D_PROCESSES": "x"}),
    Bad("processes that cannot share", "", ("config.sample.total_batch_size", "3 processes"),
        environment={"CARVE3D_PROCESSES": "3"}),
]  # fmt: skip

TABLE = {
    "flags": FLAGS,
    "prompts": PROMPTS,
    "painter": PAINTER,
    "judge": JUDGE,
    "places": PLACES,
    "tools": TOOLS,
    "runs": RUNS,
    "launch": LAUNCH,
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "bad"
    bad_files.make(folder)
    return folder


def files(bad):
    """All that a command could leave behind: files with the time of their last change, and the names in logs/, where
    somebody's run may be writing at the same time."""
    written = {file: file.lstat().st_mtime_ns for folder in (bad, bad.parent / "logs") for file in folder.rglob("*")}
    return written | {file: 0 for file in (ROOT / "logs").glob("*")}


def in_process(row, bad, folder):
    """A row's command, finished, in a process that has imported everything: for TRAIN its check, and, for
    a row that this must let pass, the trainer."""
    arguments = row.arguments.format(bad=bad).split()
    if row.command != TRAIN:
        return children.command(row.command, arguments, folder)
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", "config/tiny.py", *arguments]
    check = ["--device", "cpu", "--processes", "2", *arguments]
    done = children.command("tools.check_config", check, folder)
    if row.loads:
        if done.returncode != 0:
            done.stderr = f"found by the check, before anything is loaded\n{done.stderr}"
            return done
        # in a place of its own, because other processes that test look for what is left as well
        return children.command("carve3d_train", [*arguments, f"--config.logdir={bad.parent}/logs"], folder)
    return done


def through_the_shell(row, bad):
    """A row's command, finished, as the user types it."""
    arguments = row.arguments.format(bad=bad).split()
    command = ["bash", TRAIN] if row.command == TRAIN else [sys.executable, "-m", row.command]
    chosen = {"CARVE3D_VENV": sys.prefix, "CARVE3D_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": ""}
    chosen |= {name: value.format(bad=bad) for name, value in row.environment.items()}
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def complaints(row, done, left):
    """What is wrong with the answer to a row, as a list of texts."""
    code, error = done.returncode, done.stderr
    lines = [line for line in error.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    found = [f"exit status {code}"] * (code != 2)
    found += [f"{len(lines)} lines"] * (len(lines) != 1 and not error.startswith("usage:"))
    found += [f"{word!r} is not said" for word in row.words if word not in last]
    found += ["a traceback"] * ("Traceback" in error)
    found += [f"{file} is left" for file in left]
    return [f"{row.name}: {', '.join(found)}\n{error}"] if found else []


def answers(rows, answer, bad):
    """The complaints of all `rows`; answer: row -> its finished command."""
    found, before = [], files(bad)
    for row in rows:
        done = answer(row)
        after = files(bad)
        found += complaints(row, done, sorted(str(file) for file in after if before.get(file) != after[file]))
        before = after
    return found


@pytest.mark.parametrize("section", TABLE)
def test_every_bad_input_gets_one_sentence(section, bad, tmp_path):
    if section == "launch":  # all but the last are told by the script itself, in no time
        found = answers(LAUNCH, lambda row: through_the_shell(row, bad), bad)
    else:
        found = answers(TABLE[section], lambda row: in_process(row, bad, tmp_path), bad)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("section", TABLE)
def test_every_bad_input_through_the_shell(section, bad):
    found = answers(TABLE[section], lambda row: through_the_shell(row, bad), bad)
    assert not found, "\n".join(found)


###### Several processes ######

SCRIPT = """
import time, os
from pathlib import Path
import numpy as np
from config.cli import one_sentence
from config.errors import UserError

rank = int(os.environ["RANK"])
with one_sentence("script"):
    {body}
"""


@pytest.fixture
def launch(tmp_path):
    """launch(body, **environment): exit status and stderr of two processes with these lines inside `one_sentence`."""

    def launch(body, **environment):
        (tmp_path / "script.py").write_text(SCRIPT.format(body=body))
        line = ["--nproc_per_node", "2", "--standalone", tmp_path / "script.py"]
        done = children.command("tools.launch", line, tmp_path, environment={"PYTHONPATH": str(ROOT), **environment})
        return done.returncode, done.stderr

    return launch


def test_processes_tell_a_mistake_once(launch):
    assert launch("raise UserError('a mistake')") == (2, "script: a mistake\n")


def test_the_process_that_found_the_mistake_speaks_and_those_that_broke_off_do_not(launch):
    body = (
        "if rank: raise UserError('a mistake')\n"
        "    said = Path(os.environ['TORCHELASTIC_ERROR_FILE']).parents[1] / 'user_error'\n"
        "    while not said.exists(): time.sleep(0.01)\n"
        "    raise RuntimeError('connection closed by peer')"
    )
    assert launch(body) == (2, "script: a mistake\n")


@pytest.mark.parametrize("body", ["np.zeros(3).reshape(2, 2)", "open('nothing')", "raise KeyError('x')"])
def test_any_other_error_keeps_its_traceback(launch, body):
    code, error = launch(body)
    assert code == 1 and "Traceback" in error and body in error and "script.py FAILED" in error


def test_debugging_shows_where_a_mistake_was_found(launch):
    code, error = launch("raise UserError('a mistake')", CARVE3D_DEBUG="1")
    assert code == 1 and "Traceback" in error and "config.errors.UserError: a mistake" in error


def test_a_full_disk_is_told_in_one_sentence(launch):
    code, error = launch("import errno; raise OSError(errno.ENOSPC, 'No space left on device', 'x.png')")
    assert (code, error) == (2, "script: [Errno 28] No space left on device: 'x.png'\n")
