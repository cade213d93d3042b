"""Evaluate LoRAs: how consistent is what they paint, and at what price, compared with the base painter?

    python -m tools.evaluate --config config/tiny.py --lora logs/RUN/final [--config.KEY=VALUE ...]

--lora              folder that a run wrote, logs/RUN/final or logs/RUN/lora/epoch_XXXX; repeat the flag for several
--prompts           file with the prompts (config.prompts.test_file)
--samples           how often each prompt is painted (4)
--pictures          how many of the prompts are shown, from the first (8)
--judge             another reconstructor that judges the same views, by its config.recon.name
--judge_checkpoint  its weights
--met3r             also judge by MEt3R, a package of its own: mrc/met3r_distance.py
--clip              folder or hub id of a CLIP that compares the views with their caption
--out               folder for the results (logs/evaluate)

The base painter and every LoRA paint with the same noise, which follows from a prompt's place in the file and the
sample's number alone. Any number of processes share the work:

    torchrun --nproc_per_node 8 -m tools.evaluate --config ...    (or accelerate launch -m tools.evaluate ...)

On several machines --out must be a folder that all of them see. An evaluation that was killed resumes when it is called
again, on any number of processes, and ends with the same numbers. In --out there are afterwards
    results.json   every number, and what it depends on; python -m tools.plot_sweep draws several of these files
    table.md       the table that is printed
    table.html     the same with the pictures, and with links to the reports of the LoRAs' runs
    pictures.png   the first sample of the first prompts, painted over re-rendered
    parts/         each sample's numbers as the processes wrote them, from which a killed evaluation resumes

The table has means over prompts, after averaging over the samples of a prompt, which are not independent, and standard
errors over prompts:
    MRC          mean LPIPS between painted and re-rendered views; -config.mrc.empty_view_reward for an empty view
    difference   to the base painter, paired by prompt; p is that of a paired t-test
    KL           to the base painter, as config.kl_estimator estimates it: nats per dimension, mean over trained steps
    foreground   relative change of the share of the views that the object covers
    empty        share of the samples with an empty view
    silhouettes, held-out view    see mrc/judges.py; with MRC they are asked of every painter
    judge        MRC by --judge
    MEt3R, CLIP  feature distance of neighbouring views by --met3r, and cosine between caption and views by --clip
    diversity    mean LPIPS between the samples of a prompt, if it has several that fit into config.sample.batch_size
behind each of these the difference to the base

A warning follows where MRC is better and two judges are not, and where it was paid for: pictures that grow alike, or no
longer show their caption, can be consistent, so no judge minds, but diversity and CLIP do.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from config import cli
from config.errors import UserError
from config.validate import ANY_CAMERAS, CHOICES, check_folder, flatten, validate
from ddpo.evaluation import BASE, SWEPT, Parts, batches, doubtful, paid, relevant_keys, summarise, table
from ddpo.files import whole, write_whole
from ddpo.pictures import load_views, sample_picture, save_views, to_bytes
from ddpo.progress import Progress
from ddpo.report import write_table
from ddpo.run_log import ROWS
from ddpo.sampling import EVALUATION, make_generator
from ddpo.setup import set_arithmetic, start_accelerator
from ddpo.steps import draw_reference_steps
from diffusers_patch.checks import KINDS, LORA_FILE, check_cameras, painter_cameras, read_lora
from diffusers_patch.loading import load_painter
from diffusers_patch.rollout import rollout
from mrc.clip_similarity import CLIPSimilarity
from mrc.judges import diversity
from mrc.met3r_distance import MEt3RDistance
from mrc.mrc import resize_views
from mrc.rewards import load_reward
from prompts.dataset import load_prompts
from recon import reconstructor_cameras
from recon.cameras import camera_disagreement


def read_loras(folders: Sequence[str]) -> dict[str, dict]:
    """{folder: {"sha256" of its weights, "run": see `run_of`}}.

    Raises UserError as `read_lora`, and for the same weights as another's."""
    loras = {}
    for folder in folders:
        read_lora(folder, {}, "--lora", "give a folder that a run wrote, such as logs/RUN/final")
        file = Path(folder) / LORA_FILE
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        for other, lora in loras.items():
            if lora["sha256"] == sha256:
                raise UserError(f"--lora names {other!r} and {folder!r}, which hold the same weights: leave one out")
        loras[folder] = {"sha256": sha256, "run": run_of(folder)}
    return loras


def run_of(folder: str | Path) -> dict[str, float] | None:
    """The SWEPT keys of the run that wrote a LoRA, `folder` being its final/ or lora/epoch_XXXX/; None if not found."""
    for parent in _run_folders(folder):
        try:
            keys = flatten(ConfigDict(json.loads((parent / "config.json").read_text())))
            return {key: keys[key] for key in SWEPT}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no file, or one of something else
    return None


def report_of(folder: str | Path) -> Path | None:
    """The report of the run that wrote a LoRA, `folder` being its final/ or lora/epoch_XXXX/; None if there is none."""
    reports = [parent / "report.html" for parent in _run_folders(folder)]
    return next((report for report in reports if report.exists()), None)


