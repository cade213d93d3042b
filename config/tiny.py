"""The embedded default: the small world of tiny/, on this machine's CPU or GPUs, in minutes.

    --config config/tiny.py              the painter of 2x2 grids
    --config config/tiny.py:mvdream      the small MVDream, which paints separate views
    --config config/tiny.py:clean        the same without a planted defect, for tiny/critic.py
    --config config/tiny.py:exact        and for tiny/exact_gradient.py
    --config config/tiny.py:best         and for tiny/best_of_n.py
    --config config/tiny.py:pairs        for carve3d_train.py again, and hours: as many samples as the paper's run

Only what differs from the paper's run (config/base.py) is written here. What the small world needs beyond the paper are
keys that also work at scale: weights by noise level, skipped last step, a step size calibrated in KL, LoRA on
convolutions.
"""

from ml_collections import ConfigDict

from config import base
from config.errors import UserError


def grid() -> ConfigDict:
    """64 samples per epoch of 8 steps, whatever the number of processes."""
    config = base.get_config()

    config.num_epochs = 28
    config.save_freq = 14
    config.val_freq = 14
    config.mixed_precision = "bf16"
    config.tracker = "none"
    config.report = True

    # the clean painter, and the LoRA that spoils about half of its grids: what the run has to unlearn
    config.pretrained.model = "tiny/weights/painter"
    config.pretrained.lora = "tiny/weights/painter_defect"
    config.lora.targets = "attention+conv"

    config.prompts.train_file = "prompts/tiny/train.txt"
    config.prompts.val_file = "prompts/tiny/validation.txt"
    config.prompts.test_file = "prompts/tiny/test.txt"
    config.prompts.num_train = 16

    config.sample.num_steps = 8
    config.sample.guidance_scale = 2.5
    config.sample.total_batch_size = 64
    config.sample.batch_size = 32

    config.train.total_batch_size = 64
    config.train.batch_size = 16
    config.train.learning_rate = 2e-4  # where the calibration starts
    config.train.adam_beta1 = 0.7  # a short memory, for few updates
    config.train.adam_beta2 = 0.99
    config.train.adam_weight_decay = 0.0
    config.train.adv_clip_max = 3.0
    config.train.clip_range = 1e-2  # bf16 rounds ratios by 1e-3: the published 1e-4 would clip that
    config.train.timestep_weighting = "noise"
    config.train.skip_last_steps = 4  # what the views show of each other is decided in the first half of the chain
    config.train.timesteps_per_forward = 4
    config.train.kl_per_update = 0.04
    config.train.beyond_chance = True
    config.train.hold_foreground = True

    config.recon.checkpoint = "tiny/weights/lrm"
    config.recon.render_size = 64
    config.recon.dtype = "bf16"

    # with half-precision networks the log-ratio estimate of so small a KL is mostly rounding
    config.kl_estimator = "analytic"

    # 16 prompts x 4 fill one epoch of 64
    config.per_prompt_stat_tracking.min_count = 4
    config.per_prompt_stat_tracking.buffer_size = 16

    return config


def mvdream() -> ConfigDict:
    """The same run with the small MVDream, conditioned on the reconstructor's cameras."""
    config = grid()
    config.painter.name = "mvdream"
    config.painter.elevation = 20.0
    config.painter.azimuth_start = 315.0  # 225 degrees as the reconstructor counts
    config.pretrained.model = "tiny/weights/mvdream"
    config.pretrained.lora = "tiny/weights/mvdream_defect"
    # 64 samples of it say too little for steps beyond chance; momentum would come too late for so few of one length
    config.num_epochs, config.save_freq, config.val_freq = 16, 8, 8
    config.train.adam_beta1 = 0.0
    config.train.kl_per_update = 0.02
    config.train.beyond_chance = False
    return config


def clean() -> ConfigDict:
    """What the small MVDream does wrong by itself: two objects side by side change sides from view to view.

    For tiny/critic.py, whose directions are not mostly noise: all training captions, so that what is painted well stays
    so, and a step size that falls to nothing."""
    config = mvdream()
    config.pretrained.lora = ""
    config.prompts.num_train = 0
    config.num_epochs = 12
    config.val_freq = 4
    config.train.learning_rate = 2e-3
    config.train.adam_beta1 = 0.9
    config.train.kl_per_update = 0.0
    config.per_prompt_stat_tracking.min_count = 8
    return config


def exact() -> ConfigDict:
    """The same for tiny/exact_gradient.py."""
    config = clean()
    config.num_epochs = 17
    config.val_freq = 8
    config.sample.total_batch_size = 32
    config.train.total_batch_size = 32
    config.train.learning_rate = 2e-5
    config.train.adam_beta1 = 0.0  # the study has its own momentum
    config.train.kl_per_update = 0.1
    return config


def best() -> ConfigDict:
    """The same for tiny/best_of_n.py: each epoch has all prompts eight times, and learns from the best of eight."""
    config = clean()
    config.num_epochs = 3
    config.val_freq = 1
    config.sample.total_batch_size = 1024
    config.train.total_batch_size = 16
    config.train.num_inner_epochs = 12
    config.train.timestep_fraction = 0.5
    config.train.timesteps_per_forward = 2
    config.train.objective = "awm"
    config.train.learning_rate = 5e-4
    return config


def pairs() -> ConfigDict:
    """Policy gradients for what the small MVDream does wrong by itself, on the captions that it paints wrongly.

    A sample says little of that, so an update has 456 and the run 42,000, as the paper's. No update alone is beyond
    chance: each has the same short length, and they add up."""
    config = clean()
    config.num_epochs = 93
    config.val_freq = config.save_freq = 10
    config.prompts.train_file = "prompts/tiny/pairs.txt"
    config.sample.total_batch_size = 456  # eight of each caption; up to eight processes share them evenly
    config.sample.batch_size = 19
    config.train.total_batch_size = 456
    config.train.batch_size = 19
    config.train.learning_rate = 2e-4  # where the calibration starts
    config.train.adam_beta1 = 0.0
    config.train.kl_per_update = 0.2
    config.kl_timestep_fraction = 0.25
    config.per_prompt_stat_tracking.buffer_size = 24
    return config


def get_config(name: str = "grid") -> ConfigDict:
    """The run called `name`. Raises UserError when there is no such run."""
    runs = {run.__name__: run for run in (grid, mvdream, clean, exact, best, pairs)}
    if name not in runs:
        raise UserError(f"config/tiny.py has no run {name!r}: write one of {', '.join(runs)}")
    return runs[name]()
