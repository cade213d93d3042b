"""Paint captions and look at them: rows of views in one picture.

    python -m tools.show_painter --config config/tiny.py [--config.KEY=VALUE ...]

--count   how many of the validation captions (16)
--out     picture to write (logs/painter.png)

The painter is that of the configuration, with its LoRA (--config.pretrained.lora=logs/RUN/final shows what a run
learned, --config.pretrained.lora= the painter without any); the noise is that of a run's validations.
"""

from pathlib import Path

import torch
from absl import flags

from config import cli
from config.validate import check_file, validate
from ddpo.pictures import sample_picture
from ddpo.sampling import VALIDATION, make_generator
from diffusers_patch.loading import load_painter
from diffusers_patch.rollout import rollout
from prompts.dataset import PromptDataset


def define_flags() -> None:
    flags.DEFINE_integer("count", 16, "How many captions are painted.", lower_bound=1)
    flags.DEFINE_string("out", "logs/painter.png", "Picture to write.")


@torch.no_grad()
def main(args) -> None:
    """args: the parsed flags."""
    check_file("--out", args.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, sample = args.config, args.config.sample
    config.reward_fn = "jpeg_compressibility"  # any that needs no reconstructor: nothing is judged
    validate(config, 1, device)
    captions = PromptDataset.from_config(config.prompts).val_set[: args.count]
    generators = [make_generator(0, VALIDATION, i) for i in range(len(captions))]
    painted = [caption + sample.prompt_suffix for caption in captions]
    policy = load_painter(config, device)
    steps, views = (sample.num_steps, sample.guidance_scale, sample.eta), []
    for first in range(0, len(captions), sample.batch_size):
        some = slice(first, first + sample.batch_size)
        views.append(rollout(policy, painted[some], *steps, generators[some]).views)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sample_picture({"": torch.cat(views)}, [""] * len(captions), captions).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run("show_painter", main, "config/tiny.py", define_flags)
