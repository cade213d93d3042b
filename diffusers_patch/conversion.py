"""What the conversions of public painters share: configurations, tokenizers, a folder that is written as a whole."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTokenizer

from config.errors import UnwritableError, UserError
from config.validate import check_folder
from diffusers_patch.checks import check_tokenizer
from recon.weights import read_json

CLIP_TOKENS = 77  # of a prompt, in every CLIP


def read_configs(folder: str | Path, parts: Sequence[str]) -> dict[str, dict]:
    """{part: configuration} from the files PART.json in `folder`. Raises MissingFileError or UserError."""
    remedy = f"give a folder with {', '.join(f'{part}.json' for part in parts)}"
    return {part: read_json(Path(folder) / f"{part}.json", remedy) for part in parts}


def load_tokenizer(place: str | Path, subfolder: str, vocabulary: int, remedy: str) -> CLIPTokenizer:
    """CLIP's tokenizer in the folder `subfolder` ("" = none) of `place`, a folder or hub id, with `vocabulary` tokens.

    remedy: what messages say to give. Raises MissingFileError or UserError."""
    # asked for by name, because where files are missing transformers makes a tokenizer that knows no words
    check_tokenizer(place, subfolder, remedy)
    found = CLIPTokenizer.from_pretrained(place, subfolder=subfolder, local_files_only=Path(place).is_dir())
    if len(found) != vocabulary:
        raise UserError(
            f"the tokenizer in {str(Path(place, subfolder))!r} has {len(found)} tokens instead of {vocabulary}: give "
            f"{remedy}."
        )
    # a folder that has the vocabulary and the merges alone does not say it
    found.model_max_length = min(found.model_max_length, CLIP_TOKENS)
    return found


def load_tokenizers_of(folder: str | Path, *names: str) -> dict[str, CLIPTokenizer]:
    """{name: tokenizer} of a pipeline folder, checked against its text encoders; names: "tokenizer", "tokenizer_2".

    {} for anything but a folder: on the hub pipelines are complete. Raises MissingFileError or UserError."""
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

    Raises UnwritableError as `check_new`, or if it cannot be written.
    """
    out = Path(out).resolve()
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
            pipeline.save_pretrained(Path(unfinished) / "pipeline")
            (Path(unfinished) / "pipeline").rename(out)
    except SafetensorError as error:  # how a full disk is reported
        raise UnwritableError(f"{out} could not be written ({error}).") from error


def check_new(out: str | Path) -> None:
    """Raise UnwritableError if there is something at `out`, the argument OUT, already, or if it cannot be made."""
    if Path(out).exists():
        raise UnwritableError(f"OUT is {str(out)!r}, which exists already: give the name of a new folder, or remove it")
    check_folder("OUT", out)