def _run_folders(folder):
    """Where the run may be that wrote a LoRA: above its final/, or above the lora/ of its lora/epoch_XXXX/."""
    return list(Path(folder).resolve().parents)[:2]


def judge_config(config: ConfigDict, name: str | None, checkpoint: str | None) -> ConfigDict | None:
    """`config` with the reconstructor of --judge; None without one.

    Raises UserError if only one of the two flags is given, or if the painter's cameras are not the judge's."""
    if not name and not checkpoint:
        return None
    if not name or not checkpoint:
        raise UserError("--judge and --judge_checkpoint belong together: give both, or neither for no second judge")
    judge = copy.deepcopy(config)
    judge.recon.name, judge.recon.checkpoint = name, checkpoint
    if name in ANY_CAMERAS:
        judge.recon.cameras, judge.recon.elevation = KINDS[config.painter.name].rig, config.painter.elevation
    problems = camera_disagreement(painter_cameras(config.painter), reconstructor_cameras(judge.recon))
    if problems:
        raise UserError(
            f"--judge={name} cannot judge the painter {config.painter.name!r}: {'; '.join(problems)}; choose another "
            f"--judge, or none"
        )
    return judge


def load_measure(
    config: ConfigDict, judge: ConfigDict | None, met3r: bool, clip: str | None, several: bool, device: torch.device
) -> Callable:
    """A function (views (B, V, 3, S, S) in [0, 1], captions) -> ({quantity: (B,)}, renders (B, V, 3, S, S)).

    several: every caption comes several times, so that there is a diversity."""
    similarity = _load("--clip", CLIPSimilarity, clip, device) if clip else None
    neighbours = _load("--met3r", MEt3RDistance, device) if met3r else None
    second = _load("--judge", load_reward, judge, device) if judge else None
    first = load_reward(config, device)

    def measure(views, captions):
        result = first.judged(views, captions)
        foreground, empty = result.foreground.mean(1), result.empty.any(1).float()
        values = {"mrc": -result.reward, "foreground": foreground, "empty": empty, **result.judges}
        if second:
            values["judge"] = -second(views, captions).reward
        if neighbours:
            values["met3r"] = neighbours(views)
        if several:
            values["diversity"] = diversity(views.to(first.judge.reconstructor.device), captions, first.judge.lpips)
        if similarity:
            values["clip"] = similarity(views, captions)
        return values, resize_views(result.renders, views.shape[-1])

    return measure


def _load(flag, load, *args):
    """`load(*args)`, whose errors then name the flag."""
    try:
        return load(*args)
    except UserError as error:
        raise UserError(f"{flag} cannot be loaded: {error}") from error


