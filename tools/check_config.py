"""Check whether a run could start: prints its batches, or one sentence that says what to change (exit status 2).

    python -m tools.check_config --processes 8 --config config/dgx.py:carve3d_train [--config.KEY=VALUE ...]

--processes   how many processes the run would have (1)
--device      cpu or cuda, where it would run; what depends on that is not checked without the flag
No weights are loaded, so this takes two seconds; what only they can tell is found when a run starts.
"""

from absl import flags

from config import cli
from config.batches import batch_table
from config.validate import check_run_places, validate
from diffusers_patch.checks import check_cameras, check_painter_files
from prompts.dataset import PromptDataset
from recon.weights import check_checkpoint


def define_flags() -> None:
    flags.DEFINE_integer("processes", 1, "Processes of the run.", lower_bound=1)
    flags.DEFINE_enum("device", None, ("cpu", "cuda"), "Where the run would be.")


def main(args) -> None:
    """args: the parsed flags."""
    config = validate(args.config, args.processes, args.device)
    check_run_places(config)
    PromptDataset.from_config(config.prompts)
    check_cameras(config)
    check_painter_files(config)
    if config.reward_fn == "mrc":
        check_checkpoint("config.recon.checkpoint", config.recon.checkpoint)
        if config.mrc.lpips_checkpoint:
            check_checkpoint("config.mrc.lpips_checkpoint", config.mrc.lpips_checkpoint)
    print(batch_table(config, args.processes))


if __name__ == "__main__":
    cli.run("carve3d_train", main, "config/base.py", define_flags)
