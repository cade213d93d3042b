"""Running statistics of a value (the reward, or the KL) for every prompt.

Some prompts are easier than others. Normalising a value by the mean and std of its own prompt takes this difference out
of the advantage, like a value function would (DDPO, Black et al. 2023, section 4.3).
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from config.errors import UserError

STD_EPSILON = 1e-6


class PerPromptStatTracker:
    """Normalises values by the mean and std of the last `buffer_size` values of the same prompt.

    buffer_size: how many values a prompt's FIFO holds, >= 1.
    min_count: while a prompt's FIFO holds fewer values, the statistics of the whole batch are used instead, >= 1.
        With min_count > buffer_size that is always so.
    Raises ValueError for values below 1.
    """

    def __init__(self, buffer_size: int, min_count: int):
        for key, value in (("buffer_size", buffer_size), ("min_count", min_count)):
            if value < 1:
                raise ValueError(f"per_prompt_stat_tracking.{key} is {value}: it must be 1 or more")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._history = {}  # prompt -> deque of floats, oldest first

    def update(self, prompts: Sequence[str], values: np.ndarray) -> np.ndarray:
        """Append the values to their prompts' FIFOs, then return them normalised: (value - mean) / (std + 1e-6).

        prompts: N strings; values: (N,) array, tensor or list. All values of the call enter the FIFOs before any
        statistic is taken. std is the population std. Returns a (N,) numpy array of the type of `values`.
        Raises ValueError if the lengths differ or a value is not finite: it would spoil its prompt for epochs.
        """
        values = one_value_per_prompt("values", values, prompts)
        indices = {}  # prompt -> its positions in the call
        for i, prompt in enumerate(prompts):
            indices.setdefault(prompt, []).append(i)

        normalised = np.empty_like(values)
        for prompt, i in indices.items():
            history = self._history.setdefault(prompt, deque(maxlen=self.buffer_size))
            history.extend(values[i].tolist())
            seen = values if len(history) < self.min_count else np.array(history, dtype=values.dtype)
            normalised[i] = (values[i] - seen.mean()) / (seen.std() + STD_EPSILON)
        return normalised

    def get_stats(self) -> dict[str, dict]:
        """{prompt: {"mean", "std", "count"}} of the FIFOs; std is the population std without epsilon."""
        return {
            prompt: {"mean": float(np.mean(history)), "std": float(np.std(history)), "count": len(history)}
            for prompt, history in self._history.items()
        }

    def state_dict(self) -> dict:
        """The FIFOs as plain lists of floats: exact, and fit for JSON."""
        return {"history": {prompt: list(history) for prompt, history in self._history.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Load the FIFOs of `state_dict()`. `buffer_size` and `min_count` stay those of this tracker: if its
        buffer is smaller than the saved one, the newest values are kept."""
        self._history = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state["history"].items()}


def one_value_per_prompt(name: str, values: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """`values` as a (N,) array for N prompts. Raises ValueError for another shape and UserError for a value that
    is NaN or infinite, which call it `name`."""
    values = np.asarray(values)
    if values.shape != (len(prompts),):
        raise ValueError(
            f"{name} has shape {values.shape} but there are {len(prompts)} prompts: give one value per prompt"
        )
    finite = np.isfinite(values)
    if not finite.all():
        raise UserError(
            f"{name} holds {int((~finite).sum())} NaN or infinite values, the first of prompt "
            f"{prompts[int(finite.argmin())]!r}: nothing can be learned from them; fix what computes them"
        )
    return values


def make_trackers(config: ConfigDict) -> dict[str, PerPromptStatTracker | None]:
    """{"reward", "kl"}: the per-prompt statistics of a run, None for those that are not wanted."""
    tracking = config.per_prompt_stat_tracking
    of_kl = config.kl_in_reward and config.kl_per_prompt_stat_tracking
    wanted = {"reward": tracking is not None, "kl": tracking is not None and of_kl}
    return {
        name: PerPromptStatTracker(tracking.buffer_size, tracking.min_count) if want else None
        for name, want in wanted.items()
    }
