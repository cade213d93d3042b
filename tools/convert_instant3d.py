"""Convert Instant3D's public file, instant3d.pth of justimyhxu/GRM, into a folder that stock diffusers loads.

    python -m tools.convert_instant3d SOURCE OUT [--tokenizer FOLDER] [--tokenizer_2 FOLDER] [--dtype fp16]

SOURCE is the file; no code in it, which is a pickle, is run. OUT becomes a folder for
`StableDiffusionXLPipeline.from_pretrained` and for config.pretrained.model; without success nothing is written.
The file has no tokenizers. They are those of any SDXL: by default they come from the hub, otherwise --tokenizer names a
folder that has them in `tokenizer` and `tokenizer_2`, or --tokenizer and --tokenizer_2 name the folder of each.
--configs names a folder with unet.json, vae.json, text_encoder.json and text_encoder_2.json, for a file that is not of
the public size.
"""

import argparse

import torch

from config.cli import one_sentence
from diffusers_patch.conversion import check_new, read_configs, save_pipeline
from diffusers_patch.instant3d_checkpoint import CONFIGS, PARTS, TOKENIZERS, load_instant3d_pipeline

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the published file")
    parser.add_argument("out", help="the folder to write, which must not exist")
    parser.add_argument("--tokenizer", default=TOKENIZERS, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--tokenizer_2", default="", help="folder of the second one, if it is elsewhere")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the written weights (default: as in the file)")
    parser.add_argument("--configs", help="folder with the configurations of a file of another size")
    args = parser.parse_args()
    check_new(args.out)  # before minutes of reading
    configs = read_configs(args.configs, PARTS) if args.configs else CONFIGS
    pipeline = load_instant3d_pipeline(args.source, args.tokenizer, args.tokenizer_2, DTYPES.get(args.dtype), configs)
    save_pipeline(pipeline, args.out)
    print(
        f"wrote {args.out}: train it with --config config/dgx.py:instant3d_grm --config.pretrained.model={args.out} "
        f"--config.recon.checkpoint=GRM"
    )


if __name__ == "__main__":
    with one_sentence("convert_instant3d"):
        main()
