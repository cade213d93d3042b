"""Does the suite notice when the code is wrong? One line is broken at a time, and the tests named beside it must fail.

    python -m tests.mutants                          # every mutant, in a copy of the repository: a line each, exit 1 if
                                                     # one survived or its edit no longer applies
    python -m tests.mutants --only "eta" "no fusion" # those whose names contain one of these words
    python -m tests.mutants --table                  # write tests/MUTANTS.md, the list for people

The first run of the named tests, on the code as it is, must pass. Libraries are imported once; every mutant is tried in
a fork that forgets the repository's own modules, which makes it a matter of seconds.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "MUTANTS.md"
LEFT_OUT = shutil.ignore_patterns(".*", "logs", "wandb", "checkpoints", "build", "*.egg-info", "__pycache__")
DEADLINE = 600  # seconds for the tests of a mutant
FORK = multiprocessing.get_context("fork")


class Outcome(NamedTuple):
    """What pytest said: its exit status (None = it did not end in time) and the tests that failed."""

    status: int | None
    failed: list[str]


def mutated(text: str, mutant: Mutant) -> str:
    """`text`, of mutant.file, with the edit. Raises ValueError unless it applies exactly once."""
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.old!r} is {count} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def copy_repository(folder: Path) -> Path:
    """The repository's files without what runs and environments left there, in `folder`/copy."""
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT))


def run_tests(folder: Path, tests: list[str]) -> Outcome:
    """Run tests of the copy of the repository in `folder`, until the first one fails."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_pytest, args=(folder, tests, sender))
    process.start()
    sender.close()
    outcome = Outcome(None, [])
    try:
        if receiver.poll(DEADLINE):
            outcome = Outcome(*receiver.recv())
    except EOFError:  # it died
        pass
    process.kill()
    process.join()
    return outcome


class _Failures:
    """A plugin of pytest that notes which tests failed."""

    def __init__(self):
        self.tests = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.tests.append(report.nodeid)


def _pytest(folder, tests, sender):
    """In a process of its own: nothing of this checkout may be imported by what is tested."""
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    os.chdir(folder)
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    sys.dont_write_bytecode = True
    own = {path.stem for path in folder.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.path[:] = [str(folder)] + [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    failures = _Failures()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={folder}"]
    status = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[failures])
    sender.send((int(status), failures.tests))  # plain values: this module is forgotten here, and with it its classes


def try_mutant(folder: Path, mutant: Mutant) -> tuple[bool, str]:
    """(whether its tests caught it, in words what happened); the copy in `folder` is left as it was."""
    file = folder / mutant.file
    original = file.read_text()
    try:
        file.write_text(mutated(original, mutant))
        outcome = run_tests(folder, mutant.tests)
    except ValueError as error:
        return False, f"ERROR     the edit no longer applies: {error}"
    finally:
        file.write_text(original)
    if outcome.status == pytest.ExitCode.TESTS_FAILED:
        return True, f"caught    by {', '.join(outcome.failed).replace('tests/', '')}"
    if outcome.status == pytest.ExitCode.OK:
        return False, "SURVIVED"
    return False, f"ERROR     its tests could not be run (pytest gives {outcome.status})"


def table() -> str:
    """All mutants, as a table for people."""

    def cell(text):
        return f"`{' '.join(text.split())}`".replace("|", "\\|")

    rows = []
    for m in MUTANTS:
        tests = ", ".join(test.partition("::")[2] for test in m.tests)
        rows.append(f"| {m.name} | {m.file} | {cell(m.old)} | {cell(m.new)} | {tests} |")
    head = [
        "# Mutants",
        "",
        f"{len(MUTANTS)} ways to break the code, and the tests that notice. `python -m tests.mutants` tries them;",
        "`python -m tests.mutants --table` writes this table.",
        "",
        "| mutant | file | instead of | stands | noticed by |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join(head + rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants whose names contain one of these words")
    parser.add_argument("--table", action="store_true", help="write tests/MUTANTS.md and try nothing")
    args = parser.parse_args()
    if args.table:
        TABLE.write_text(table())
        return 0
    chosen = [m for m in MUTANTS if args.only is None or any(word in m.name for word in args.only)]
    if not chosen:
        parser.error(f"no mutant has one of {args.only} in its name; they are listed in tests/MUTANTS.md")

    os.environ["HF_HUB_OFFLINE"] = "1"
    import carve3d_train  # noqa: F401 for the libraries that it imports, once for all forks
    import tests.tiny_models  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_repository(Path(temporary).resolve())
        unbroken = run_tests(folder, sorted({test for mutant in chosen for test in mutant.tests}))
        if unbroken.status != pytest.ExitCode.OK:
            print(f"the tests do not pass on the code as it is ({unbroken}): nothing can be said of mutants")
            return 1
        not_caught = 0
        for mutant in chosen:
            start = time.perf_counter()
            caught, words = try_mutant(folder, mutant)
            not_caught += not caught
            print(f"{time.perf_counter() - start:5.1f} s  {mutant.name}: {words}", flush=True)
    print(f"{len(chosen) - not_caught} of {len(chosen)} mutants were caught")
    return int(not_caught > 0)


if __name__ == "__main__":
    sys.exit(main())
