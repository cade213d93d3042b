"""Write what runs did as one page that opens in any browser, without a network.

    python -m tools.report logs/RUN [logs/OTHER ...] [--out FILE] [--no-objects]

--out          the page (report.html in the first folder)
--no-objects   leave out the objects, which the run's reconstructor makes of the views of its validations

The page has the first run's pictures, captions and objects, and the curves, numbers and configurations of all. A run
writes its own at its end with config.report = True.
"""

import argparse
from pathlib import Path

import torch

from config.cli import one_sentence
from config.validate import check_file
from ddpo.report import write_report


def main(arguments: list[str] | None = None) -> None:
    """The command; arguments: None for those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, logs/RUN")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--no-objects", action="store_true", help="leave out the objects")
    args = parser.parse_args(arguments)
    if args.out:
        check_file("--out", args.out, (".html",))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = write_report(args.runs, args.out, None if args.no_objects else device)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    with one_sentence("report"):
        main()
