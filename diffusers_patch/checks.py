"""What can be said of a painter before its weights are read: where its views stand, whether its files are whole, and
whether a LoRA fits it. Nothing here needs diffusers, whose import takes seconds."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import ConfigDict

from config.errors import MissingFileError, UserError, about
from config.validate import ANY_CAMERAS
from recon import reconstructor_cameras
from recon.cameras import Cameras, camera_disagreement, instant3d_cameras, mvdream_cameras
from recon.weights import (
    check_checkpoint,
    check_hub,
    check_torch_file,
    find_file,
    read_json,
    read_weights,
    weight_shapes,
)

LORA_FILE = "pytorch_lora_weights.safetensors"
STOCK_LIBRARIES = {"diffusers", "transformers", None}
WHOLE = "give the complete folder of a pipeline"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # a tokenizer has at least one of them
CLIP_FOLDER = (
    "with --tokenizer, or for a run with config.pretrained.tokenizer, a folder with CLIP's tokenizer, as `tokenizer` "
    "of any Stable Diffusion is"
)


@dataclass(frozen=True)
class Kind:
    """One kind of painter, as config.painter.name names it.

    cameras: config.painter -> where its views stand. pipeline: class of its pipeline in diffusers.
    models: folders of that pipeline with weights. tokenizers: folders without.
    unet: a key and value of the UNet's configuration without which it is no such painter, and what it is then.
    rig: what config.recon.cameras calls these cameras.
    camera_hint: what can be changed if the cameras do not fit the reconstructor's.
    """

    cameras: Callable[[ConfigDict], Cameras]
    pipeline: str
    models: Sequence[str]
    tokenizers: Sequence[str]
    unet: tuple[str, str, str]
    rig: str
    camera_hint: str = ""


KINDS = {
    "mv_sdxl": Kind(
        lambda painter: instant3d_cameras(),
        "StableDiffusionXLPipeline",
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        ("tokenizer", "tokenizer_2"),
        ("addition_embed_type", "text_time", "is no SDXL"),
        rig="instant3d",
    ),
    "mvdream": Kind(
        lambda painter: mvdream_cameras(painter.elevation, painter.azimuth_start),
        "StableDiffusionPipeline",
        ("unet", "vae", "text_encoder"),
        ("tokenizer",),
        ("class_embed_type", "projection", "is a painter that no cameras are given to, so no MVDream"),
        rig="mvdream",
        camera_hint="set config.painter.elevation to the reconstructor's, or ",
    ),
}


###### Cameras ######


def painter_cameras(config: ConfigDict) -> Cameras:
    """Where the views of the painter in `config` (config.painter) stand."""
    return KINDS[config.name].cameras(config)


def check_cameras(config: ConfigDict) -> None:
    """Raise UserError if painter and reconstructor look from different places."""
    if config.reward_fn != "mrc":
        return
    problems = camera_disagreement(painter_cameras(config.painter), reconstructor_cameras(config.recon))
    kind = KINDS[config.painter.name]
    if problems and config.recon.name in ANY_CAMERAS:
        elevation = f" and config.recon.elevation to {config.painter.elevation:g}" if kind.rig == "mvdream" else ""
        raise UserError(
            f"the painter {config.painter.name!r} does not paint for config.recon.cameras = {config.recon.cameras!r}: "
            f"{'; '.join(problems)}; set it to {kind.rig!r}{elevation}"
        )
    if problems:
        raise UserError(
            f"the painter {config.painter.name!r} and the reconstructor {config.recon.name!r} do not fit together: "
            f"{'; '.join(problems)}; {kind.camera_hint}choose another config.recon.name or "
            f"config.painter.name"
        )


###### Files ######


def check_painter_files(config: ConfigDict) -> None:
    """Refuse a config.pretrained whose files are missing, damaged or of something else, from names and headers alone.

    Of a hub id it is said only whether it can be downloaded. Raises UserError, or MissingFileError."""
    pretrained, name = config.pretrained, config.painter.name
    folder = Path(pretrained.model)
    if folder.is_file():
        _check_ldm_file(folder, name, pretrained.tokenizer)
    elif folder.is_dir():
        _check_folder(folder, name)
        check_timesteps(read_json(folder / "scheduler" / "scheduler_config.json", WHOLE), config.sample.num_steps)
    else:
        check_hub("config.pretrained.model", pretrained.model, pretrained.revision)
    if pretrained.vae:
        _check_vae(pretrained.vae)
    if pretrained.lora:
        # an MVDream of the published layout names its layers otherwise: `fuse_lora` looks when they are converted
        files = sorted((folder / "unet").glob("*.safetensors")) if has_stock_unet(folder) else []
        shapes = {key: shape for file in files for key, shape in weight_shapes(file).items()}
        read_lora(pretrained.lora, shapes, "config.pretrained.lora", "give another folder, or '' for none")


def check_timesteps(scheduler: Mapping, num_steps: int) -> None:
    """Raise UserError if a chain of `num_steps` would begin behind the last of the scheduler's timesteps.

    scheduler: its configuration. Only "leading" spacing can: its first timestep is offset + (num_steps - 1) * stride.
    """
    known = scheduler.get("num_train_timesteps", 1000)
    if scheduler.get("timestep_spacing", "leading") != "leading":
        return
    first = scheduler.get("steps_offset", 0) + (num_steps - 1) * (known // num_steps)
    if first >= known:
        raise UserError(
            f"config.sample.num_steps is {num_steps}, so that the first timestep of the painter's scheduler would be "
            f"{first}, and its last is {known - 1}: set it to {num_steps - 1} or less"
        )


def _check_ldm_file(file, name, tokenizer):
    if name != "mvdream":
        raise UserError(
            f"config.pretrained.model = {str(file)!r} is a file, and the painter {name!r} is loaded from a folder: "
            f"convert it with python -m tools.convert_instant3d {file} OUT, and give OUT"
        )
    check_ldm_tokenizer(file, tokenizer)
    check_checkpoint("config.pretrained.model", str(file))


def check_ldm_tokenizer(file: Path, tokenizer: str) -> None:
    """Raise MissingFileError unless `tokenizer` is a folder or hub id with the tokenizer that the ldm `file` lacks."""
    if not tokenizer:
        raise MissingFileError(f"{file} is an ldm file, which has no tokenizer: give {CLIP_FOLDER}")
    check_tokenizer(tokenizer, "", CLIP_FOLDER)


def check_tokenizer(place: str | Path, subfolder: str, remedy: str) -> None:
    """Raise MissingFileError unless CLIP's tokenizer is in the folder `subfolder` ("" = none) of `place`, a folder or
    hub id; remedy: what the message says to give."""
    if not any(Path(place, subfolder, name).is_file() for name in TOKENIZER_FILES):
        find_file(place, Path(subfolder, "vocab.json").as_posix(), remedy)


def _check_folder(folder, name):
    kind, said = KINDS[name], f"config.pretrained.model = {str(folder)!r}"
    unet = read_json(folder / "unet" / "config.json", WHOLE)
    if has_stock_unet(folder):
        _check_index(read_json(folder / "model_index.json", WHOLE), name, said)
        check_unet(unet, name, said)
    elif name != "mvdream":  # the published MVDream has a UNet and a pipeline of its own, which are converted
        raise UserError(f"{said} has a unet that is no UNet2DConditionModel of diffusers: {WHOLE}")
    for part in kind.models:
        _check_part(folder / part, f"{said} has no weights in {part}: {WHOLE}")
    for part in kind.tokenizers:
        if not any((folder / part / file).is_file() for file in TOKENIZER_FILES):
            raise MissingFileError(
                f"{said} has neither {' nor '.join(f'{part}/{file}' for file in TOKENIZER_FILES)}: {WHOLE}"
            )


def has_stock_unet(folder: Path) -> bool:
    """Whether `folder` is there and its UNet is of the class of diffusers."""
    file = folder / "unet" / "config.json"
    return file.is_file() and read_json(file, WHOLE).get("_class_name") == "UNet2DConditionModel"


def check_unet(config: Mapping, name: str, said: str) -> None:
    """Raise UserError unless the configuration of a stock UNet, of what is `said`, is that of the painter `name`."""
    key, value, otherwise = KINDS[name].unet
    if config.get(key) != value:
        raise UserError(
            f"{said} {otherwise} (the {key} of its UNet is {config.get(key)!r} instead of {value!r}), which the "
            f"painter {name!r} is: give one, or set config.painter.name to another"
        )


def _check_index(index, name, said):
    """index: model_index.json, {part: [library, class]}."""
    found = index.get("_class_name")
    for part, source in {"the pipeline": found, **index}.items():
        if isinstance(source, list) and source and source[0] not in STOCK_LIBRARIES and not part.startswith("_"):
            raise UserError(
                f"{said} brings code of its own for {part} ({'.'.join(map(str, source))}), which is never run: give "
                f"the folder of a stock pipeline"
            )
    if found != KINDS[name].pipeline:
        others = [other for other, kind in KINDS.items() if kind.pipeline == found]
        remedy = f"set config.painter.name to {others[0]!r}, or " if others else ""
        raise UserError(
            f"{said} is a {found}, and the painter {name!r} is a {KINDS[name].pipeline}: {remedy}give another folder"
        )


def _check_part(folder, complaint):
    """complaint: of a folder without weights."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        weight_shapes(file)
    if not files:
        pickles = sorted(folder.glob("*.bin"))
        for file in pickles:
            check_torch_file(file, "give weights as safetensors")
        if not pickles:
            raise MissingFileError(complaint)


