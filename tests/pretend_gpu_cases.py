"""What test_pretend_gpu.py runs, each in a process of its own: `python -m tests.pretend_gpu_cases CASE [arguments]`.

The last line printed is JSON: "problems" (what CUDA would refuse), and what the case measured.
"""

import json
import sys
from pathlib import Path

import tools.pretend_gpu  # noqa: F401, must come before torch

# isort: split
import torch
from torch.utils._pytree import tree_leaves

import config.validate
from config import dgx
from config.batches import derive_batches
from ddpo.calibration import StepCalibration
from ddpo.sampling import NOISE, collect_samples, make_generator
from ddpo.setup import make_optimizer, start_accelerator
from ddpo.update import update, update_from_gradients
from diffusers_patch.loading import load_painter, make_trainable
from mrc import LPIPS, MRC
from mrc.rewards import ImageResult
from recon import RECONSTRUCTORS, load_reconstructor
from tests.shallow_painters import write_shallow_painter
from tools.pretend_gpu.gpu import GPU, pretend_gpu

# Denoising steps. The loop is the same code for both painters, so that the larger one need not go round twice.
STEPS = {"carve3d_train": 1, "mvdream_lgm": 2}


def short_config(run, precision, folder, deep=False):
    """A run of config/dgx.py in full width but of `STEPS`, two samples at a time, and no files but in `folder`.

    deep: the painter has all its layers, otherwise it is `write_shallow_painter`'s."""
    settings = dgx.get_config(run)
    settings.mixed_precision, settings.tracker, settings.logdir = precision, "none", str(folder)
    settings.train.clip_range = 0.1  # of no matter here
    settings.pretrained.model, settings.recon.checkpoint = "someone/painter", "someone/reconstructor"
    if not deep:
        settings.pretrained.model = write_shallow_painter(run, Path(folder) / "painter")
    settings.pretrained.vae = ""
    settings.recon.remove_background = False
    settings.sample.num_steps, settings.sample.batch_size, settings.train.batch_size = STEPS[run], 2, 2
    settings.sample.total_batch_size = settings.train.total_batch_size = 4
    settings.per_prompt_stat_tracking.min_count = 2
    settings.train.kl_per_update, settings.train.kl_calibration_updates = 0.05, 1
    return derive_batches(settings, 1)


class Loops:
    """What the host waited for between the first and the last pass of the UNet in a loop, and the first one's FLOPs."""

    def __init__(self, policy, gpu):
        self.predict, self.gpu, self.spans, self.flops = policy.predict, gpu, [], None
        policy.predict = self

    def __call__(self, *args, **kwargs):
        start, flops = len(self.gpu.watch.waits), self.gpu.flops.total
        output = self.predict(*args, **kwargs)
        self.flops = self.flops or self.gpu.flops.total - flops
        self.spans.append((start, len(self.gpu.watch.waits)))
        return output

    def waits(self):
        """Those since the last call: a list of "kind at file:line"."""
        found = self.gpu.watch.waits[self.spans[0][0] : self.spans[-1][1]]
        self.spans.clear()
        return sorted({f"{wait.kind} at {wait.place}" for wait in found})


def painter(run, precision, folder, checkpointing=False, deep=False):
    """Encode, rollout with reference, decode, calibration and update of a painter of full width; deep: of full size.

    Without checkpointing the gradients are taken while painting."""
    with pretend_gpu() as gpu:
        settings = short_config(run, precision, folder, deep)
        settings.train.gradient_checkpointing = bool(checkpointing)
        accelerator = start_accelerator(settings)
        policy = load_painter(settings, GPU)
        make_trainable(policy, settings)
        optimizer = accelerator.prepare(make_optimizer(policy, settings))
        loops = Loops(policy, gpu)

        def reward_fn(views, prompts):
            foreground = views.mean((2, 3, 4))
            return ImageResult(foreground.mean(1), foreground, foreground > 2)

        generators = [make_generator(0, NOISE, i) for i in range(2)]
        policy.equals_reference = lambda: False
        backward = None if checkpointing else accelerator.backward
        gpu.memory.reset()
        samples = collect_samples(policy, reward_fn, ["a cup", "a hat"], generators, settings, True, backward=backward)
        sampling, painting_peak = loops.waits(), gpu.memory.peak
        if run == "mvdream_lgm":  # the same code for both painters, and this one is quicker
            calibration = StepCalibration(policy, optimizer, accelerator, settings)
            calibration.start(samples.trajectory)
            loops.spans.clear()
        settings.train.gradient_accumulation_steps = 1
        gpu.memory.reset()
        learner, advantages = (policy, optimizer, accelerator), torch.zeros(2)
        if checkpointing:
            generator = torch.Generator().manual_seed(0)
            logs = update(*learner, samples.trajectory, advantages, settings, generator)
        else:
            logs = update_from_gradients(*learner, samples.gradients, advantages, settings)
        return {
            "problems": list(gpu.watch.problems),
            "sampling": sampling,
            "update": loops.waits() if checkpointing else [],
            "scaler": accelerator.scaler is not None,
            "flops": loops.flops / 2,
            "peak": gpu.memory.peak if checkpointing else painting_peak,
            "on_host": samples.trajectory.latents.device.type,
            "text_encoder": next(policy.pipeline.text_encoder.parameters()).device.type,
            "steps": len(logs),
        }


