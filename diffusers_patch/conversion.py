"""What the conversions of public painters share: configurations, tokenizers, a folder that is written as a whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTokenizer

from recon.weights import find_file

CLIP_TOKENS = 77  # of a prompt, in every CLIP


def read_configs(folder: str | Path, parts: Sequence[str]) -> dict[str, dict]:
    """{part: configuration} from the files PART.json in `folder`. Raises FileNotFoundError or ValueError."""
    configs = {}
    for part in parts:
        file = Path(folder) / f"{part}.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: give a folder with {', '.join(f'{p}.json' for p in parts)}."
            )
        try:
            configs[part] = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): correct it.") from error
    return configs


def load_tokenizer(place: str | Path, subfolder: str, vocabulary: int, remedy: str) -> CLIPTokenizer:
    """CLIP's tokenizer in the folder `subfolder` ("" = none) of `place`, a folder or hub id, with `vocabulary` tokens.

    remedy: what messages say to give. Raises FileNotFoundError or ValueError."""
    # asked for by name, because where files are missing transformers makes a tokenizer that knows no words
    if not any(Path(place, subfolder, name).is_file() for name in ("tokenizer.json", "vocab.json")):
        find_file(place, Path(subfolder, "vocab.json").as_posix(), remedy)
    found = CLIPTokenizer.from_pretrained(place, subfolder=subfolder, local_files_only=Path(place).is_dir())
    if len(found) != vocabulary:
        raise ValueError(
            f"the tokenizer in {str(Path(place, subfolder))!r} has {len(found)} tokens instead of {vocabulary}: give "
            f"{remedy}."
        )
    # a folder that has the vocabulary and the merges alone does not say it
    found.model_max_length = min(found.model_max_length, CLIP_TOKENS)
    return found


def load_tokenizers_of(folder: str | Path, *names: str) -> dict[str, CLIPTokenizer]:
    """{name: tokenizer} of a pipeline folder, checked against its text encoders; names: "tokenizer", "tokenizer_2".

    {} for anything but a folder: on the hub pipelines are complete. Raises FileNotFoundError or ValueError."""
    if not Path(folder).is_dir():
        return {}
    remedy = "a complete folder, of which its tokenizers are a part"
    found = {}
    for name in names:
        text = CLIPTextConfig.from_pretrained(folder, subfolder=name.replace("tokenizer", "text_encoder"))
        found[name] = load_tokenizer(folder, name, text.vocab_size, remedy)
    return found


def save_pipeline(pipeline: DiffusionPipeline, out: str | Path) -> None:
    """Write `pipeline` as the new folder `out`, which is there completely or not at all.

    Raises FileExistsError, or OSError if it cannot be written.
    """
    out = Path(out).resolve()
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
            pipeline.save_pretrained(Path(unfinished) / "pipeline")
            (Path(unfinished) / "pipeline").rename(out)
    except SafetensorError as error:  # how a full disk is reported
        raise OSError(f"{out} could not be written ({error}).") from error


def check_new(out: str | Path) -> None:
    """Raise FileExistsError if there is something at `out` already."""
    if Path(out).exists():
        raise FileExistsError(f"{out} exists already: give the name of a new folder, or remove it.")
