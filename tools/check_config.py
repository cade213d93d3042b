"""Check whether a run could start: prints its batches, or one sentence that says what to change (exit status 1).

    python -m tools.check_config --processes 8 --config config/dgx.py:carve3d_train [--config.KEY=VALUE ...]

--processes   how many processes the run would have (1)
No model is loaded, so this takes two seconds; what only the weights can tell is found when a run starts.
"""

from absl import flags

from config import cli
from config.batches import batch_table
from config.validate import validate
from prompts.dataset import PromptDataset


def define_flags() -> None:
    flags.DEFINE_integer("processes", 1, "Processes of the run.", lower_bound=1)


def main(args) -> None:
    """args: the parsed flags."""
    config = validate(args.config, args.processes)
    PromptDataset.from_config(config.prompts)
    print(batch_table(config, args.processes))


if __name__ == "__main__":
    cli.run("carve3d_train", main, "config/base.py", define_flags)
