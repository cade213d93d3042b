"""The paper's runs, on any number of GPUs.

    --config config/dgx.py:carve3d_train         the published run
    --config config/dgx.py:data_size(10)         sweeps: training prompts,
    --config config/dgx.py:batch_size(384)       samples per epoch,
    --config config/dgx.py:kl_coefficient(0.1)   weight of the KL,
    --config config/dgx.py:multi_round(2)        updates per epoch

    --config config/dgx.py:fast                  the published run at a third of its cost

    --config config/dgx.py:instant3d_grm         the published run on the nearest open weights, Instant3D + GRM
    --config config/dgx.py:mvdream_lgm           the same with the open pair MVDream + LGM
    --config config/dgx.py:instant3d_instantmesh,
    --config config/dgx.py:mvdream_instantmesh   either painter with InstantMesh, which takes any cameras
    --config config/dgx.py:instant3d_grm(24)     any of these on GPUs of 24 GB instead of 80

The published machine was 6 nodes of 8 A100-80GB: 8 samples at a time and 2 batches per GPU make 768 per epoch. Only the
768 is fixed here; batches per process and gradient accumulation follow from the real number of processes, so on fewer
GPUs an epoch takes longer and is the same epoch. The first lines of a run show the resulting numbers.
"""

import ast
import inspect

from ml_collections import ConfigDict

from config import base
from config.errors import UserError

SAMPLES_PER_EPOCH = 768  # published
TRAIN_PROMPTS = 30  # published: the 30 of 100 candidates with the lowest reward under the base model


def carve3d_train() -> ConfigDict:
    """The published run. Still to be given by the user: pretrained.model and recon.checkpoint.

    The paper's weights were never released: Instant3D-10K, which paints, and a sparse-view LRM, which reconstructs. The
    nearest open ones are instant3d.pth and grm_u.pth, both of justimyhxu/GRM, a 2x2 grid at the same cameras:
    `instant3d_grm` is this run with what they need."""
    config = base.get_config()
    # written by `python -m tools.curate_prompts`: which prompts are hard depends on the painter
    config.prompts.train_file = "prompts/curated/kept.txt"
    return _with_sizes(config, SAMPLES_PER_EPOCH, TRAIN_PROMPTS)


def data_size(num_prompts: int) -> ConfigDict:
    """Fewer or more training prompts at the published batch: too few overfit. More than 30 need `curate --keep`."""
    return _with_sizes(carve3d_train(), SAMPLES_PER_EPOCH, _positive_int("data_size", num_prompts))


def batch_size(num_samples: int) -> ConfigDict:
    """Smaller or larger purely on-policy epochs at the published 30 prompts."""
    return _with_sizes(carve3d_train(), _positive_int("batch_size", num_samples), TRAIN_PROMPTS)


def kl_coefficient(coefficient: float) -> ConfigDict:
    """Another weight of the KL in the reward; 0 = none, still logged."""
    config = carve3d_train()
    config.kl_normalized_coeff = _number("kl_coefficient", coefficient)
    return config


def multi_round(rounds: int) -> ConfigDict:
    """PPO as DDPO runs it: `rounds` updates on the 768 samples of an epoch, the later ones off-policy."""
    config = carve3d_train()
    if SAMPLES_PER_EPOCH % _positive_int("multi_round", rounds):
        raise UserError(f"multi_round({rounds}): {SAMPLES_PER_EPOCH} samples do not split evenly; use a divisor of it")
    config.train.total_batch_size = SAMPLES_PER_EPOCH // rounds
    return config


def fast() -> ConfigDict:
    """The published run at a third of its arithmetic: the same objective in expectation, from fewer of its terms.

    Every sample is painted as ever; 20 of its 100 steps, spread evenly, are trained on, and at 10 the base model is
    asked. Two samples at a time, which halves the memory and changes nothing else."""
    config = carve3d_train()
    config.train.batch_size, config.sample.batch_size, config.sample.decode_batch_size = 2, 4, 4
    config.train.timestep_fraction = 0.2
    config.kl_timestep_fraction = 0.1
    return config


def instant3d_grm(gigabytes: float = 80) -> ConfigDict:
    """The published run with the open Instant3D and GRM. Still to be given: pretrained.model and recon.checkpoint, the
    folders that tools.convert_instant3d makes of instant3d.pth and tools.convert_grm of grm_u.pth."""
    config = carve3d_train()
    config.painter.name = "mv_sdxl"
    config.pretrained.vae = "madebyollin/sdxl-vae-fp16-fix"  # as published: SDXL's own overflows in half precision
    config.sample.initial_latents = "gaussian_blob"
    config.recon.name = "grm"
    config.recon.dtype = "bf16"  # as published
    return _fit(config, _number("instant3d_grm", gigabytes))


