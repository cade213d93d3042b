"""Convert a public checkpoint of MVDream into a folder that stock diffusers loads.

    python -m tools.convert_mvdream SOURCE OUT [--tokenizer FOLDER] [--revision NAME]

SOURCE is a folder or hub id in the layout of ashawkey/mvdream-sd2.1-diffusers, or the original file
sd-v2.1-base-4view.pt, which has no tokenizer, so that a folder with CLIP's must be given. OUT becomes a folder for
`StableDiffusionPipeline.from_pretrained`. The trainer reads SOURCE itself too (--config.painter.name=mvdream).
"""

import argparse

from config.cli import one_sentence
from config.validate import check_folder
from diffusers_patch.loading import reading
from diffusers_patch.mvdream_checkpoints import load_mvdream_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--revision", default=None)
    args = parser.parse_args()
    check_folder("OUT", args.out)
    with reading("SOURCE", args.source, "a complete checkpoint of MVDream"):
        pipeline = load_mvdream_pipeline(args.source, args.revision, args.tokenizer)
    pipeline.save_pretrained(args.out)
    print(f"wrote {args.out}: train it with --config.painter.name=mvdream --config.pretrained.model={args.out}")


if __name__ == "__main__":
    with one_sentence("convert_mvdream"):
        main()
