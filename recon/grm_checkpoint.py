"""Converts the published GRM files (grm_u.pth, grm_r.pth, grm_zero123plus.pth) to folders that `recon.grm.GRM` loads.

A published file is a pickle of the weights and a configuration object. No code in it is run: torch's unpickler for
weights accepts tensors and plain containers only, and is made to read an EasyDict as an OrderedDict.
"""

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError

from config.errors import UnwritableError, UserError
from recon.grm import GRM, RenderParams, VisualParams
from recon.weights import read_torch_file

PREFIXES = ("module.", "visual_encoder.")  # of data-parallel training; of the network as opposed to its renderer
PUBLISHED = "give grm_u.pth, grm_r.pth or grm_zero123plus.pth of GRM"


def _params(config, part, known, file):
    """Those parameters in config.model_config.<part>.params that are fields of the dataclass `known`, and the names of
    the others."""
    try:
        params = config["model_config"][part]["params"]
        names = {field.name for field in fields(known)}
        return {name: params[name] for name in params if name in names}, [name for name in params if name not in names]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} has no config.model_config.{part}.params: {PUBLISHED}.") from error


def convert(source: str | Path, out: str | Path) -> list[str]:
    """Convert the published file `source` to config.json and model.safetensors in the folder `out`.

    Both files are written elsewhere first, so that an error leaves `out` as it was. Returns the names of the parameters
    that were left out, which are those of training and of the published renderer.
    Raises MissingFileError or UserError with one sentence, UnwritableError if the folder cannot be written."""
    checkpoint = read_torch_file(source, PUBLISHED, dictionaries="EasyDict")
    if not isinstance(checkpoint, dict) or not {"model", "config"} <= checkpoint.keys():
        raise UserError(f"{source} is not a file of GRM, which holds 'model' and 'config': {PUBLISHED}.")
    weights = checkpoint["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{source} has a 'model' that is not a dictionary of tensors: {PUBLISHED}.")
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
        raise UnwritableError(f"{out} could not be written ({error}).") from error
    return [f"visual.{name}" for name in unused_visual] + [f"render.{name}" for name in unused_render]
