"""What would a run need? Memory and hours on GPUs that need not be there, or one sentence on what does not fit.

    python -m tools.plan --config config/dgx.py:carve3d_train --gpus 48 [--config.KEY=VALUE ...]

--gpus         how many GPUs, one process on each (8)
--memory       GiB of each (80)
--flops        TFLOP/s of each in the arithmetic of the run (312: A100, half precision)
--utilization  share of those that is reached (0.4)

Runs every stage once on a pretend GPU (tools/pretend_gpu), which needs g++, a CPU build of torch and half a minute, but
no weights: the architecture follows from config.painter.name and config.recon.name, or from the config.json files where
pretrained.model and recon.checkpoint are local folders.

The GiB are those of tensors. Leave some for what is not counted: the CUDA context, fragmentation, and the workspaces of
libraries (cuDNN, NCCL, gsplat). The hours are those of matrix products, convolutions and attention, without validation.
"""

from absl import flags
from ml_collections import ConfigDict

from config import cli
from config.batches import batch_table
from config.errors import UserError
from config.validate import flatten, validate

GIB, TERA = 2**30, 1e12
PUBLISHED_HOURS = 16.5  # 55 epochs on 48 A100-80GB
FEWER = "fewer"  # a number in proportion to the memory that there is

# stage -> keys that lower its memory and what to set them to, what costs least first
MENDS = {
    "weights": (("mixed_precision", "bf16"), ("use_lora", True)),
    "sampling": (("mixed_precision", "bf16"), ("sample.batch_size", FEWER)),
    "decode": (("sample.decode_batch_size", FEWER), ("sample.batch_size", FEWER)),
    "reward": (("recon.dtype", "bf16"), ("sample.batch_size", FEWER)),
    "calibration": (("train.kl_per_update", 0.0),),
    "update": (
        ("mixed_precision", "bf16"),
        ("train.gradient_checkpointing", True),
        ("train.timesteps_per_forward", FEWER),
        ("train.batch_size", FEWER),
    ),
}


def complete(config: ConfigDict) -> ConfigDict:
    """`config` with names in place of the weights that a run must be given and a plan need not."""
    config.pretrained.model = config.pretrained.model or "painter"
    config.recon.checkpoint = config.recon.checkpoint or config.recon.name
    return config


def check_memory(peak: dict[str, int], weights: int, config: ConfigDict, memory: float) -> None:
    """Raise ValueError that names the key to change if a stage needs more than `memory` GiB.

    peak: {stage: bytes}; weights: the bytes among them that are there in every stage."""
    stage = max(peak, key=peak.get)
    needed, limit = peak[stage], memory * GIB
    if needed <= limit:
        return
    share = (limit - weights) / (needed - weights)
    key, value = mend("weights" if share <= 0 else stage, share, config)
    raise UserError(
        f"{stage} needs {needed / GIB:.1f} GiB and --memory is {memory:g}: "
        + (f"set config.{key} to {value!r}" if key else "more GPUs, or larger ones, are needed")
    )


def mend(stage: str, share: float, config: ConfigDict) -> tuple[str | None, object]:
    """The first key of `MENDS` that can still be changed, and its new value; (None, None) if there is none.

    share: the part of the stage's memory, without the weights, that there is room for."""
    values = flatten(config)
    for key, value in MENDS[stage]:
        if key not in values:
            continue
        new = int(values[key] * share) if value is FEWER else value
        halved_already = key in ("mixed_precision", "recon.dtype") and values[key] in ("fp16", "bf16")
        if new != values[key] and not halved_already and not (value is FEWER and new < 1):
            return key, new
    return None, None


def hours(flops_per_sample: dict[str, float], config: ConfigDict, flops_per_second: float) -> float:
    """Hours of all epochs, of which the first has no update.

    flops_per_second: of all GPUs together, as they are reached."""
    epochs, samples = config.num_epochs, config.sample.total_batch_size
    update = flops_per_sample["update"]
    sampling = sum(flops_per_sample.values()) - update
    return samples * (epochs * sampling + (epochs - 1) * update) / flops_per_second / 3600


def memory_table(measured) -> str:
    """GiB by stage, as text. measured: `tools.pretend_gpu.measure.Measurement`."""
    weights = sum(measured.weights.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in measured.weights.items())
    rows = [("weights", weights, parts), *((stage, size, "") for stage, size in measured.peak.items())]
    rows.append(("host memory", measured.host, "what an epoch keeps until its last update"))
    return "\n".join(f"  {name:<14}{size / GIB:8.2f}  {note}".rstrip() for name, size, note in rows)


def flops_table(measured) -> str:
    rows = [*measured.flops.items(), ("all", sum(measured.flops.values()))]
    return "\n".join(f"  {name:<14}{flops / TERA:12,.3f}" for name, flops in rows)


def define_flags() -> None:
    flags.DEFINE_integer("gpus", 8, "How many GPUs, one process on each.", lower_bound=1)
    flags.DEFINE_float("memory", 80.0, "GiB of each GPU.", lower_bound=1.0)
    flags.DEFINE_float("flops", 312.0, "TFLOP/s of each GPU.", lower_bound=0.1)
    flags.DEFINE_float("utilization", 0.4, "Share of those FLOP/s that is reached.", lower_bound=0.01, upper_bound=1.0)


def main(args) -> None:
    """args: the parsed flags."""
    config = validate(complete(args.config), args.gpus, "cuda", check_files=False)
    from tools.pretend_gpu.measure import measure  # brings torch along, which must not come before the pretend GPU

    measured = measure(config, args.gpus)
    print(f"{batch_table(config, args.gpus)}\n\nGiB on each GPU, of {args.memory:g}\n{memory_table(measured)}\n")
    check_memory(measured.peak, sum(measured.weights.values()), config, args.memory)
    print(f"TFLOP per sample\n{flops_table(measured)}\n")
    print(f"{measured.gradient_bytes / 2**20:.1f} MiB of gradients are averaged over the GPUs in every update")
    reached = args.gpus * args.flops * args.utilization * TERA
    print(
        f"{hours(measured.flops, config, reached):.1f} hours at {args.utilization:.0%} of {args.flops:g} TFLOP/s on "
        f"each GPU (the published run took {PUBLISHED_HOURS} on 48 A100)"
    )


if __name__ == "__main__":
    cli.run("plan", main, "config/dgx.py", define_flags)
