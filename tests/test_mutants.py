"""The list of mutants is one that can be tried, and trying tells those that are noticed from those that are not."""

import re
import subprocess
import sys

import pytest

from tests.mutant_list import MUTANTS, Mutant
from tests.mutants import ROOT, TABLE, copy_repository, mutated, table, try_mutant


def test_every_edit_applies_once_and_breaks_code_that_still_is_python():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert mutated(text, mutant) != text
        compile(mutated(text, mutant), mutant.file, "exec")


def test_every_test_named_is_there():
    for mutant in MUTANTS:
        assert mutant.tests
        for test in mutant.tests:
            file, function = test.split("::")
            assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), test


def test_the_table_is_that_of_the_list():
    assert TABLE.read_text() == table(), "run python -m tests.mutants --table"


@pytest.mark.slow
def test_a_mutant_is_caught_and_a_harmless_edit_is_not(tmp_path):
    folder = copy_repository(tmp_path)
    name, tests = "steps", ["test_steps.py"]
    before = (folder / "ddpo/steps.py").read_text()
    for old, new, caught, words in (
        ("drawn / trainable", "drawn", True, "test_steps.py::test_steps_of_a_run"),
        ("drawn / trainable", "drawn * (1 / trainable)", False, "SURVIVED"),
        ("drawn / nothing", "", False, "no longer applies"),
    ):
        found, said = try_mutant(folder, Mutant(name, "ddpo/steps.py", old, new, tests))
        assert found == caught and words in said
        assert (folder / "ddpo/steps.py").read_text() == before


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "tests.mutants", "--only", "log_kl ignored"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 mutants were caught" in done.stdout, done.stderr