def instant3d_instantmesh(gigabytes: float = 80) -> ConfigDict:
    """`instant3d_grm` with InstantMesh in GRM's place. Still to be given: pretrained.model, and recon.checkpoint, which
    is instant_nerf_large.ckpt or instant_nerf_base.ckpt, or what tools.convert_instantmesh makes of it."""
    return _with_instantmesh(instant3d_grm(gigabytes), "instant3d")


def mvdream_lgm(gigabytes: float = 80) -> ConfigDict:
    """The public MVDream and the public LGM on one machine of 8 GPUs. Still to be given: pretrained.model (or its hub
    id) and recon.checkpoint."""
    config = carve3d_train()
    config.painter.name = "mvdream"
    config.recon.name = "lgm"
    # where LGM wants its views: level, the first where MVDream's second would be, so its 1, 2, 3, 0 come in order
    config.painter.elevation = 0.0
    config.painter.azimuth_start = 90.0
    config.sample.prompt_suffix = ", 3d asset"  # as MVDream was trained
    config.sample.num_steps = 50
    config.sample.guidance_scale = 7.5
    config.sample.batch_size = 16
    config.recon.dtype = "fp16"
    config.recon.remove_background = True  # MVDream paints on gray
    config.recon.render_size = 256
    return _fit(config, _number("mvdream_lgm", gigabytes))


def mvdream_instantmesh(gigabytes: float = 80) -> ConfigDict:
    """`mvdream_lgm` with InstantMesh in LGM's place, so that MVDream may look from above, as in its own scripts. Still
    to be given: pretrained.model, and recon.checkpoint as for `instant3d_instantmesh`."""
    config = _with_instantmesh(mvdream_lgm(gigabytes), "mvdream")
    config.painter.elevation = config.recon.elevation = 15.0
    config.painter.azimuth_start = 0.0
    return config


def get_config(name: str = "carve3d_train") -> ConfigDict:
    """The run called `name`: a function of this file, with its arguments if it has any, as in "data_size(10)".

    Raises UserError when there is no such run or when it gets the wrong arguments.
    """
    with_sizes = (data_size, batch_size, kl_coefficient, multi_round)
    pairs = (instant3d_grm, instant3d_instantmesh, mvdream_lgm, mvdream_instantmesh)
    runs = {run.__name__: run for run in (carve3d_train, *with_sizes, fast, *pairs)}
    function, _, rest = name.strip().partition("(")
    if function not in runs or (rest and not rest.endswith(")")):
        raise UserError(f"config/dgx.py has no run {name!r}: write one of {', '.join(runs)}, e.g. data_size(10)")
    try:
        arguments = ast.literal_eval(f"({rest[:-1]},)") if rest[:-1].strip() else ()
        inspect.signature(runs[function]).bind(*arguments)
    except (SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"config/dgx.py:{name} has wrong arguments: write numbers, as in data_size(10)") from error
    return runs[function](*arguments)


def _with_sizes(config: ConfigDict, samples: int, prompts: int) -> ConfigDict:
    """`samples` per epoch and per update, over `prompts` training prompts; buffers as published."""
    per_prompt = samples // prompts
    if per_prompt < 2:
        raise UserError(
            f"{samples} samples per epoch over {prompts} prompts leave fewer than 2 per prompt: use at "
            f"most {samples // 2} prompts, or more samples"
        )
    config.sample.total_batch_size = config.train.total_batch_size = samples
    config.prompts.num_train = prompts
    config.per_prompt_stat_tracking.min_count = per_prompt
    config.per_prompt_stat_tracking.buffer_size = 3 * per_prompt  # about three epochs
    return config


def _with_instantmesh(config: ConfigDict, cameras: str) -> ConfigDict:
    config.recon.name, config.recon.cameras = "instantmesh", cameras
    config.recon.dtype = "bf16"  # published in float32, so its activations may be too large for float16
    return config


def _fit(config: ConfigDict, gigabytes: float) -> ConfigDict:
    """Smaller batches for GPUs of less than 80 GB; `python -m tools.plan` shows what each stage then needs."""
    if gigabytes < 24:
        raise UserError(f"{gigabytes:g} GB are too few for this run: use GPUs of 24 GB or more")
    if gigabytes < 80:
        config.train.gradient_checkpointing = True
        config.sample.batch_size, config.sample.decode_batch_size = 4, 1
    return config


def _positive_int(run: str, value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{run}({value!r}): the argument must be a whole number of at least 1")
    return value


def _number(run: str, value) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{run}({value!r}): the argument must be a number")
    return float(value)
