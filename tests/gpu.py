"""Everything that only a real GPU can show, one part after another, each in processes of its own: `bash tests/gpu.sh`.

A part that fails or takes too long does not stop the others. The table at the end is Markdown, with the time and the
memory of every stage beside those that the pretend GPU planned; these are in gpu_plan.json, because the pretend GPU
needs a CPU build of torch. `python -m tests.gpu --record` writes that file anew, on such a build, in five minutes.
"""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tools.measure import by_stage
from tools.plan import GIB, TERA

ROOT = Path(__file__).resolve().parents[1]
PLAN = Path(__file__).with_name("gpu_plan.json")
SECONDS = 530  # for all parts: nine minutes with what comes before and after
PRESETS = (80, 24)  # GB, of config/dgx.py, the largest first
PLANNED_SPEED = 0.4 * 312 * TERA  # FLOP/s: tools.plan's defaults, an A100 at 40 %
GSPLAT = "gsplat is not installed (pip install gsplat==1.5.3)"
REWARD, REWARD_ERROR = -0.132, 0.013  # the small painter's before training, as in the README, and its standard error

# what is measured at full size -> flags of tools.measure, but for the preset. The painters get a reward that needs no
# reconstructor, for the reconstructors are measured alone.
WORKLOADS = {
    "SDXL fp16": ["instant3d_grm", "--config.reward_fn=jpeg_compressibility"],
    "MVDream bf16": ["mvdream_lgm", "--config.reward_fn=jpeg_compressibility", "--config.mixed_precision=bf16"],
    **{
        f"{name} bf16": ["instant3d_grm", "--reward_only", f"--config.recon.name={name}"]
        for name in ("tiny_lrm", "openlrm", "lgm", "grm")
    },
}
NEED_GSPLAT = ("lgm bf16", "grm bf16")


class Failed(Exception):
    """A part that did not do what it should, in one line."""


@dataclass
class Part:
    """Where a part works and how long it may take.

    folder: of all parts, for what they leave; log: file for the output of its commands; deadline: of time.monotonic."""

    folder: Path
    log: Path
    deadline: float

    def run(self, *arguments: str) -> str:
        """Run Python with `arguments` from the repository's root: the last line of the log. Raises Failed."""
        start = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "a") as log:
            # a session of its own, so that what it starts ends with it
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(max(self.deadline - time.monotonic(), 0))
            except BaseException as reason:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(reason, subprocess.TimeoutExpired):
                    raise Failed(f"out of time after: {self._last_line(start)}") from reason
                raise
        if code:
            raise Failed(self._last_line(start) or f"exit status {code}")
        return self._last_line(start)

    def _last_line(self, start):
        lines = self.log.read_bytes()[start:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


# -- the parts: each returns a remark, or raises ----------------------------------------------------------------------


def cuda_tests(part: Part) -> str:
    """The tests that are skipped without CUDA, but for gsplat's."""
    return part.run("-m", "pytest", "-q", "-m", "cuda", "tests", "--ignore=tests/test_gaussian_splatting.py")


def gsplat_tests(part: Part) -> str:
    """gsplat against the plain renderer. Its kernels are compiled when it is first used, which takes minutes."""
    if importlib.util.find_spec("gsplat") is None:
        return f"not run: {GSPLAT}"
    return part.run("-m", "pytest", "-q", "-m", "cuda", "tests/test_gaussian_splatting.py")


def small_run(part: Part) -> str:
    """The default run, which must begin where it does on CPUs, and learn."""
    train(part, "small")
    before, *_, after = check_start(part.folder / "small")
    if not fmean(after["rewards"]) > fmean(before["rewards"]):
        raise Failed(f"it did not learn: {learning_line(part.log)}")
    return learning_line(part.log)


def resume(part: Part) -> str:
    """The default run without its end, resumed. Up to its first update nothing may differ but rounding."""
    whole, resumed = part.folder / "small", part.folder / "resumed"
    checkpoints = sorted(whole.glob("checkpoint_*"))
    if not (whole / "final").is_dir() or len(checkpoints) < 2:
        raise Failed("there is no finished small run to resume")
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(checkpoints[-1].name, "final"))
    train(part, "resumed", f"--config.resume_from={resumed}")
    return compare_resumed(whole, resumed, int(checkpoints[-2].name.removeprefix("checkpoint_")))


