"""The captions of the small world and their fixed split: `python -m tiny.captions` writes prompts/tiny/*.txt.

No painter is trained on validation or test captions, whether supervised or by reinforcement learning.
"""

from pathlib import Path

import torch

from tiny.objects import all_captions, parse_caption, random_caption

FOLDER = Path(__file__).resolve().parent.parent / "prompts" / "tiny"
SIZES = {"validation": 48, "test": 64, "train": 128}


def split() -> dict[str, list[str]]:
    """{"validation", "test", "train"}: disjoint lists of captions with two primitives, in a fixed random order."""
    candidates = [caption for caption in all_captions() if " on top of " in caption or " next to " in caption]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = iter(candidates[i] for i in order)
    return {name: [next(shuffled) for _ in range(count)] for name, count in SIZES.items()}


def pairs() -> list[str]:
    """The training captions of objects side by side, which the small MVDream paints wrongly by itself."""
    return [caption for caption in split()["train"] if " next to " in caption]


def held_out() -> frozenset[str]:
    """The validation and test captions, which no painter is trained on."""
    captions = split()
    return frozenset(captions["validation"] + captions["test"])


def random_training_captions(count: int, generator: torch.Generator, min_primitives: int = 1) -> list[str]:
    """`count` random captions with at least `min_primitives` primitives, none of them held out."""
    captions, excluded = [], held_out()
    while len(captions) < count:
        caption = random_caption(generator)
        if caption not in excluded and len(parse_caption(caption)[0]) >= min_primitives:
            captions.append(caption)
    return captions


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, captions in {**split(), "pairs": pairs()}.items():
        (FOLDER / f"{name}.txt").write_text("\n".join(captions) + "\n")
