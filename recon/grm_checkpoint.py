"""The published GRM files (grm_u.pth, grm_r.pth, grm_zero123plus.pth) as a folder that `recon.grm.GRM` loads.

    python -m recon.grm_checkpoint SOURCE OUT

SOURCE is a pickle with a configuration object beside the weights. It is read without running anything of it: torch's
unpickler for weights takes tensors and plain containers only, and is told to see an EasyDict as an OrderedDict. OUT
becomes a folder with config.json and model.safetensors.
"""

import argparse
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from recon.grm import GRM, RenderParams, VisualParams

PREFIXES = ("module.", "visual_encoder.")  # of a parallel training; of the network beside its renderer
PUBLISHED = "give grm_u.pth, grm_r.pth or grm_zero123plus.pth of GRM"


def read_checkpoint(file):
    """What a torch file holds, with OrderedDicts for its EasyDicts; nothing in it is run.

    Raises FileNotFoundError or ValueError with one sentence: no file; half-downloaded or not a torch file; one that
    holds anything but tensors, plain containers and EasyDicts."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not a file: {PUBLISHED}.")
    try:
        objects = get_unsafe_globals_in_checkpoint(file)
        dictionaries = [name for name in objects if name.endswith(".EasyDict")]  # whichever module it came from
        foreign = sorted(set(objects) - set(dictionaries))
        if not foreign:
            # the one dictionary that the unpickler lets have attributes beside its items, as an EasyDict has
            with safe_globals([(OrderedDict, name) for name in dictionaries]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        foreign = ["an unknown instruction"]
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{file} could not be read ({reason}): download it again, completely.") from error
    raise ValueError(
        f"{file} was refused and nothing of it run, because it holds {', '.join(foreign[:3])} beside "
        f"tensors, plain containers and EasyDicts: {PUBLISHED}."
    )


def _params(config, part, known, file):
    """The parameters `known` (a dataclass) of config.model_config.<part>.params, and the names of the others."""
    try:
        params = config["model_config"][part]["params"]
        names = {field.name for field in fields(known)}
        return {name: params[name] for name in params if name in names}, [name for name in params if name not in names]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} has no config.model_config.{part}.params: {PUBLISHED}.") from error


def convert(source, out):
    """Write the folder `out` from the published file `source`.

    Returns the names of the parameters left aside, which are of training and of the published renderer.
    Raises FileNotFoundError or ValueError with one sentence."""
    checkpoint = read_checkpoint(source)
    if not isinstance(checkpoint, dict) or not {"model", "config"} <= checkpoint.keys():
        raise ValueError(f"{source} is not a file of GRM, which holds 'model' and 'config': {PUBLISHED}.")
    weights = checkpoint["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{source} has a 'model' that is not a dictionary of tensors: {PUBLISHED}.")
    visual, unused_visual = _params(checkpoint["config"], "visual", VisualParams, source)
    render, unused_render = _params(checkpoint["config"], "render", RenderParams, source)
    if "scale_min_act" not in render:  # the published renderer then takes its own constants for all three
        render = {name: value for name, value in render.items() if name not in ("scale_max_act", "scale_multi_act")}
    for prefix in PREFIXES:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    GRM.from_weights(weights, {"visual": visual, "render": render}, source).save_pretrained(out)
    return [f"visual.{name}" for name in unused_visual] + [f"render.{name}" for name in unused_render]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out")
    args = parser.parse_args()
    try:
        unused = convert(args.source, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"Wrote {args.out}. Not needed of its configuration: {', '.join(unused) or 'nothing'}.")


if __name__ == "__main__":
    main()