def reconstructors(dtype):
    """MRC of two samples by a full-size reconstructor of every kind, and by that of a run: {name: what was found}."""
    found = {}
    runs = dict.fromkeys(RECONSTRUCTORS, "carve3d_train") | {"mvdream_instantmesh": "mvdream_instantmesh"}
    with pretend_gpu() as gpu:
        views = torch.rand(2, 4, 3, 256, 256, device=GPU)
        for name, run in runs.items():
            settings = dgx.get_config(run).recon
            if name in RECONSTRUCTORS:
                settings.name = name
            settings.checkpoint, settings.dtype = settings.name, dtype
            settings.chunk_size, settings.render_size = 2**22, 128
            judge = MRC(load_reconstructor(settings, GPU), LPIPS().to(GPU), render_size=128)
            gpu.watch.problems.clear()
            gpu.watch.waits.clear()
            result = judge(views)
            found[name] = {
                "problems": list(gpu.watch.problems),
                "devices": sorted({str(value.device) for value in tree_leaves(vars(result))}),
                "shapes": [tuple(result.reward.shape), tuple(result.renders.shape)],
                "waits": [f"{wait.kind} at {wait.place}" for wait in gpu.watch.waits],
            }
    return found


def trainer(run, precision, folder):
    """The trainer's own validation and epochs, the second with an update."""
    from carve3d_train import Run

    folder = Path(folder)
    (folder / "prompts.txt").write_text("a cup\na hat\n")
    config.validate._check_package = lambda *_: None
    Run.save = lambda self: None  # tensors without data cannot be written
    with pretend_gpu() as gpu:
        settings = short_config(run, precision, folder)
        prompts = settings.prompts
        prompts.train_file = prompts.val_file = prompts.test_file = str(folder / "prompts.txt")
        prompts.num_train, settings.run_name = 2, "run"
        settings.sample.batch_size, settings.sample.num_batches_per_epoch = 4, 1  # a pass costs the same for any batch
        settings.train.skip_last_steps = 1
        training = Run(settings)
        training.validation()
        for epoch in (0, 1):
            training.epoch(epoch)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        pictures = sorted(file.name for file in (folder / "run").rglob("*.png"))
        kinds = [line["kind"] for line in lines]
        return {"problems": list(gpu.watch.problems), "kinds": kinds, "pictures": pictures}


def faults(folder):
    """Faults that the pretend GPU must notice: {fault: the exception, the problems and the waits that it caused}."""
    found = {}
    with pretend_gpu() as gpu:

        def attempt(name, function):
            gpu.watch.problems.clear()
            gpu.watch.waits.clear()
            try:
                function()
                error = ""
            except Exception as exception:
                error = f"{type(exception).__name__}: {str(exception).splitlines()[0]}"
            waits = sorted({wait.kind for wait in gpu.watch.waits})
            found[name] = {"error": error, "problems": list(gpu.watch.problems), "waits": waits}

        settings = dgx.carve3d_train().recon
        settings.name, settings.checkpoint, settings.dtype = "lgm", "lgm", "fp16"
        model = load_reconstructor(settings, GPU)
        views = torch.rand(1, 4, 3, model.input_size, model.input_size, device=GPU)
        attempt("none", lambda: model.reconstruct(views, model.cameras))
        attempt("cameras on the CPU", lambda: model.reconstruct(views, model.input_cameras()))
        layer = torch.nn.Linear(8, 8).half().to(GPU)
        attempt("float32 into a half-precision layer", lambda: layer(torch.rand(2, 8, device=GPU)))
        trained, activations = torch.nn.Linear(8, 8).to(GPU), torch.rand(2, 8, device=GPU).half()
        attempt("no autocast around float32 weights", lambda: trained(activations))
        with torch.autocast("cuda", torch.float16):
            attempt("none, with autocast", lambda: trained(activations))
        table, index = torch.rand(10), torch.arange(3, device=GPU)
        attempt("a table on the CPU indexed from the GPU", lambda: table[index])
        on_gpu = torch.rand(10, device=GPU)
        attempt("an index on the CPU", lambda: on_gpu[torch.arange(3)])
        attempt("a scalar read", lambda: float(on_gpu.sum()))
        attempt("a boolean mask", lambda: on_gpu[on_gpu > 0.5])
        attempt("a new tensor in the loop", lambda: torch.tensor([1.0], device=GPU) + on_gpu[:1])
        policy = load_painter(short_config("mvdream_lgm", "fp16", folder), GPU)
        conditioning = policy.encode(["a cup"])
        latents, t = policy.initial_latents(1), torch.ones(1, device=GPU, dtype=torch.long)
        with torch.no_grad():
            attempt("latents on the CPU", lambda: policy.predict(latents.cpu(), t, conditioning, 5.0))
        return {"problems": [], "faults": found}


CASES = {"painter": painter, "reconstructors": reconstructors, "trainer": trainer, "faults": faults}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](*sys.argv[2:])))
