"""The pictures of the README: the first 16 validation captions as the clean painters paint them.

python -m tiny.show_painter         # seconds; writes tiny/pictures/painter.png
python -m tiny.show_painter mvdream
"""

import argparse

import torch

from config import tiny
from config.validate import validate
from ddpo.run_log import sample_picture
from ddpo.sampling import VALIDATION, generator
from ddpo.setup import load_painter
from diffusers_patch.rollout import rollout
from prompts.dataset import PromptDataset
from tiny.training import ROOT

COUNT = 16
FILES = {"grid": "painter.png", "mvdream": "mvdream.png"}  # runs of config/tiny.py


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="grid", choices=list(FILES))
    run = parser.parse_args().run
    config = tiny.get_config(run)
    config.pretrained.lora = ""
    validate(config, 1)
    captions = PromptDataset.from_config(config.prompts).val_set[:COUNT]
    noise = [generator(0, VALIDATION, i) for i in range(COUNT)]
    sample = config.sample
    views = rollout(
        load_painter(config, "cpu"), captions, sample.num_steps, sample.guidance_scale, sample.eta, noise
    ).views
    (ROOT / "pictures").mkdir(exist_ok=True)
    sample_picture({"": views}, [""] * COUNT, captions).save(ROOT / "pictures" / FILES[run])


if __name__ == "__main__":
    main()
