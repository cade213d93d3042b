"""Reading files of weights that strangers made: tensors and nothing else, complete or refused."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def read_weights(file):
    """{key: tensor} of a .safetensors file, or of a torch file from which nothing but tensors is unpickled.

    Raises FileNotFoundError if there is no such file, ValueError if it cannot be read: half-downloaded, or not weights."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a file of weights.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{file} could not be read as a file of weights ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]}): download it again, completely.") from error
    return state.get("state_dict", state)


def differences(wanted, found):
    """How the tensors of a file differ from those of a module, in words; "" if they do not.

    wanted, found: {key: tensor}, of which only the keys and shapes are looked at."""
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(
            f"{key}: {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted.keys() & found.keys() if found[key].shape != wanted[key].shape),
    }
    return "; ".join(f"{len(keys)} {what} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
                     for what, keys in problems.items() if keys)