class Evaluation:
    """One evaluation: checked and loaded when it is made, painted and reported by `run`."""

    def __init__(self, args):
        self.config, self.out, self.samples = config, out, samples = args.config, Path(args.out), args.samples
        config.reward_fn, config.tracker = "mrc", "none"  # whatever the training used
        config.prompts.test_file = args.prompts or config.prompts.test_file
        check_folder("--out", out)
        self.accelerator = start_accelerator(config)
        device = self.accelerator.device
        validate(config, 1, device.type)  # as for one process: the samples need not be shared evenly
        check_cameras(config)
        self.prompts = load_prompts(config.prompts.test_file)
        self.models = {BASE: {}, **read_loras(args.lora)}
        judge = judge_config(config, args.judge, args.judge_checkpoint)
        given = {
            "--lora": [[folder, lora["sha256"]] for folder, lora in self.models.items() if folder != BASE],
            "--prompts": self.prompts,
            "--samples": samples,
            "--judge": args.judge,
            "--judge_checkpoint": args.judge_checkpoint,
            "--met3r": args.met3r,
            "--clip": args.clip,
        }
        keys = relevant_keys(config, "lora.", "train.skip_last_steps", "kl_estimator")
        self.parts = Parts(out / "parts", given | keys)
        self.shown = {p * samples: p for p in range(min(args.pictures, len(self.prompts)))}  # sample -> prompt

        set_arithmetic(config)
        several = 1 < samples <= config.sample.batch_size
        self.measure = load_measure(config, judge, args.met3r, args.clip, several, device)
        self.policy = load_painter(config, device)
        self.policy.add_lora(config.lora.rank, config.lora.targets)
        for folder in args.lora:
            self.policy.load_lora(folder)  # to refuse one that does not fit before anything is painted

    def run(self) -> None:
        """Paint and score what is missing, and report."""
        accelerator, work = self.accelerator, self.missing()
        accelerator.wait_for_everyone()  # all have seen what there is before one adds to it
        self.parts.open(accelerator.process_index)
        mine = work[accelerator.process_index :: accelerator.num_processes]
        progress = Progress("evaluating", len(mine), "batches", accelerator.is_local_main_process)
        painting = None
        for model, batch in progress.over(mine):
            if model != painting:
                self.switch_to(model)
                painting = model
            self.batch(model, batch)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.report()
        accelerator.end_training()

    def missing(self) -> list[tuple[str, list[int]]]:
        """(model, samples) of every batch that is not complete."""
        rows = self.parts.rows()

        def complete(model, batch):
            pictures = [self.picture(model, i) for i in batch if i in self.shown]
            return all((model, i) in rows for i in batch) and all(file.exists() for file in pictures)

        together = batches(len(self.prompts), self.samples, self.config.sample.batch_size)
        return [(model, batch) for model in self.models for batch in together if not complete(model, batch)]

    def switch_to(self, model: str) -> None:
        """Let the policy paint as `model`: BASE, or the folder of a LoRA."""
        if model == BASE:
            self.policy.unet.disable_adapters()
        else:
            self.policy.unet.enable_adapters()
            self.policy.load_lora(model)

    def batch(self, model: str, batch: Sequence[int]) -> None:
        """Paint and score the samples `batch` of `model`, to which the policy is switched."""
        sample = self.config.sample
        captions = [self.prompts[i // self.samples] for i in batch]
        trajectory = rollout(
            self.policy,
            [caption + sample.prompt_suffix for caption in captions],
            sample.num_steps,
            sample.guidance_scale,
            sample.eta,
            # seed 0: the noise is the same in evaluations of any runs
            [make_generator(0, EVALUATION, *divmod(i, self.samples)) for i in batch],
            score_reference=model != BASE,
            reference_steps=draw_reference_steps(self.config),
        )
        values, renders = self.measure(trajectory.views, captions)
        kl = trajectory.kl(self.config.kl_estimator, self.config.train.skip_last_steps)
        values["kl"] = torch.zeros(len(batch)) if kl is None else kl
        for row, i in enumerate(batch):
            if i in self.shown:
                images = {"views": to_bytes(trajectory.views[row]), "renders": to_bytes(renders[row])}
                save_views(images, self.picture(model, i))
        self.parts.add(model, batch, values)

    def picture(self, model: str, i: int) -> Path:
        return self.parts.picture(list(self.models).index(model), i)

    def report(self) -> None:
        """results.json, table.md, pictures.png, and the table on the screen."""
        summary = summarise(self.parts.rows(), self.models, len(self.prompts), self.samples)
        results = {"settings": self.parts.settings, "models": summary}
        write_whole(self.out / "results.json", json.dumps(results, indent=1))
        write_whole(self.out / "table.md", table(summary))
        picture = self.draw(summary) if self.shown else None
        about = f"{len(self.prompts)} prompts x {self.samples} samples, mean ± standard error over prompts"
        reports = {folder: report for folder in self.models if (report := report_of(folder))}
        alt = "Samples by every painter, painted over re-rendered"
        write_table(self.out / "table.html", "Evaluation", about, table(summary), reports, picture, alt)
        print(f"{table(summary)}\n\n{about}\nwrote {self.out / 'results.json'} and {self.out / 'table.html'}")
        for model, judges in doubtful(summary).items():
            print(f"warning: {model} has a better MRC than the base model, but not by {' and '.join(judges)}")
        for model, prices in paid(summary).items():
            print(f"warning: {model} has a better MRC than the base model, and paid for it with {' and '.join(prices)}")

    def draw(self, summary: dict[str, dict]) -> Image.Image:
        """pictures.png, also returned: the shown prompts' first samples by every model, painted over re-rendered."""
        rows = {}
        for model in summary:
            images = [load_views(self.picture(model, i)) for i in self.shown]
            for name, label in ROWS.items():
                rows[f"{model}, {label}"] = torch.stack([image[name] for image in images]) / 255
        mrc = [[result["samples"]["mrc"][p][0] for result in summary.values()] for p in self.shown.values()]
        notes = ["MRC " + ", ".join(f"{value:.3f}" for value in values) for values in mrc]
        picture = sample_picture(rows, notes, self.prompts)
        with whole(self.out / "pictures.png") as partial:
            picture.save(partial)
        return picture


def define_flags() -> None:
    flags.DEFINE_multi_string("lora", [], "Folder of a LoRA; may be repeated.")
    flags.DEFINE_string("prompts", "", "File with the prompts; config.prompts.test_file if empty.")
    flags.DEFINE_integer("samples", 4, "How often each prompt is painted.", lower_bound=1)
    flags.DEFINE_integer("pictures", 8, "How many of the prompts are shown.", lower_bound=0)
    flags.DEFINE_enum("judge", None, CHOICES["recon.name"], "A second reconstructor.")
    flags.DEFINE_string("judge_checkpoint", None, "Weights of the second reconstructor.")
    flags.DEFINE_boolean("met3r", False, "Also judge by MEt3R.")
    flags.DEFINE_string("clip", None, "Folder or hub id of a CLIP.")
    flags.DEFINE_string("out", "logs/evaluate", "Folder for the results.")


def main(args) -> None:
    """args: the parsed flags."""
    Evaluation(args).run()


if __name__ == "__main__":
    cli.run("evaluate", main, "config/tiny.py", define_flags)
