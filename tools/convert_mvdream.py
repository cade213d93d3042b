"""Convert a public checkpoint of MVDream into a folder that stock diffusers loads.

    python -m tools.convert_mvdream SOURCE OUT [--tokenizer FOLDER] [--revision NAME]

SOURCE is a folder or hub id in the layout of ashawkey/mvdream-sd2.1-diffusers, or the original file
sd-v2.1-base-4view.pt, which has no tokenizer, so that a folder with CLIP's must be given. OUT becomes a folder for
`StableDiffusionPipeline.from_pretrained`; without success nothing is written. The trainer reads SOURCE itself too
(--config.painter.name=mvdream). --configs names a folder with unet.json, vae.json and text_encoder.json, for a .pt
file that is not of the public size.
"""

import argparse
from pathlib import Path

from config.cli import one_sentence
from config.errors import UserError
from diffusers_patch.conversion import check_new, read_configs, save_pipeline
from diffusers_patch.loading import reading
from diffusers_patch.mvdream_checkpoints import load_mvdream_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", help="the folder to write, which must not exist")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--revision", default=None)
    parser.add_argument("--configs", help="folder with the configurations of a .pt file of another size")
    args = parser.parse_args()
    check_new(args.out)  # before minutes of reading
    given = [flag for flag in ("tokenizer", "configs") if getattr(args, flag)]
    if given and not (Path(args.source).is_file() or args.source.endswith(".pt")):
        raise UserError(
            f"--{given[0]} is for a .pt file, and {args.source} is a folder or hub id, which has its own: leave it out"
        )
    configs = read_configs(args.configs, ("unet", "vae", "text_encoder")) if args.configs else {}
    with reading("SOURCE", args.source, "a complete checkpoint of MVDream"):
        pipeline = load_mvdream_pipeline(args.source, args.revision, args.tokenizer, **configs)
    save_pipeline(pipeline, args.out)
    print(f"wrote {args.out}: train it with --config.painter.name=mvdream --config.pretrained.model={args.out}")


if __name__ == "__main__":
    with one_sentence("convert_mvdream"):
        main()
