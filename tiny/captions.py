"""The captions of the small world, split once and for all: `python -m tiny.captions` writes prompts/tiny/*.txt.

Validation and test captions are never seen by any training: not by the painter's, not by reinforcement learning."""

from pathlib import Path

import torch

from tiny.objects import all_captions

FOLDER = Path(__file__).resolve().parent.parent / "prompts" / "tiny"
SIZES = {"validation": 48, "test": 64, "train": 128}


def split():
    """{"train", "validation", "test"}: disjoint lists of captions with two primitives, in a fixed random order."""
    pairs = [caption for caption in all_captions() if " on top of " in caption or " next to " in caption]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = iter(pairs[i] for i in order)
    return {name: [next(shuffled) for _ in range(count)] for name, count in SIZES.items()}


def held_out():
    """The captions that no training may see."""
    captions = split()
    return frozenset(captions["validation"] + captions["test"])


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, captions in split().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(captions) + "\n")
