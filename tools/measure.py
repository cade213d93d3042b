"""What does this machine's GPU do in a run? Seconds, TFLOP/s and GiB of every stage, with random weights of full size.

    python -m tools.measure --config config/dgx.py:instant3d_grm [--config.KEY=VALUE ...]

--reward_only  only the reconstructor and its comparison, on views as large as config.recon.render_size; no painter
--pretend      on a pretend GPU, as tools.plan: the same stages, counted, without seconds
--out          a JSON file for the numbers

Every stage runs on one batch, three times: the FLOPs are those of the first, the seconds those of the fastest. Nothing
is downloaded; config.pretrained.model and config.recon.checkpoint are needed for other architectures only, as in
tools.plan. A stage whose package (gsplat) is not installed is left out.
"""

import json
from dataclasses import asdict
from pathlib import Path

from absl import flags

from config import cli
from config.errors import UserError
from config.validate import check_file, validate
from tools.plan import GIB, TERA, complete


def measure_here(config, reward_only: bool, device):
    """`tools.full_size.stages.Measurement` of a validated `config` on a real `device` (torch.device)."""
    from tools.full_size import models
    from tools.full_size.device import RealGPU
    from tools.full_size.stages import measure_reward, measure_run

    models.install(device)
    return (measure_reward if reward_only else measure_run)(RealGPU(device), config)


def by_stage(values: dict[str, float]) -> dict[str, float]:
    """FLOPs or seconds under the names that memory has: the policy and the reference at work are the sampling."""
    merged = {}
    for name, value in values.items():
        stage = "sampling" if name in ("policy", "reference") else name
        merged[stage] = merged.get(stage, 0.0) + value
    return merged


def stage_table(measured) -> str:
    """GiB, TFLOP, seconds and TFLOP/s by stage, as text; the last three per sample."""
    flops, seconds = by_stage(measured.flops), by_stage(measured.seconds)
    rows = [f"{'stage':<14}{'GiB':>8}{'TFLOP':>11}{'seconds':>11}{'TFLOP/s':>9}"]
    for name, peak in measured.peak.items():
        tera = flops.get(name, 0.0) / TERA
        timing = f"{seconds[name]:11.4f}{tera / seconds[name]:9.1f}" if name in seconds else ""
        rows.append(f"{name:<14}{peak / GIB:8.2f}{tera:11.3f}{timing}")
    return "\n".join(rows)


def define_flags() -> None:
    flags.DEFINE_boolean("reward_only", False, "Measure no painter.")
    flags.DEFINE_boolean("pretend", False, "On a pretend GPU.")
    flags.DEFINE_string("out", "", "JSON file for the numbers.")


def main(args) -> None:
    """args: the parsed flags."""
    if args.out:
        check_file("--out", args.out, (".json",))
    config = validate(complete(args.config), 1, "cuda", check_files=False)
    numbers = {}
    if args.pretend:
        from tools.pretend_gpu.measure import measure  # brings torch along, which must not come before the pretend GPU

        measured = measure(config, reward_only=args.reward_only)
    else:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"torch {torch.__version__} finds no CUDA GPU on this machine: give --pretend to plan one")
        device = torch.device("cuda", 0)
        measured = measure_here(config, args.reward_only, device)
        free, total = torch.cuda.mem_get_info(device)
        numbers = {"gpu": torch.cuda.get_device_name(device), "in_use": total - free}
        print(
            f"{numbers['gpu']}, of whose memory {numbers['in_use'] / GIB:.2f} GiB are in use, all that is on it counted"
        )
    print(stage_table(measured))
    if args.out:
        Path(args.out).write_text(json.dumps(asdict(measured) | numbers, indent=1) + "\n")


if __name__ == "__main__":
    cli.run("measure", main, "config/dgx.py", define_flags)