def _check_vae(source):
    folder, said = Path(source), f"config.pretrained.vae = {source!r}"
    if not folder.exists():
        check_hub("config.pretrained.vae", source)
        return
    wanted = "give a folder with a VAE's config.json and weights, a hub id, or '' for the painter's own"
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{said} could not be loaded (it has no config.json): {wanted}")
    found = read_json(folder / "config.json", wanted).get("_class_name", "no model of diffusers")
    if found != "AutoencoderKL":
        raise UserError(f"{said} holds {found}: give an AutoencoderKL")
    _check_part(folder, f"{said} has no weights: {wanted}")


###### LoRAs ######


def read_lora(
    folder: str | Path, shapes: Mapping[str, Sequence[int]], name: str, remedy: str
) -> dict[str, torch.Tensor]:
    """{key: tensor} of the LoRA that diffusers wrote into `folder`.

    shapes: {key: shape} of the UNet that it is for; {} if they are not known yet. name: of the flag or key that names
    the folder. remedy: what a message says to do.
    Raises MissingFileError, or UserError for a file that is damaged, empty, not finite, or of another UNet."""
    said = f"{name} = {str(folder)!r}"
    file = Path(folder) / LORA_FILE
    if Path(folder).is_file():
        raise MissingFileError(f"{said} is a file: give the folder that holds its {LORA_FILE}")
    if not file.is_file():
        found = f"has no {LORA_FILE}" if Path(folder).is_dir() else "does not exist"
        raise MissingFileError(f"{said} {found}: give a folder with a LoRA that a run or diffusers wrote")
    with about(name, str(folder)):
        weights = read_weights(file)
    if not weights:
        raise UserError(f"{said} has no weights in its {LORA_FILE}: {remedy}")
    broken = [key for key, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{said} has NaN or infinite numbers in {len(broken)} of {len(weights)} weights, so its training diverged: "
            f"give an earlier lora/epoch_XXXX of that run, or another folder"
        )
    if shapes:
        _check_lora_fits(weights, shapes, said)
    return weights


