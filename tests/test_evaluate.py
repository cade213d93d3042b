"""Evaluating LoRAs: the right numbers for the right prompts, killed and resumed, on one process and on two."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel
from transformers import CLIPConfig, CLIPModel

from config import base, cli
from ddpo.evaluation import Parts, batches, paired_p_value, relevant_keys, statistics, summarise, table
from ddpo.sampling import EVALUATION, make_generator
from diffusers_patch.checks import LORA_FILE
from diffusers_patch.loading import load_painter
from diffusers_patch.rollout import rollout
from mrc.clip_similarity import CLIPSimilarity
from mrc.rewards import load_mrc
from tests import children
from tests.tiny_models import flags, make_world, random_lrm, settings
from tiny.train_painter import make_tokenizer
from tools import evaluate, plot_sweep
from tools.rehearsal.checkpoints import TEXT

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a blue sphere", "a green cone", "a red cube"]
SAMPLES = 2


def configuration(world, **changes):
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(settings(world, world / "logs", **changes))
    return config


def save_clip(folder):
    """A CLIP of a few thousand random weights."""
    tokenizer = make_tokenizer(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=TEXT | ids | dict(vocab_size=len(tokenizer)),
        vision_config=vision | dict(image_size=24, patch_size=8),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)


def save_loras(world):
    """run/final, a LoRA that changes what is painted, in the folder of its run, and zeros/, one that does not."""
    config = configuration(world)
    policy = load_painter(config, "cpu")
    policy.add_lora(config.lora.rank)
    policy.save_lora(world / "zeros")
    for name, value in policy.trainable_state().items():
        if "lora_B" in name:
            value.normal_(std=0.2)
    policy.save_lora(world / "run/final")
    (world / "run/config.json").write_text(config.to_json_best_effort())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """tiny_models' world with LoRAs, a second judge, a CLIP, and prompts.txt."""
    world = make_world(tmp_path_factory.mktemp("world"))
    (world / "prompts.txt").write_text("\n".join(PROMPTS))
    save_clip(world / "clip")
    random_lrm().save_pretrained(world / "judge")
    save_loras(world)
    return world


def arguments(world, out):
    """The command line of the evaluation that most tests are about: 3 models x 2 batches."""
    own = ["--config", "config/base.py", f"--lora={world / 'zeros'}", f"--lora={world / 'run/final'}", "--pictures=2"]
    own += [f"--prompts={world / 'prompts.txt'}", f"--samples={SAMPLES}", f"--out={out}", f"--clip={world / 'clip'}"]
    return [*own, "--judge=tiny_lrm", f"--judge_checkpoint={world / 'judge'}", *flags(world, world / "logs")]


