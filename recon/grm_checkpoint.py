"""Converts the published GRM files (grm_u.pth, grm_r.pth, grm_zero123plus.pth) to folders that `recon.grm.GRM` loads.

A published file is a pickle of the weights and a configuration object. No code in it is run: torch's unpickler for
weights accepts tensors and plain containers only, and is made to read an EasyDict as an OrderedDict.
"""

from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from recon.grm import GRM, RenderParams, VisualParams

PREFIXES = ("module.", "visual_encoder.")  # of data-parallel training; of the network as opposed to its renderer
PUBLISHED = "give grm_u.pth, grm_r.pth or grm_zero123plus.pth of GRM"


def read_checkpoint(file: str | Path) -> Any:
    """The content of a torch file, with OrderedDicts in place of EasyDicts; no code in it is run.

    Raises FileNotFoundError or ValueError with one sentence if there is no such file, if it is incomplete or no torch
    file, or if it holds anything but tensors, plain containers and EasyDicts."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not a file: {PUBLISHED}.")
    try:
        objects = get_unsafe_globals_in_checkpoint(file)
        dictionaries = [name for name in objects if name.endswith(".EasyDict")]  # of whichever module
        foreign = sorted(set(objects) - set(dictionaries))
        if not foreign:
            # the only dictionary to which the unpickler restores attributes besides its items, which EasyDicts have
            with safe_globals([(OrderedDict, name) for name in dictionaries]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        foreign = ["an unknown instruction"]
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{file} could not be read ({reason}): download it again.") from error
    raise ValueError(
        f"{file} was refused, and no code in it was run, because it holds {', '.join(foreign[:3])} besides tensors, "
        f"plain containers and EasyDicts: {PUBLISHED}."
    )


def _params(config, part, known, file):
    """Those parameters in config.model_config.<part>.params that are fields of the dataclass `known`, and the names of
    the others."""
    try:
        params = config["model_config"][part]["params"]
        names = {field.name for field in fields(known)}
        return {name: params[name] for name in params if name in names}, [name for name in params if name not in names]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} has no config.model_config.{part}.params: {PUBLISHED}.") from error


def convert(source: str | Path, out: str | Path) -> list[str]:
    """Convert the published file `source` to config.json and model.safetensors in the folder `out`.

    Both files are written elsewhere first, so that an error leaves `out` as it was. Returns the names of the parameters
    that were left out, which are those of training and of the published renderer.
    Raises FileNotFoundError or ValueError with one sentence, OSError if the folder cannot be written."""
    checkpoint = read_checkpoint(source)
    if not isinstance(checkpoint, dict) or not {"model", "config"} <= checkpoint.keys():
        raise ValueError(f"{source} is not a file of GRM, which holds 'model' and 'config': {PUBLISHED}.")
    weights = checkpoint["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{source} has a 'model' that is not a dictionary of tensors: {PUBLISHED}.")
    visual, unused_visual = _params(checkpoint["config"], "visual", VisualParams, source)
    render, unused_render = _params(checkpoint["config"], "render", RenderParams, source)
    if "scale_min_act" not in render:  # the published renderer then uses its own values of all three constants
        render = {name: value for name, value in render.items() if name not in ("scale_max_act", "scale_multi_act")}
    for prefix in PREFIXES:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    model = GRM.from_weights(weights, {"visual": visual, "render": render}, source)
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as unfinished:
            model.save_pretrained(unfinished)
            out.mkdir(exist_ok=True)
            for file in Path(unfinished).iterdir():
                file.replace(out / file.name)
    except SafetensorError as error:  # how a full disk is reported
        raise OSError(f"{out} could not be written ({error}).") from error
    return [f"visual.{name}" for name in unused_visual] + [f"render.{name}" for name in unused_render]
