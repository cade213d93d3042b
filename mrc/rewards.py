"""From a configuration to a reward: a function (views (B, V, 3, S, S) in [0, 1], prompts) -> result.

A result has `reward` (B,), `foreground` (B, V), `empty` (B, V) bool, and `renders` (B, V, 3, S, S) and `lpips`
(B, V) or None, and `judges`, {name: (B,)}. A new reward is one entry in `REWARDS` (and its name in config/validate.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from ml_collections import ConfigDict

from mrc.bounding_box import foreground_mask, is_empty
from mrc.judges import judge_views
from mrc.lpips import LPIPS
from mrc.mrc import MRC, MRCResult
from mrc.sanity_rewards import jpeg_compressibility, jpeg_incompressibility
from recon import background_remover, load_reconstructor


@dataclass
class ImageResult:
    """The scores of a reward that looks at the views alone; fields as in `mrc.MRCResult`."""

    reward: torch.Tensor
    foreground: torch.Tensor
    empty: torch.Tensor
    renders: None = None
    lpips: None = None
    judges: dict[str, torch.Tensor] = field(default_factory=dict)


def load_mrc(config: ConfigDict, device: torch.device | str) -> MRC:
    """The judge that config.recon and config.mrc describe, on config.recon.device or else on `device`."""
    device = config.recon.device or device
    return MRC(
        load_reconstructor(config.recon, device),
        LPIPS(config.mrc.lpips_checkpoint).to(device),
        bbox_lpips=config.mrc.bbox_lpips,
        min_foreground=config.mrc.min_foreground,
        empty_view_reward=config.mrc.empty_view_reward,
        render_size=config.recon.render_size,
    )


class MRCReward:
    """MRC of what a painter paints: views (B, V, 3, S, S), on whatever background config.recon says."""

    def __init__(self, config: ConfigDict, device: torch.device | str):
        # first, because a missing rembg should be noticed before weights are read
        self._on_white = background_remover() if config.recon.remove_background else lambda views: views
        self.judge = load_mrc(config, device)

    def __call__(self, views: torch.Tensor, prompts: Sequence[str]) -> MRCResult:
        return self.judge(self.prepared(views))

    def judged(self, views: torch.Tensor, prompts: Sequence[str]) -> MRCResult:
        """The same, with the judges beside it, which cost more than the reward."""
        views = self.prepared(views)
        return replace(self.judge(views), judges=judge_views(self.judge, views))

    def prepared(self, views: torch.Tensor) -> torch.Tensor:
        """The views (B, V, 3, S, S) as they are judged: on white, where the judge is."""
        return self._on_white(views).to(self.judge.reconstructor.device)


def _image_reward(score):
    """A reward from `score`, a function views (B, V, 3, S, S) -> (B,)."""

    def load(config, device):
        def reward(views, prompts):
            foreground = foreground_mask(views).float().mean((-1, -2))
            return ImageResult(score(views), foreground, is_empty(foreground, config.mrc.min_foreground))

        return reward

    return load


REWARDS = {
    "mrc": MRCReward,
    "jpeg_compressibility": _image_reward(jpeg_compressibility),
    "jpeg_incompressibility": _image_reward(jpeg_incompressibility),
}


def load_reward(config: ConfigDict, device: torch.device | str) -> Callable:
    """The reward named by config.reward_fn, its models on `device`."""
    return REWARDS[config.reward_fn](config, device)