def command(arguments, log, deadly_call=0):
    """The command in a process of its own, which prints into the file `log`; it dies when it paints that batch."""
    os.chdir(ROOT)
    with open(log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    painted = []

    def deadly(*args, **kwargs):
        painted.append(None)
        if len(painted) == deadly_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return rollout(*args, **kwargs)

    evaluate.rollout = deadly
    sys.argv = ["evaluate", *arguments]
    cli.run("evaluate", evaluate.main, "config/base.py", evaluate.define_flags)


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    """The results of an evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert children.run(command, arguments(world, out), out.with_name("log")) == 0, out.with_name("log").read_text()
    return out


@pytest.fixture(scope="module")
def models(out):
    return list(json.loads((out / "results.json").read_text())["models"].values())


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* samples are not on white")
def test_every_number_is_that_of_its_prompt_noise_and_weights(world, models):
    """Painted again one by one, with the LoRA fused into the painter instead of loaded into the policy."""
    judges = {}
    for name, folder in (("mrc", "lrm"), ("judge", "judge")):
        judges[name] = load_mrc(configuration(world, recon__checkpoint=str(world / folder)), "cpu")
    clip = CLIPSimilarity(str(world / "clip"))
    for model, lora in zip(models[::2], ("", str(world / "run/final")), strict=True):
        config = configuration(world, pretrained__lora=lora)
        policy = load_painter(config, "cpu")
        for p, prompt in enumerate(PROMPTS):
            for s in range(SAMPLES):
                noise = [make_generator(0, EVALUATION, p, s)]
                views = rollout(policy, [prompt], 4, config.sample.guidance_scale, 1.0, noise).views
                expected = {name: -float(judge(views).reward) for name, judge in judges.items()}
                expected |= {"clip": float(clip(views, [prompt]))}
                found = {name: model["samples"][name][p][s] for name in expected}
                assert found == pytest.approx(expected, abs=2e-5), (lora, p, s)
    mrc, finetuned = (np.array(model["samples"]["mrc"]) for model in models[::2])
    assert np.abs(finetuned - mrc).min() > 1e-4  # so that none can be taken for another
    assert len(set(mrc.flatten().round(4))) == mrc.size


def test_a_lora_of_zeros_is_the_base_painter(models):
    base, zeros, finetuned = models
    assert zeros["samples"] == base["samples"] and zeros["mrc"]["p"] == 1 and zeros["mrc"]["difference"] == 0
    assert finetuned["kl"]["mean"] > 0 == base["kl"]["mean"]


def test_standard_errors_are_over_prompts():
    a, b = np.array([[1.0, 3.0], [4.0, 4.0], [5.0, 7.0]]), np.array([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])
    # prompt means 2, 4, 6 and 1, 2, 6: differences 1, 2, 0
    found = statistics(a, b)
    assert found["mean"] == 4 and found["se"] == pytest.approx(2 / 3**0.5)
    assert found["difference"] == 1 and found["difference_se"] == pytest.approx(1 / 3**0.5)
    assert found["relative"] == pytest.approx(1 / 3)
    assert found["p"] == pytest.approx(0.225403, abs=1e-6)  # t = sqrt(3), two degrees of freedom
    assert found["p"] == pytest.approx(ttest_rel([2, 4, 6], [1, 2, 6]).pvalue)
    one = statistics(a[:1], b[:1])
    assert one["se"] is one["difference_se"] is one["p"] is None and one["difference"] == 1
    assert paired_p_value(a[:, 0], a[:, 0]) == 1 and paired_p_value(a[:, 0] + 1, a[:, 0]) == 0


def test_the_table():
    values = {"mrc": 0.5, "kl": 0.0, "foreground": 0.25, "empty": 0.0, "judge": 0.5, "clip": 0.25}
    better = values | {"mrc": 0.25, "kl": 1e-4, "foreground": 0.3, "empty": 1.0}
    rows = {("base", 0): values, ("base", 1): values, ("a/final", 0): better, ("a/final", 1): better | {"mrc": 0.5}}
    lines = table(summarise(rows, {"base": {}, "a/final": {}}, 2, 1)).splitlines()
    assert lines[0] == "| painter | MRC ↓ | difference | p | KL | foreground | empty | judge ↓ | CLIP ↑ |"
    assert lines[2] == "| base | 0.500 ± 0.000 |  |  |  |  | 0.0 % | 0.500 ± 0.000 | 0.250 ± 0.000 |"
    assert lines[3].startswith("| a/final | 0.375 ± 0.125 | -0.125 ± 0.125 | 0.5 | 1.0e-04 | +20.0 % | 100.0 % |")
    assert lines[3].endswith("| 0.500 ± 0.000 (+0.000 ± 0.000) | 0.250 ± 0.000 (+0.000 ± 0.000) |")
    without = {key: {k: v for k, v in row.items() if k not in ("judge", "clip")} for key, row in rows.items()}
    rows["a/final", 1].pop("clip")
    assert "CLIP" not in table(summarise(rows, {"base": {}, "a/final": {}}, 2, 1))  # not of all samples
    assert "CLIP" not in table(summarise(without, {"base": {}, "a/final": {}}, 2, 1))


def test_what_samples_depend_on():
    """Where the chain starts counts, how many samples are painted at a time does not."""
    keys = relevant_keys(base.get_config(), "kl_estimator")
    assert keys["config.sample.initial_latents"] == "noise" and keys["config.kl_estimator"] == "log_ratio"
    assert {"config.sample.blob_std", "config.sample.guidance_rescale", "config.recon.name"} < keys.keys()
    assert not {"config.sample.batch_size", "config.recon.device", "config.seed"} & keys.keys()


def test_what_is_left_and_printed(world, out, models):
    assert sorted(file.name for file in out.iterdir()) == [
        "parts",
        "pictures.png",
        "results.json",
        "table.html",
        "table.md",
    ]
    text = (out / "table.md").read_text()
    assert "diversity ↑" in text.splitlines()[0]  # there are two samples of each prompt
    assert len(text.splitlines()) == 5 and text in out.with_name("log").read_text()
    picture = np.asarray(Image.open(out / "pictures.png"))
    assert picture.std() > 0 and picture.shape[0] > 6 * 96  # three models, painted and re-rendered
    assert models[2]["run"] == {"prompts.num_train": 4, "train.total_batch_size": 8, "kl_normalized_coeff": 0.2}
    assert models[1]["run"] is None
    assert evaluate.run_of(world / "run/lora/epoch_0003") == models[2]["run"]


def test_batches_are_of_about_one_size_and_keep_prompts_together():
    assert batches(7, 1, 3) == [[0, 1, 2], [3, 4], [5, 6]] and batches(2, 1, 8) == [[0, 1]]
    assert batches(3, 2, 4) == [[0, 1, 2, 3], [4, 5]] and batches(3, 2, 5) == [[0, 1, 2, 3], [4, 5]]
    assert batches(2, 3, 2) == [[0, 1], [2, 3], [4, 5]]  # a prompt's samples do not fit


# -- killed, resumed, shared -------------------------------------------------------------------------------------------


def test_killed_on_one_process_and_resumed_on_two_it_ends_with_the_same_numbers(world, out, tmp_path):
    line = arguments(world, tmp_path / "out")
    assert children.run(command, line, tmp_path / "log", 2) == -signal.SIGKILL
    file = tmp_path / "out/parts/process_0000.jsonl"
    painted = file.read_text()
    assert len(painted.split()) > 1 and not (tmp_path / "out/results.json").exists()
    with file.open("a") as half:
        half.write('{"model": "base", "sam')  # as if it had been killed while writing
    done = children.command("tools.evaluate", line, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| base |") == 1  # one table, not one per process
    assert (tmp_path / "out/results.json").read_text() == (out / "results.json").read_text()
    assert (tmp_path / "out/pictures.png").read_bytes() == (out / "pictures.png").read_bytes()
    both = [(tmp_path / f"out/parts/process_000{rank}.jsonl").read_text() for rank in (0, 1)]
    assert both[0].startswith(painted) and both[1].strip()
    assert "".join(both).count('"clip"') == 3 * len(PROMPTS) * SAMPLES  # nothing was painted twice


def test_a_finished_evaluation_paints_nothing_again(world, out, tmp_path):
    before = {file: file.read_bytes() for file in (out / "results.json", out / "pictures.png")}
    assert children.run(command, arguments(world, out), tmp_path / "log", 1) == 0  # it would die if it painted
    assert before == {file: file.read_bytes() for file in before}


def test_results_of_other_settings_are_refused(world, out):
    given = dict(lora=[str(world / "zeros"), str(world / "run/final")], clip=str(world / "clip"), judge="tiny_lrm")
    given |= dict(judge_checkpoint=str(world / "judge"), prompts=str(world / "prompts.txt"), out=out)
    evaluate.Evaluation(args_of(world, **given))  # the same settings
    with pytest.raises(ValueError, match=r"other settings \(config.sample.num_steps\): give another --out"):
        evaluate.main(args_of(world, **given, sample__num_steps=5))
    with pytest.raises(ValueError, match=r"other settings \(--clip, --prompts\)"):
        evaluate.main(args_of(world, **given | dict(prompts="", clip=None)))
    with pytest.raises(ValueError, match=r"other settings \(--lora\)"):
        evaluate.main(args_of(world, **given | dict(lora=[str(world / "zeros")])))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    parts = Parts(tmp_path, {})
    parts.open(0)
    with pytest.raises(ValueError, match="a number of 'base' is not finite"):
        parts.add("base", [0], {"mrc": torch.tensor([float("nan")])})
    assert not parts.rows()


# -- mistakes ----------------------------------------------------------------------------------------------------------


def args_of(world, **changes):
    """Parsed flags; changes of flags, and of configuration keys with __ for the dot."""
    own = dict(lora=[], prompts="", samples=SAMPLES, pictures=2, out="")
    own |= dict(judge=None, judge_checkpoint=None, met3r=False, clip=None)
    keys = {key: value for key, value in changes.items() if key not in own}
    return SimpleNamespace(config=configuration(world, **keys), **{key: changes.get(key, own[key]) for key in own})


def test_a_judge_of_any_cameras_gets_the_painters(world):
    config = configuration(world, painter__name="mvdream", painter__elevation=5.0)
    judge = evaluate.judge_config(config, "instantmesh", "x").recon
    assert (judge.name, judge.cameras, judge.elevation) == ("instantmesh", "mvdream", 5.0)
    assert evaluate.judge_config(configuration(world), "instantmesh", "x").recon.cameras == "instant3d"


def broken_loras(world, folder):
    """{kind: folder} of LoRAs that cannot be evaluated."""
    good = load_file(world / "run/final" / LORA_FILE)
    kinds = {
        "empty": {},
        "nan": {name: value * float("nan") for name, value in good.items()},
        "rank": {name: torch.cat([value, value], dim=int("lora_B" in name)) for name, value in good.items()},
        "painter": {name.replace("mid_block", "other"): value for name, value in good.items()},
    }
    for kind, weights in kinds.items():
        (folder / kind).mkdir()
        save_file(weights, folder / kind / LORA_FILE)
    content = (world / "run/final" / LORA_FILE).read_bytes()
    for kind, part in (("copy", content), ("damaged", content[:500])):
        (folder / kind).mkdir()
        (folder / kind / LORA_FILE).write_bytes(part)
    return {kind: str(folder / kind) for kind in (*kinds, "copy", "damaged")}


def test_mistakes_are_answered_with_a_sentence_before_anything_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "met3r", None)  # as if it were not installed
    lora = broken_loras(world, tmp_path)
    (tmp_path / "file").touch()
    shutil.copytree(world / "clip", tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    save_file({k: v for k, v in weights.items() if "text_projection" not in k}, tmp_path / "half/model.safetensors")
    for changes, words in (
        (dict(lora=["nowhere"]), "--lora = 'nowhere' does not exist: give a folder with a LoRA"),
        (dict(lora=[lora["empty"]]), "--lora = .* has no weights in its pytorch_lora_weights.safetensors: give"),
        (dict(lora=[lora["damaged"]]), "--lora = .* could not be read"),
        (dict(lora=[lora["nan"]]), "NaN or infinite numbers in .* its training diverged"),
        (dict(lora=[lora["copy"], str(world / "run/final")]), "hold the same weights: leave one out"),
        (dict(lora=[lora["rank"]]), r"64 weights differ, such as .* with \(8, 32\) instead of \(4, 32\); config.lora"),
        (dict(lora=[lora["painter"]]), r"32 weights differ, such as mid_block.* with nothing instead of \(4, 32\)"),
        (dict(out=str(tmp_path / "file")), "--out is .*, which is a file: name a folder"),
        (dict(prompts="nowhere.txt"), "nowhere.txt does not exist"),
        (dict(judge="lgm"), "--judge and --judge_checkpoint belong together"),
        (dict(judge="lgm", judge_checkpoint="x"), "--judge=lgm cannot judge the painter 'mv_sdxl': elevations are"),
        (dict(judge="tiny_lrm", judge_checkpoint="nowhere"), "--judge cannot be loaded: .*'nowhere' has no"),
        (dict(met3r=True), "--met3r cannot be loaded: the package met3r could not be loaded .*: install it with `pip"),
        (dict(clip="nowhere"), "--clip cannot be loaded: 'nowhere' is neither a folder nor a hub id"),
        (dict(clip=str(world / "painter/text_encoder")), "is not a CLIP that transformers can load"),
        (dict(clip=str(tmp_path / "half")), "lacks 1 weights of a CLIP"),
        (dict(recon__checkpoint=""), "config.recon.checkpoint is empty"),
    ):
        out = tmp_path / "out"
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            evaluate.main(args_of(world, **{"out": str(out), **changes}))
        assert "\n" not in str(error.value) and not out.exists(), changes


@pytest.mark.parametrize("flag, words", [("--samples=0", "samples"), ("--judge=lgn", "tiny_lrm|lgm|grm|openlrm")])
def test_wrong_flags_are_answered_with_a_sentence(world, tmp_path, flag, words):
    assert children.run(command, [*arguments(world, tmp_path / "out"), flag], tmp_path / "log") == 2
    log = (tmp_path / "log").read_text()
    assert log.startswith("evaluate: ") and words in log and len(log.splitlines()) == 1


# -- sweeps ------------------------------------------------------------------------------------------------------------


def write_results(folder, samples=4, **loras):
    """results.json with LoRAs {name: (training prompts, samples per update, MRC)}."""
    models = {"base": {"mrc": {"mean": 0.2, "se": 0.01}}}
    for name, (num_train, batch, mrc) in loras.items():
        run = {"prompts.num_train": num_train, "train.total_batch_size": batch, "kl_normalized_coeff": 0.2}
        models[name] = {"sha256": name, "run": run, "mrc": {"mean": mrc, "se": 0.01}}
    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps({"settings": {"--samples": samples, "--lora": []}, "models": models})
    )
    return folder


def test_a_sweep_is_drawn_over_the_key_that_differs(tmp_path):
    first = write_results(tmp_path / "first", a=(10, 768, 0.18), b=(30, 768, 0.15))
    second = write_results(tmp_path / "second", c=(30, 768, 0.14), d=(100, 768, 0.19))
    base, loras = plot_sweep.read_results([first, second])
    assert plot_sweep.swept_key(loras) == "prompts.num_train" and len(loras) == 4
    plot_sweep.main([str(first), str(second), "--out", str(tmp_path / "new/sweep.png")])
    assert np.asarray(Image.open(tmp_path / "new/sweep.png")).std() > 0


def test_sweeps_that_say_nothing_are_refused(tmp_path):
    one = write_results(tmp_path / "one", a=(30, 768, 0.1))
    both = write_results(tmp_path / "both", b=(10, 384, 0.1))
    other = write_results(tmp_path / "other", samples=2, c=(10, 768, 0.1))
    for folders, words in (
        ([one], "differ in none of config.prompts.num_train, config.train.total_batch_size"),
        ([one, both], "differ in config.prompts.num_train: 10, 30; config.train.total_batch_size: 384, 768: give runs"),
        ([one, other], r"different settings \(--samples\)"),
        ([one, tmp_path], "results.json does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            plot_sweep.main([*map(str, folders), "--out", str(tmp_path / "sweep.png")])
        assert not (tmp_path / "sweep.png").exists()
