"""What test_gpu.py measures in a process of its own: `python -m tests.measure_cases real|pretend WORLD`.

The same stages of a small world, on this machine's CPU or on the pretend GPU. The last line printed is JSON.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

if sys.argv[1:2] == ["pretend"]:
    import tools.pretend_gpu  # noqa: F401, must come before torch

# isort: split
import torch

from config import base
from config.validate import validate
from tests.tiny_models import settings
from tools.full_size import models
from tools.full_size.device import RealGPU
from tools.full_size.stages import measure_reward, measure_run


def small_config(world):
    config = base.get_config()
    with config.unlocked():
        changes = dict(recon__name="tiny_lrm", train__kl_per_update=0.05, train__kl_calibration_updates=1)
        config.update_from_flattened_dict(settings(world, world, **changes))
    return validate(config, 1, check_files=False)


def measure(gpu, config):
    print(json.dumps([asdict(measure_run(gpu, config)), asdict(measure_reward(gpu, config))]))


def main(where, world):
    if where == "pretend":
        from tools.pretend_gpu.gpu import pretend_gpu

        with pretend_gpu() as gpu:
            measure(gpu, small_config(Path(world)))
    else:
        torch.set_num_threads(1)
        device = torch.device("cpu")
        models.install(device)
        measure(RealGPU(device), small_config(Path(world)))


if __name__ == "__main__":
    main(*sys.argv[1:])
