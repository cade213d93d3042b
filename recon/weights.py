"""Reading public files of weights: nothing but tensors is unpickled, and what is incomplete is refused."""

import json
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from config.errors import MissingFileError, UserError, about, first_line

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """{key: tensor} of a .safetensors file, or of a torch file, from its entry "state_dict" if it has one.

    Raises MissingFileError if there is no such file, UserError if it cannot be read: an incomplete download, or no
    weights."""
    file = Path(file)
    if file.suffix == ".safetensors":
        weight_shapes(file)
        return load_file(file)
    state = read_torch_file(file, "give a file of weights")
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} could not be read as a file of weights (it holds other things): download it again.")
    return state


def weight_shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a .safetensors file, from its header alone.

    Raises MissingFileError if there is no such file, UserError if it is incomplete or something else."""
    check_is_file(file, "give a file of weights")
    try:
        with safe_open(file, framework="np") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        if "not fully covered" in str(error):
            raise UserError(f"{file} could not be read (it is incomplete): download it again.") from error
        raise UserError(
            f"{file} could not be read as a file of weights (it is not a safetensors file: {first_line(error)}): "
            f"download it again."
        ) from error


def read_torch_file(file: str | Path, remedy: str, dictionaries: str | None = None) -> Any:
    """The content of a torch file, which is a pickle; no code in it is run.

    remedy: what a message says to give instead. dictionaries: how the names of classes end whose objects are read as
    OrderedDicts, None for no such classes.
    Raises MissingFileError if there is no such file, UserError if it is incomplete, no torch file, or holds anything
    but tensors, plain containers and those dictionaries."""
    return _unpickle(file, check_torch_file(file, remedy, dictionaries), remedy, dictionaries)


def check_torch_file(file: str | Path, remedy: str, dictionaries: str | None = None) -> list[str]:
    """The names of the classes in a torch file that `dictionaries` allows; arguments and errors of `read_torch_file`.

    Only the names are read, but of a file that is no zip archive, as torch wrote them before 2020, everything."""
    check_is_file(file, remedy)
    if not zipfile.is_zipfile(file):
        _unpickle(file, [], remedy, dictionaries)
        return []
    try:
        names = get_unsafe_globals_in_checkpoint(file)
    except UnpicklingError as error:
        raise _refusal(file, ["an unknown instruction"], remedy, dictionaries) from error
    except Exception as error:
        raise _unreadable(file, error) from error
    allowed = [name for name in names if dictionaries and name.endswith(f".{dictionaries}")]
    foreign = sorted(set(names) - set(allowed))
    if foreign:
        raise _refusal(file, foreign, remedy, dictionaries)
    return allowed


def _unpickle(file, allowed, remedy, dictionaries):
    try:
        # OrderedDict: the only dictionary to which the unpickler restores attributes besides its items
        with safe_globals([(OrderedDict, name) for name in allowed]), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise _refusal(file, ["an unknown instruction"], remedy, dictionaries) from error
    except Exception as error:
        raise _unreadable(file, error) from error


def check_is_file(file: str | Path, remedy: str) -> None:
    """Raise MissingFileError, which says the `remedy`, unless `file` is a file."""
    if not Path(file).is_file():
        found = "is a folder" if Path(file).is_dir() else "does not exist"
        raise MissingFileError(f"{file} {found}: {remedy}.")


def read_json(file: str | Path, remedy: str) -> dict:
    """The JSON object in `file`, such as a config.json. Raises MissingFileError or UserError, which say `remedy`."""
    check_is_file(file, remedy)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file} could not be read as JSON ({first_line(error)}): {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__} instead of keys and values: {remedy}.")
    return content


def check_checkpoint(key: str, checkpoint: str) -> None:
    """Refuse a file or folder of weights in which some file is damaged or holds code, from names and headers alone, and
    a hub id that cannot be downloaded.

    key: that names the `checkpoint`. Nothing is said of what else a folder should have. Raises UserError."""
    path = Path(checkpoint)
    if not path.exists():
        check_hub(key, checkpoint)
        return
    with about(key, checkpoint):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.suffix == ".safetensors":
                weight_shapes(file)
            elif file.suffix in TORCH_FILES:
                check_torch_file(file, "give the published file of weights")
            elif file.name == "config.json":
                read_json(file, "give the one that belongs to the weights")


def _refusal(file, found, remedy, dictionaries):
    allowed = (
        "tensors and plain containers" if dictionaries is None else f"tensors, plain containers and {dictionaries}s"
    )
    return UserError(
        f"{file} was refused, and no code in it was run, because it holds {', '.join(found[:3])} besides {allowed}: "
        f"{remedy}."
    )


def _unreadable(file, error):
    return UserError(f"{file} could not be read ({first_line(error)}): download it again.")


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    """`name` with every regular expression of `patterns` replaced by what stands for it, in their order."""
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def find_file(checkpoint: str | Path, name: str, remedy: str) -> Path:
    """The file `name` of a checkpoint, which is the file's own path, its folder, or a hub id to download it from.

    remedy: what the message says to give instead. Raises MissingFileError."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.is_dir() or not may_be_hub_id(str(checkpoint)):
        if (path / name).is_file():
            return path / name
        raise MissingFileError(f"{str(checkpoint)!r} does not exist or has no {name}: give {remedy}.")
    trouble = hub_trouble(str(checkpoint))
    try:
        if not trouble:
            return Path(hf_hub_download(str(checkpoint), name))
    except Exception as error:  # of many kinds, not all of them OSErrors
        trouble = first_line(error)
    raise MissingFileError(
        f"{name} of {str(checkpoint)!r}, which is not a local path, could not be downloaded ({trouble}): give {remedy}."
    )