def loss_scaling(part: Part) -> str:
    """The default run in float16, shortened: the loss scaler may skip updates, but not all."""
    short = ("--config.num_epochs=4", "--config.mixed_precision=fp16", "--config.recon.dtype=fp16")
    train(part, "fp16", *short)
    check_start(part.folder / "fp16")
    updates = metrics(part.folder / "fp16", "update")
    taken = [line for line in updates if not line["step_skipped"]]
    if not taken or not all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in taken):
        raise Failed(f"{len(taken)} of {len(updates)} updates were made: {updates}")
    return f"{len(taken)} of {len(updates)} updates made, {learning_line(part.log)}"


def measurement(name: str, gigabytes: int, *switches: str) -> Callable[[Part], str]:
    """A workload at full size, for a GPU of `gigabytes`; leaves `result_file`."""

    def measure(part: Part) -> str:
        run, *flags = WORKLOADS[name]
        out = result_file(part.folder, name)
        config = f"--config=config/dgx.py:{run}({gigabytes})"
        part.run("-m", "tools.measure", *switches, config, *flags, f"--out={out}")
        if name in NEED_GSPLAT and "reward" not in json.loads(out.read_text())["peak"]:
            return f"not rendered: {GSPLAT}"
        return ""

    return measure


def result_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.json"


def all_parts(gigabytes: int) -> dict[str, tuple[int, Callable[[Part], str]]]:
    """{name: (most seconds, function)}. What may compile kernels for minutes comes last."""
    measurements = {name: (100, measurement(name, gigabytes)) for name in WORKLOADS}
    late = {name: measurements.pop(name) for name in NEED_GSPLAT}
    return {
        "CUDA tests": (90, cuda_tests),
        "small run, bf16": (150, small_run),
        "resume": (100, resume),
        "small run, fp16": (100, loss_scaling),
        **measurements,
        "gsplat": (240, gsplat_tests),
        **late,
    }


# -- runs on disk -----------------------------------------------------------------------------------------------------


def train(part: Part, name: str, *flags: str) -> None:
    """The small world's run `name` with further flags."""
    places = (f"--config.logdir={part.folder}", f"--config.run_name={name}")
    part.run("carve3d_train.py", "--config=config/tiny.py", *places, *flags)


def metrics(run: Path, kind: str) -> list[dict]:
    """The lines of one kind of a run's metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def check_start(run: Path) -> list[dict]:
    """The validations of a run. Raises Failed if the first differs from the one on CPUs by more than its error."""
    validations = metrics(run, "validation")
    before = fmean(validations[0]["rewards"])
    if not abs(before - REWARD) < REWARD_ERROR:
        raise Failed(f"the reward before training is {before:.4f}, and on CPUs {REWARD} +- {REWARD_ERROR}")
    return validations


def learning_line(log: Path) -> str:
    """The line in which a run compares its validations."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("validation reward before")]
    return lines[-1] if lines else "no learning line was printed"


def compare_resumed(whole: Path, resumed: Path, epochs_done: int) -> str:
    """How a run that was resumed after `epochs_done` epochs ended beside the whole one. Raises Failed."""
    mine, other = ({line["epoch"]: line["reward_mean"] for line in metrics(run, "epoch")} for run in (resumed, whole))
    if mine.keys() != other.keys():
        raise Failed(f"the resumed run has the epochs {sorted(mine)} instead of {sorted(other)}")
    if not math.isclose(mine[epochs_done], other[epochs_done], rel_tol=1e-3):
        raise Failed(f"it went on with a reward of {mine[epochs_done]:.5f} instead of {other[epochs_done]:.5f}")
    final = "final/pytorch_lora_weights.safetensors"
    if (whole / final).read_bytes() == (resumed / final).read_bytes():
        return "ended bitwise as the whole run"
    after, expected = (fmean(metrics(run, "validation")[-1]["rewards"]) for run in (resumed, whole))
    return f"ended with a reward of {after:.4f}, the whole run with {expected:.4f} (not bitwise)"


# -- all of it --------------------------------------------------------------------------------------------------------


def run_parts(parts: dict, folder: Path, seconds: float) -> dict[str, tuple[bool, str]]:
    """{name: (passed, remark with its seconds)}. parts: as of `all_parts`; seconds: for all of them."""
    results, end = {}, time.monotonic() + seconds
    for name, (limit, function) in parts.items():
        start = time.monotonic()
        part = Part(folder, folder / f"{name.replace(' ', '_')}.log", min(end, start + limit))
        try:
            if start >= end:
                raise Failed(f"no time was left of {seconds:.0f} seconds")
            passed, remark = True, function(part)
        except Exception as error:  # whatever it is, the other parts must run
            passed, remark = False, f"FAILED: {error}"
        results[name] = passed, f"{remark or 'passed'} ({time.monotonic() - start:.0f} s)"
        print(f"{name}: {results[name][1]}", flush=True)
    return results


