"""A small classifier of the coloured shapes in a single view. It evaluates painters independently of the reward."""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from config.errors import MissingFileError
from tiny.objects import COLOURS, SHAPES, parse_caption
from tiny.training import WEIGHTS

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


def pair_labels(captions: list[str]) -> torch.Tensor:
    """The (colour, shape) pairs named in N captions: (N, 32) of 0 and 1, in the order of PAIRS.

    Raises ValueError for a caption that does not describe an object of the small world."""
    return torch.stack([torch.tensor([float(pair in parse_caption(c)[0]) for pair in PAIRS]) for c in captions])


class Classifier(nn.Module):
    """Predicts which of PAIRS are visible: views (B, 3, 64, 64) in [0, 1] -> logits (B, 32)."""

    def __init__(self, width: int = 24):
        super().__init__()
        w = width
        self.features = nn.Sequential(
            nn.Conv2d(3, w, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * w),
            nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1),
            nn.GroupNorm(4, 2 * w),
            nn.SiLU(),
            nn.Conv2d(2 * w, 3 * w, 3, stride=2, padding=1),
            nn.GroupNorm(4, 3 * w),
            nn.SiLU(),
            nn.Conv2d(3 * w, 3 * w, 3, padding=1),
            nn.GroupNorm(4, 3 * w),
            nn.SiLU(),
        )
        self.head = nn.Linear(6 * w, len(PAIRS))

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        x = self.features(2 * views - 1).flatten(2)
        return self.head(torch.cat([x.mean(2), x.amax(2)], 1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights to `folder`/model.safetensors in half precision."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path = WEIGHTS / "classifier") -> "Classifier":
        """Load the float32 model in evaluation mode. Raises FileNotFoundError if `folder` has no model.safetensors."""
        file = Path(folder) / "model.safetensors"
        if not file.is_file():
            raise MissingFileError(
                f"{file} does not exist; train the classifier with `python -m tiny.train_classifier`."
            )
        model = cls()
        model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
        return model.eval()


@torch.no_grad()
def caption_agreement(
    classifier: nn.Module, views: torch.Tensor, captions: list[str], use: torch.Tensor
) -> torch.Tensor:
    """Share of its caption's coloured shapes that the classifier finds in each sample: (N,) in [0, 1].

    views: (N, V, 3, 64, 64) in [0, 1]; use: (N, V) bool, the views to include, at least one per sample. One primitive
    can occlude another in a single view, so probabilities are averaged over views. For a caption with K coloured
    shapes, the K most probable ones count as found."""
    N, V = views.shape[:2]
    logits = torch.cat([classifier(part) for part in views.float().flatten(0, 1).split(64)]).reshape(N, V, -1)
    probability = (logits.sigmoid() * use[..., None]).sum(1) / use.sum(1, keepdim=True)
    labels = pair_labels(captions)
    order = probability.argsort(-1, descending=True)
    found = [labels[n, order[n, : int(labels[n].sum())]].mean() for n in range(N)]
    return torch.stack(found)
