"""Prompts: loading them from text or JSON files, and drawing an epoch's worth of them."""

import json
from pathlib import Path

import torch

from config.errors import MissingFileError, UserError

JSON_KEY = "dreamfusion"  # the list inside threestudio's prompt library
MOST_WORDS = 75  # CLIP reads 77 tokens, of which two mark the ends, and a word is at least one


def load_prompts(path: str | Path, key: str = JSON_KEY) -> list[str]:
    """The prompts in a file, in its order.

    path: text with one prompt per line (blank lines are skipped), or JSON: a list, or an object with the list at `key`.
    Raises MissingFileError, for known files with what to put where, and UserError for a file that is not UTF-8, without
    prompts, or with one that no text encoder reads to its end.
    """
    path = Path(path)
    if path.is_dir():
        raise MissingFileError(f"{path} is a folder: give a text file with one prompt per line")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: {_how_to_get(path)}")
    text = _read_utf8(path)
    lines = _json_prompts(text, path, key) if path.suffix == ".json" else text.splitlines()
    for number, line in enumerate(lines, start=1):
        words = len(line.split())
        if words > MOST_WORDS:
            kind = "prompt" if path.suffix == ".json" else "line"
            raise UserError(
                f"{path}, {kind} {number}, has {words} words, but text encoders read {MOST_WORDS} at most and nothing "
                f"behind them: shorten it"
            )
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompts: write one per line")
    return prompts


def _read_utf8(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # tolerates the byte order mark that some editors write
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}, is not UTF-8: save the file as UTF-8") from error


class PromptDataset:
    """Training, validation and test prompts of a run: `train_set`, `val_set`, `test_set`, lists of str.

    A prompt's id is its index in `train_set`.
    """

    def __init__(self, train_file: str | Path, val_file: str | Path, test_file: str | Path, num_train: int = 0):
        """num_train: keep that many training prompts from the top of the file; 0 = all.

        Raises MissingFileError for a missing file; UserError for an empty one, for fewer than `num_train` prompts,
        and for a repeated training prompt (statistics are kept per prompt, so it would be two ids with one history).
        """
        train_set = load_prompts(train_file)
        if num_train > len(train_set):
            raise UserError(
                f"{train_file} has {len(train_set)} prompts, fewer than num_train = {num_train}: lower "
                f"num_train or set it to 0 for all"
            )
        self.train_set = train_set[:num_train] if num_train else train_set
        first = {}
        for index, prompt in enumerate(self.train_set, start=1):
            if first.setdefault(prompt, index) != index:
                raise UserError(f"{train_file}: prompt {index} repeats prompt {first[prompt]}, {prompt!r}: remove one")
        self.val_set = load_prompts(val_file)
        self.test_set = load_prompts(test_file)

    @classmethod
    def from_config(cls, prompts) -> "PromptDataset":
        """prompts: the section `config.prompts`."""
        return cls(prompts.train_file, prompts.val_file, prompts.test_file, prompts.num_train)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[list[str], torch.Tensor]:
        """Draws training prompts with replacement: ([batch_size] prompts, (batch_size,) int64 ids on the CPU)."""
        device = generator.device if generator is not None else "cpu"
        ids = torch.randint(len(self.train_set), (batch_size,), generator=generator, device=device).cpu()
        return self.prompts_of(ids), ids

    def fill_epoch(self, min_count: int, batch: int, at_least: int = 0) -> tuple[list[str], torch.Tensor]:
        """The first epoch: every training prompt `min_count` times in the list's order, then from its start again.

        batch: samples that all processes paint at a time; the length is a multiple of it.
        at_least: samples of an ordinary epoch; the first one is never shorter.
        Returns ([N] prompts, (N,) int64 ids) for all processes together.
        """
        wanted = torch.arange(len(self.train_set)).repeat_interleave(min_count)
        length = -(-max(len(wanted), at_least) // batch) * batch
        ids = wanted[torch.arange(length) % len(wanted)]
        return self.prompts_of(ids), ids

    def prompts_of(self, ids: torch.Tensor) -> list[str]:
        """The training prompts with these ids."""
        return [self.train_set[index] for index in ids.tolist()]


def _json_prompts(text: str, path: Path, key: str) -> list[str]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error}): fetch it again, or give a text file with one prompt per line"
        ) from None
    if isinstance(content, dict):
        if key not in content:
            raise UserError(
                f"{path} has the keys {', '.join(sorted(content))} but not {key!r}, under which the list "
                f"of prompts is expected"
            )
        content = content[key]
    if not isinstance(content, list) or not all(isinstance(prompt, str) for prompt in content):
        raise UserError(f"{path} must hold a list of texts, at the top or at {key!r}")
    return content


def _how_to_get(path: Path) -> str:
    if "dreamfusion" in path.name:
        return (
            "the 415 DreamFusion prompts are not shipped; put your copy at prompts/dreamfusion_415.txt (one per "
            "line), or load/prompt_library.json of the threestudio repository at prompts/dreamfusion_415.json, and "
            "name that file"
        )
    if path.parent.name == "curated":
        return (
            "the painter has not chosen its training prompts yet; run python -m tools.curate_prompts with the same "
            "--config, or use prompts/train_candidates.txt"
        )
    return "give a text file with one prompt per line"
