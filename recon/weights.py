"""Reading files of weights that strangers made: tensors and nothing else, complete or refused."""

import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file


def read_weights(file):
    """{key: tensor} of a .safetensors file, or of a torch file from which nothing but tensors is unpickled.

    Raises FileNotFoundError if there is no such file, ValueError if it cannot be read: half-downloaded, or not
    weights."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a file of weights.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{file} could not be read as a file of weights ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): download it again, completely."
        ) from error
    return state.get("state_dict", state)


def find_file(checkpoint, name, remedy):
    """The file `name` of a checkpoint: a local path to it, its local folder, or a hub id, from which it is downloaded.

    remedy: what the message says to give instead. Raises FileNotFoundError."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if (
        path.is_dir()
        or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(checkpoint))
        or path.suffix in (".safetensors", ".pth")
    ):
        if (path / name).is_file():
            return path / name
        raise FileNotFoundError(f"{str(checkpoint)!r} does not exist or has no {name}: give {remedy}.")
    try:
        return Path(hf_hub_download(str(checkpoint), name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{name} of {str(checkpoint)!r}, which is no local path, could not be downloaded "
            f"({str(error).splitlines()[0]}): give {remedy}."
        ) from error


def differences(weights, shapes):
    """Which `weights` {key: tensor} are missing, unknown or of another shape, in words; "" if none.

    shapes: {key: shape} of a complete model."""
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
        f"{len(keys)} {what} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for what, keys in problems.items()
        if keys
    )


def check_weights(weights, shapes, model, remedy):
    """Raise ValueError that lists the `differences`.

    model: what the message calls the model; remedy: what it says to give instead."""
    found = differences(weights, shapes)
    if found:
        raise ValueError(f"These are not the weights of {model}: {found}. Give {remedy}.")
