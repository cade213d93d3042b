"""Reading public files of weights: nothing but tensors is unpickled, and what is incomplete is refused."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """{key: tensor} of a .safetensors file, or of a torch file, from its entry "state_dict" if it has one.

    Raises FileNotFoundError if there is no such file, ValueError if it cannot be read: an incomplete download, no
    weights, or code besides them, of which nothing is run."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} {'is a folder' if file.is_dir() else 'does not exist'}: give a file of weights."
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return state.get("state_dict", state)
    except Exception as error:
        if foreign := _foreign_objects(file, error):
            raise ValueError(
                f"{file} was refused, and no code in it was run, because it holds {', '.join(foreign[:3])} besides "
                f"tensors and plain containers: give a file of weights."
            ) from error
        raise ValueError(
            f"{file} could not be read as a file of weights ({type(error).__name__}: {_first_line(error)}): download "
            f"it again."
        ) from error


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    """`name` with every regular expression of `patterns` replaced by what stands for it, in their order."""
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def find_file(checkpoint: str | Path, name: str, remedy: str) -> Path:
    """The file `name` of a checkpoint, which is the file's own path, its folder, or a hub id to download it from.

    remedy: what the message says to give instead. Raises FileNotFoundError."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.is_dir() or not may_be_hub_id(str(checkpoint)):
        if (path / name).is_file():
            return path / name
        raise FileNotFoundError(f"{str(checkpoint)!r} does not exist or has no {name}: give {remedy}.")
    try:
        return Path(hf_hub_download(str(checkpoint), name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{name} of {str(checkpoint)!r}, which is not a local path, could not be downloaded "
            f"({_first_line(error)}): give {remedy}."
        ) from error


def differences(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]) -> str:
    """Which `weights` {key: tensor} are missing, unknown or of another shape, in words; "" if none.

    shapes: {key: shape} of the complete model."""
    problems = {
        "missing": sorted(shapes.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - shapes.keys()),
        "of another shape": sorted(
            f"{key}: {tuple(weights[key].shape)} instead of {tuple(shapes[key])}"
            for key in shapes.keys() & weights.keys()
            if tuple(weights[key].shape) != tuple(shapes[key])
        ),
    }
    return "; ".join(
        f"{len(keys)} {problem} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for problem, keys in problems.items()
        if keys
    )


def check_weights(
    weights: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], model: str, remedy: str
) -> None:
    """Raise ValueError that lists the `differences`, if there are any.

    model: what the message calls the model; remedy: what it says to give instead."""
    found = differences(weights, shapes)
    if found:
        raise ValueError(f"These are not the weights of {model}: {found}. Give {remedy}.")


def _foreign_objects(file, error):
    """The names of what an unpickler that refused `file` with `error` would have had to import; none if it was refused
    for being no file of torch's."""
    if not isinstance(error, UnpicklingError) or not is_zipfile(file):
        return []
    return sorted(get_unsafe_globals_in_checkpoint(file)) or ["an unknown instruction"]


def _first_line(error):
    return (str(error).splitlines() or [""])[0].rstrip(".")


def may_be_hub_id(checkpoint: str) -> bool:
    """Whether it is written as an id on the hub, "owner/name", and not as a file of weights."""
    is_path_of_a_file = Path(checkpoint).suffix in (".safetensors", ".pth", ".ckpt")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", checkpoint)) and not is_path_of_a_file