def hub_trouble(source: str, revision: str | None = None) -> str:
    """Why the hub id `source` cannot be downloaded, in words; "" if it can, or if something of it is in the cache.

    The hub is asked once, where a download would ask for half a minute."""
    if (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model") / "snapshots").is_dir():
        return ""
    try:
        HfApi().model_info(source, revision=revision, timeout=10)
    except RepositoryNotFoundError:
        return "the hub has no such repository, or it is private"
    except RevisionNotFoundError:
        return f"it has no revision {revision!r}"
    except HfHubHTTPError as error:
        return first_line(error)
    except Exception as error:
        return f"no network: {first_line(error)}"
    return ""


def check_hub(key: str, source: str, revision: str | None = None) -> None:
    """Raise MissingFileError if the hub id `source`, the value of `key`, cannot be downloaded; see `hub_trouble`."""
    if not may_be_hub_id(source):
        raise MissingFileError(f"{key} = {source!r} does not exist: give a folder, or a hub id such as someone/a-model")
    trouble = hub_trouble(source, revision)
    if trouble:
        raise MissingFileError(
            f"{key} = {source!r} is no local folder, and as a hub id it cannot be downloaded ({trouble}): connect this "
            f"machine to the network, or give a folder or another hub id"
        )


def differences(weights: Mapping[str, torch.Tensor | Sequence[int]], shapes: Mapping[str, Sequence[int]]) -> str:
    """Which `weights` {key: tensor, or its shape} are missing, unknown or of another shape, in words; "" if none.

    shapes: {key: shape} of the complete model."""
    found = {key: tuple(getattr(value, "shape", value)) for key, value in weights.items()}
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unknown": sorted(found.keys() - shapes.keys()),
        "of another shape": sorted(
            f"{key}: {found[key]} instead of {tuple(shapes[key])}"
            for key in shapes.keys() & found.keys()
            if found[key] != tuple(shapes[key])
        ),
    }
    return "; ".join(
        f"{len(keys)} {problem} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for problem, keys in problems.items()
        if keys
    )


def check_weights(
    weights: Mapping[str, torch.Tensor | Sequence[int]], shapes: Mapping[str, Sequence[int]], model: str, remedy: str
) -> None:
    """Raise UserError that lists the `differences`, if there are any.

    model: what the message calls the model; remedy: what it says to give instead."""
    found = differences(weights, shapes)
    if found:
        raise UserError(f"These are not the weights of {model}: {found}. Give {remedy}.")


def may_be_hub_id(checkpoint: str) -> bool:
    """Whether it is written as an id on the hub, "owner/name", and not as a file of weights."""
    is_path_of_a_file = Path(checkpoint).suffix in (".safetensors", ".pth", ".ckpt")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", checkpoint)) and not is_path_of_a_file
