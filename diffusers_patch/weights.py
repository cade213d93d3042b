"""Reading published weights, and saying in one sentence what is wrong with them."""

import torch
from safetensors.torch import load_file


def read_weights(file):
    """The tensors of a .safetensors file, or of a torch file from which nothing but tensors is unpickled.

    Raises ValueError if the file cannot be read: half-downloaded, or not weights."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{file} could not be read as a file of weights ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]}): download it again, completely.") from error
    return state.get("state_dict", state)


def check_weights(weights, shapes, model, remedy):
    """Raise ValueError that lists which `weights` {key: tensor} are missing, unknown or of another shape.

    shapes: {key: shape} of a complete model; model: what the message calls it; remedy: what it says to give instead."""
    problems = {
        "missing": sorted(shapes.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - shapes.keys()),
        "of another shape": sorted(
            f"{key}: {tuple(weights[key].shape)} instead of {tuple(shapes[key])}"
            for key in shapes.keys() & weights.keys() if tuple(weights[key].shape) != tuple(shapes[key])),
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
            for what, keys in problems.items() if keys)
        raise ValueError(f"These are not the weights of {model}: {found}. Give {remedy}.")