HEADER = ("part", "stage", "s per sample", "TFLOP/s", "GiB", "time / plan", "GiB / plan")


def table(results: dict[str, tuple[bool, str]], measured: dict[str, dict], plan: dict[str, dict]) -> str:
    """Markdown: a row for every part, and for every measured stage one with its ratios to the plan.

    measured, plan: {part: fields of `tools.full_size.stages.Measurement`}."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for name, (passed, remark) in results.items():
        rows.append((name, remark.replace("|", "/"), *[""] * (len(HEADER) - 2)))
        if passed and name in measured:
            rows += [("", *row) for row in stage_rows(measured[name], plan[name])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def stage_rows(measured: dict, plan: dict) -> list[tuple[str, ...]]:
    """The columns of `HEADER` behind the first, for every stage that does arithmetic on the GPU."""
    flops, seconds, planned = (by_stage(x) for x in (measured["flops"], measured["seconds"], plan["flops"]))
    rows = []
    for stage in planned:
        if stage in seconds:
            timing = f"{seconds[stage]:.3f}", f"{flops[stage] / seconds[stage] / TERA:.0f}"
            slower = f"{seconds[stage] * PLANNED_SPEED / planned[stage]:.2f}"
            peak, expected = measured["peak"][stage], plan["peak"][stage]
            rows.append((stage, *timing, f"{peak / GIB:.1f}", slower, f"{peak / expected:.2f}"))
    if "in_use" in measured:  # what the driver counts at the end, with the CUDA context and fragmentation
        used, expected = measured["in_use"], max(plan["peak"].values())
        rows.append(("in use on the GPU", "", "", f"{used / GIB:.1f}", "", f"{used / expected:.2f}"))
    return rows


def read_results(folder: Path) -> dict[str, dict]:
    """{workload: its numbers} of those that were measured."""
    files = {name: result_file(folder, name) for name in WORKLOADS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def find_gpu() -> tuple[str, int]:
    """What torch says of the first GPU, and the largest preset for it. Ends the program if there is none."""
    code = (
        "import torch; ok = torch.cuda.is_available(); gpu = torch.cuda.get_device_properties(0) if ok else None; "
        "print(f'{gpu.name}, torch {torch.__version__}|{gpu.total_memory}' if ok else f'torch {torch.__version__}|0')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tests/gpu.sh: torch cannot be used ({done.stderr.strip().splitlines()[-1]})")
    what, _, size = done.stdout.strip().rpartition("|")
    if size == "0":
        sys.exit(f"tests/gpu.sh: {what} of {sys.executable} finds no CUDA GPU: install a build of torch for this GPU")
    preset = next((gigabytes for gigabytes in PRESETS if int(size) >= gigabytes * 1e9), None)
    if preset is None:
        sys.exit(f"tests/gpu.sh: {what} has {int(size) / 1e9:.0f} GB of memory, and at least {min(PRESETS)} are needed")
    return what, preset


def record(folder: Path) -> dict[str, dict]:
    """{preset: {workload: its numbers}} of the pretend GPU. Raises Failed."""
    plan = {}
    for gigabytes in PRESETS:
        for name in WORKLOADS:
            measurement(name, gigabytes, "--pretend")(Part(folder, folder / "plan.log", time.monotonic() + 600))
        plan[str(gigabytes)] = read_results(folder)
    return plan


def main(arguments: list[str]) -> int:
    """Exit status: 0 if all parts passed."""
    folder = Path(tempfile.mkdtemp(prefix="carve3d_gpu_"))
    if arguments == ["--record"]:
        PLAN.write_text(json.dumps(record(folder), indent=1) + "\n")
        return 0
    what, preset = find_gpu()
    print(f"{what}, preset for {preset} GB; logs in {folder}", flush=True)
    results = run_parts(all_parts(preset), folder, SECONDS)
    plan = json.loads(PLAN.read_text())[str(preset)]
    print(
        f"\n{what}. Time / plan is relative to 40 % of an A100's 312 TFLOP/s; s per sample, with all denoising steps.\n"
    )
    print(table(results, read_results(folder), plan))
    print(f"\nlogs: {folder}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