def _check_lora_fits(weights, shapes, said):
    """A LoRA adds B A to a layer's weight W (out, in, ...): A is (rank, in, ...), B is (out, rank, ...)."""
    pairs = {}
    for key, value in weights.items():
        match = re.fullmatch(r"unet\.(.+)\.lora_([AB])\.weight", key)
        if match is None:  # of another format, or for a text encoder: diffusers will say
            continue
        pairs.setdefault(match[1], {})[match[2]] = value
    for layer, pair in pairs.items():
        shape = shapes.get(f"{layer}.weight")
        if pair.keys() != {"A", "B"}:
            missing = ({"A", "B"} - pair.keys()).pop()
            raise UserError(f"{said} lacks unet.{layer}.lora_{missing}.weight: it is incomplete, copy it again")
        a, b = pair["A"], pair["B"]
        if shape is None or (b.shape[0], a.shape[1], a.shape[0]) != (shape[0], shape[1], b.shape[1]):
            wanted = "the UNet has no such layer" if shape is None else f"the UNet's layer is {tuple(shape[:2])}"
            raise UserError(
                f"{said} does not fit config.pretrained.model: {layer} has a LoRA from {a.shape[1]} to {b.shape[0]} "
                f"channels, and {wanted}; give a LoRA of this painter"
            )
