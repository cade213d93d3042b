"""Convert a published GRM file (grm_u.pth, grm_r.pth or grm_zero123plus.pth) to a folder that this project loads.

    python -m tools.convert_grm SOURCE OUT

Writes config.json and model.safetensors into the folder OUT, which then goes into config.recon.checkpoint, with
config.recon.name = "grm". No code in SOURCE, which is a pickle, is run. Without success OUT is left as it was.
"""

import argparse

from config.cli import one_sentence
from config.validate import check_folder
from recon.grm_checkpoint import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the published file")
    parser.add_argument("out", help="the folder to write")
    args = parser.parse_args()
    with one_sentence("tools.convert_grm"):
        check_folder("OUT", args.out)
        unused = convert(args.source, args.out)
    print(f"Wrote {args.out}. Parameters of its configuration that are not needed: {', '.join(unused) or 'none'}.")


if __name__ == "__main__":
    main()
