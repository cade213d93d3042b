"""Files that are wrong in one way each, for tests/test_bad_input.py."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny" / "weights"
LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Harmful:
    """Pickled, it is code that writes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def copy_of(source, target, without=()):
    """A folder of links to the files of `source`, except those named in `without` (relative paths of files)."""
    for file in Path(source).rglob("*"):
        name = str(file.relative_to(source))
        if file.is_file() and not any(name.startswith(left_out) for left_out in without):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(file)
    return target


def truncated(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(Path(source).read_bytes()[:-1000])


def harmful(target, executed):
    """A pickle that is no file of weights; if it is ever loaded, the file `executed` appears."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(pickle.dumps({"state_dict": Harmful(executed)}))


def make_prompts(folder):
    folder.mkdir()
    prompts = (ROOT / "prompts/tiny/train.txt").read_text().splitlines()[:20]
    (folder / "good.txt").write_text("\n".join(prompts))
    (folder / "latin1.txt").write_bytes("\n".join([*prompts[:2], "a red caf\xe9", *prompts[2:]]).encode("latin-1"))
    (folder / "twice.txt").write_text("\n".join([*prompts, prompts[4]]))
    (folder / "long.txt").write_text("\n".join([*prompts[:6], "a red cube " * 167, *prompts]))
    (folder / "empty.txt").write_text("\n\n")
    (folder / "no.json").write_text("{")
    (folder / "other.json").write_text('{"a": []}')
    (folder / "folder").mkdir()


def make_painters(folder, executed):
    painter = TINY / "painter"
    copy_of(painter, folder / "no_unet", without=["unet"])
    copy_of(painter, folder / "no_vae_weights", without=["vae/diffusion"])
    copy_of(painter, folder / "no_tokenizer", without=["tokenizer/"])
    copy_of(painter, folder / "no_index", without=["model_index.json"])
    copy_of(painter, folder / "bad_index", without=["model_index.json"])
    (folder / "bad_index/model_index.json").write_text("{")
    copy_of(painter, folder / "pickled", without=[UNET])
    harmful(folder / "pickled/unet/diffusion_pytorch_model.bin", executed)
    copy_of(painter, folder / "pickle_renamed", without=[UNET])
    harmful(folder / "pickle_renamed" / UNET, executed)
    copy_of(painter, folder / "truncated", without=[UNET])
    truncated(painter / UNET, folder / "truncated" / UNET)
    copy_of(painter, folder / "bad_scheduler", without=["scheduler"])
    (folder / "bad_scheduler/scheduler").mkdir()
    (folder / "bad_scheduler/scheduler/scheduler_config.json").write_text("{")
    copy_of(painter, folder / "other_unet", without=[UNET])
    (folder / "other_unet" / UNET).symlink_to(TINY / "mvdream" / UNET)
    copy_of(painter, folder / "leading", without=["scheduler"])
    scheduler = json.loads((painter / "scheduler/scheduler_config.json").read_text())
    (folder / "leading/scheduler").mkdir()
    (folder / "leading/scheduler/scheduler_config.json").write_text(
        json.dumps({**scheduler, "timestep_spacing": "leading"})
    )
    index = json.loads((painter / "model_index.json").read_text())
    code = f"open({str(executed)!r}, 'w')\n"
    copy_of(painter, folder / "code", without=["model_index.json"])
    (folder / "code/model_index.json").write_text(json.dumps({**index, "unet": ["my_unet", "MyUNet"]}))
    (folder / "code/unet/my_unet.py").write_text(code)
    copy_of(painter, folder / "code_pipeline", without=["model_index.json"])
    (folder / "code_pipeline/model_index.json").write_text(json.dumps({**index, "_class_name": ["mine", "Mine"]}))
    (folder / "code_pipeline/mine.py").write_text(code)
    harmful(folder / "ldm.pt", executed)
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary/vocab.json").write_text("{}")
    copy_of(TINY / "mvdream", folder / "mvdream_layout", without=[UNET, "unet/config.json"])
    (folder / "mvdream_layout/unet/config.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "mvdream_layout/unet/config.json").write_text('{"_class_name": "MultiViewUNetModel"}')
    harmful(folder / "mvdream_layout/unet/diffusion_pytorch_model.bin", executed)


def make_loras(folder, executed):
    good = load_file(TINY / "painter_defect" / LORA)
    truncated(TINY / "painter_defect" / LORA, folder / "truncated" / LORA)
    harmful(folder / "pickle" / LORA, executed)
    changed = {
        "empty": {},
        "nan": {**good, next(iter(good)): torch.full_like(next(iter(good.values())), float("nan"))},
        "shapes": {name: torch.cat([value, value], -1) for name, value in good.items()},
        "half": dict(list(good.items())[::2]),
        "good": good,
    }
    for name, weights in changed.items():
        (folder / name).mkdir()
        save_file(weights, folder / name / LORA)
    (folder / "nothing").mkdir()


def make_reconstructors(folder, executed):
    lrm = TINY / "lrm"
    for name, config in {"not_json": "{", "key": '{"widht": 32}', "value": '{"width": -3}', "word": '{"width": "x"}',
                         "list": "[]"}.items():  # fmt: skip
        copy_of(lrm, folder / f"config_{name}", without=["config.json"])
        (folder / f"config_{name}/config.json").write_text(config)
    copy_of(lrm, folder / "truncated", without=["model.safetensors"])
    truncated(lrm / "model.safetensors", folder / "truncated/model.safetensors")
    copy_of(lrm, folder / "pickle", without=["model.safetensors"])
    harmful(folder / "pickle/model.safetensors", executed)
    copy_of(lrm, folder / "other", without=["model.safetensors"])
    (folder / "other/model.safetensors").symlink_to(TINY / "classifier/model.safetensors")
    harmful(folder / "pickle.pth", executed)
    lpips = ROOT / "mrc/weights/lpips_alex_v0.1.safetensors"
    truncated(lpips, folder / "lpips_truncated.safetensors")
    harmful(folder / "lpips_pickle.safetensors", executed)
    (folder / "lpips_other.safetensors").symlink_to(lrm / "model.safetensors")


def make_pictures(folder):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(pixels).save(folder / f"good{i}.png")
        Image.fromarray(pixels[:1, :1]).save(folder / f"pixel{i}.png")
    good = (folder / "good0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no picture")
    Image.fromarray(pixels[:32]).save(folder / "oblong.png")


def make_runs(folder):
    """Folders of runs with two validations of two prompts, damaged in one way each."""
    from PIL.PngImagePlugin import PngInfo

    def run(name, scores=None, rewards=(0.1, 0.2), prompts=("a red cube", "a blue cone"), side=64, rows=None):
        for epoch in ("epoch_0000", "epoch_0001"):
            place = folder / name / "validation" / epoch
            place.mkdir(parents=True)
            text = scores if scores is not None else json.dumps({"prompts": prompts, "rewards": rewards})
            (place / "scores.json").write_text(text)
            for i in range(len(prompts)):
                info = PngInfo()
                info.add_text("rows", rows or json.dumps({"views": 4}))
                picture = Image.fromarray(np.full((side, 4 * side, 3), 200, np.uint8))
                picture.save(place / f"{i:04d}.png", pnginfo=info)
        return folder / name / "validation" / "epoch_0001"

    run("scores_cut", scores='{"prompts": ["a red')
    run("scores_list", scores="[1, 2]")
    run("scores_number", scores=json.dumps({"prompts": 5, "rewards": [1.0, 2.0]}))
    run("scores_nan", rewards=(float("nan"), 0.1))
    run("scores_numbers", prompts=(1, 2))
    run("scores_foreign", prompts=("a lion", "a tiger"))
    (run("picture_missing") / "0001.png").unlink()
    file = run("picture_cut") / "0000.png"
    file.write_bytes(file.read_bytes()[:60])
    file = run("picture_other") / "0000.png"
    Image.new("RGB", (8, 8)).save(file)
    run("picture_rows", rows='["views"]')
    run("picture_rows_many", rows='{"views": 3}')
    run("picture_no_rows", rows="{}")
    run("pictures_small", side=1)
    shutil.rmtree(run("one_validation"))
    shutil.copytree(folder / "scores_foreign", folder / "unwritable_result")
    for scores in (folder / "unwritable_result").rglob("scores.json"):
        scores.write_text(json.dumps({"prompts": ["a red cube", "a blue cone"], "rewards": [0.1, 0.2]}))
    (folder / "unwritable_result/evaluation.json").mkdir()


def make(folder):
    """Everything below the new `folder`. If the file `folder`/executed is ever there, code in one of them was run."""
    folder.mkdir()
    executed = folder / "executed"
    make_prompts(folder / "prompts")
    make_painters(folder / "painter", executed)
    make_loras(folder / "lora", executed)
    make_reconstructors(folder / "recon", executed)
    make_pictures(folder / "pictures")
    make_runs(folder / "runs")
    (folder / "file").write_text("a file\n")
    (folder / "empty_folder").mkdir()
    os.chmod(folder / "empty_folder", 0o755)
