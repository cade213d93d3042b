"""Convert a published InstantMesh file, instant_nerf_base.ckpt or instant_nerf_large.ckpt, to a .safetensors file.

    python -m tools.convert_instantmesh SOURCE OUT.safetensors

OUT then goes into config.recon.checkpoint, with config.recon.name = "instantmesh"; so may SOURCE, but it is a pickle,
which other programs may not want to open. No code in it is run. What it holds besides the reconstructor is left out,
and without success OUT is left as it was.
"""

import argparse

from config.cli import one_sentence
from config.validate import check_file
from recon.instantmesh import InstantMesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the published file")
    parser.add_argument("out", help="the file to write")
    args = parser.parse_args()
    with one_sentence("tools.convert_instantmesh"):
        check_file("OUT", args.out, (".safetensors",))
        model = InstantMesh.from_pretrained(args.source)
        model.save_pretrained(args.out)
    print(f"wrote {args.out}: {sum(value.numel() for value in model.parameters()):,} numbers in float32")


if __name__ == "__main__":
    main()
