"""Objects keep their size: advantages that do not pay for larger ones.

Larger objects survive a reconstruction better, and few samples point anywhere exactly, so that objects grow in a run
although nobody asked for it. Two things are taken out of the advantages, both in proportion to how much larger a
sample's object is than usual for its prompt: what they pay for area by themselves, and a penalty on what the objects
have grown so far, which is what finds the growth that no single epoch shows.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ddpo.stat_tracking import PerPromptStatTracker, one_value_per_prompt

SMALLEST = 1e-3  # share of a view below which an area is not told from nothing

# The penalty is a proportional and integral controller of the growth in log area: where objects are 1 % larger than at
# the start, one whose area is a standard deviation above its prompt's mean loses 0.15, and 0.01 more for every epoch in
# which they were.
PROPORTIONAL, INTEGRAL = 15.0, 1.0
SMOOTHED, REMEMBERED = 2, 32  # epochs over which the growth is averaged, and added up
LARGEST_PENALTY = 2.0


def log_area(foreground: np.ndarray) -> np.ndarray:
    """The logarithm of the area of each object: (N,), from the share of each view that is foreground, (N, V).

    An object's area is the median of its views', so that a view which disagrees with the others, as when it shows the
    object too small, may be mended."""
    return np.log(np.median(foreground, 1).clip(SMALLEST))


def without(vector: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """`vector` (N,) without its part along `direction` (N,), which may be zero."""
    return vector - (vector @ direction) / (direction @ direction).clamp(min=torch.finfo(vector.dtype).tiny) * direction


class AreaControl:
    """Takes area out of an epoch's advantages, epoch after epoch, the first included.

    Areas are normalised like rewards, see `PerPromptStatTracker`. The area that is held is that of the first epoch in
    which a prompt is painted."""

    def __init__(self):
        self.tracker = PerPromptStatTracker(buffer_size=16, min_count=2)
        self.start = {}  # prompt -> mean log area in its first epoch
        self.growth = []  # of the last epochs, in log area

    def penalty(self) -> float:
        """What an object loses for every standard deviation that it is larger than its prompt's mean."""
        if not self.growth:
            return 0.0
        wanted = PROPORTIONAL * np.mean(self.growth[-SMOOTHED:]) + INTEGRAL * np.sum(self.growth)
        return float(np.clip(wanted, -LARGEST_PENALTY, LARGEST_PENALTY))

    def observe(self, foreground: np.ndarray, prompts: Sequence[str], good: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Count an epoch's growth; arguments as of a call. Returns prompts and log areas (n,) of the good samples."""
        kept = [prompt for prompt, is_good in zip(prompts, good, strict=True) if is_good]
        area = one_value_per_prompt("area", log_area(foreground[good]), kept)
        for prompt in dict.fromkeys(kept):
            same = [name == prompt for name in kept]
            self.start.setdefault(prompt, float(area[same].mean()))
        grown = float(np.mean(area - [self.start[prompt] for prompt in kept]))
        self.growth = [*self.growth, grown][-REMEMBERED:]
        return kept, area

    def __call__(
        self, advantages: torch.Tensor, foreground: np.ndarray, prompts: Sequence[str], good: np.ndarray
    ) -> torch.Tensor:
        """Advantages (N,) of the samples of ALL processes -> (N,), on the CPU.

        foreground: (N, V), see `log_area`; prompts: N; good: (N,) bool, the others keep their advantage and are not
        counted."""
        kept, area = self.observe(foreground, prompts, good)
        larger = torch.zeros_like(advantages)
        larger[torch.from_numpy(good)] = torch.as_tensor(self.tracker.update(kept, area), dtype=advantages.dtype)
        return without(advantages, larger) - self.penalty() * larger

    def state_dict(self) -> dict:
        """Everything that changes, as JSON values."""
        return {"tracker": self.tracker.state_dict(), "start": self.start, "growth": self.growth}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned."""
        self.tracker.load_state_dict(state["tracker"])
        self.start, self.growth = dict(state["start"]), list(state["growth"])
