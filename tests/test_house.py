"""The house: no room imports from a room above it, what should be light is light, and a wheel holds all that runs."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"config", "prompts"},
    {"diffusers_patch", "recon"},
    {"mrc", "ddpo"},
    {"carve3d_train", "tools", "tiny"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(file):
    """The rooms that a Python file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names} & FLOOR.keys()


def called(file):
    """The names of the functions that a Python file calls."""
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return {call.id for call in calls if isinstance(call, ast.Name)}


def room_imports():
    """{room: {imported room: files that do so}}"""
    found = {room: {} for room in FLOOR}
    for room in FLOOR:
        for file in [ROOT / f"{room}.py"] if room == "carve3d_train" else (ROOT / room).rglob("*.py"):
            for other in imported_rooms(file) - {room}:
                found[room].setdefault(other, []).append(file.name)
    return found


def test_no_room_imports_from_a_room_above_it():
    upwards = {
        f"{room} -> {other}": files
        for room, others in room_imports().items()
        for other, files in others.items()
        if FLOOR[other] > FLOOR[room]
    }
    assert not upwards


def test_rooms_do_not_import_in_a_circle():
    order = list(TopologicalSorter(room_imports()).static_order())  # raises CycleError
    assert set(order) == FLOOR.keys()


def test_the_trainer_is_imported_by_nobody():
    assert not [room for room, others in room_imports().items() if "carve3d_train" in others]


def test_every_command_that_judges_a_painter_compares_their_cameras():
    commands = [ROOT / "carve3d_train.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "tiny").glob("*.py")]
    judging = [file for file in commands if {"load_painter", "load_reward"} <= called(file)]
    assert len(judging) >= 4 and all("check_cameras" in called(file) for file in judging)


def test_light_modules_import_no_model_library():
    light = ["recon.cameras", "recon.weights", "recon", "mrc.bounding_box", "config.validate", "tools.check_config"]
    code = f"""
import importlib, sys
for module in {light}:
    importlib.import_module(module)
    for library in {{"transformers", "diffusers", "peft", "accelerate", "skimage"}} & set(sys.modules):
        sys.exit(f"{{module}} imports {{library}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_explains_itself():
    for file in sorted((ROOT / "tools").glob("*.py")):
        documentation = ast.get_docstring(ast.parse(file.read_text()))
        assert documentation and (file.stem == "__init__" or f"python -m tools.{file.stem}" in documentation), file.name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built from a copy so that nothing is left behind in it."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "logs", "wandb", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "copy")]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_a_wheel_holds_weights_and_prompts(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [file for room in FLOOR for file in ROOT.glob(f"{room}/**/*.py")]
    data += [*ROOT.glob("mrc/weights/*"), *ROOT.glob("tiny/weights/**/*"), *ROOT.glob("prompts/*.txt")]
    data += [*ROOT.glob("prompts/tiny/*.txt"), *ROOT.glob("diffusers_patch/instant3d/*.json")]
    data += [*ROOT.glob("ddpo/report/page/*"), *ROOT.glob("ddpo/report/vendor/*")]
    wanted = {str(file.relative_to(ROOT)) for file in data if file.is_file()}
    assert len(wanted) > 30 and not wanted - names
    assert "carve3d_train.py" in names and not any(name.startswith("tests/") for name in names)


def test_an_installed_wheel_runs_from_anywhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import config\n"
        "from config import tiny\n"
        "from config.validate import validate\n"
        "from mrc.rewards import load_mrc\n"
        "load_mrc(validate(tiny.get_config(), 1), 'cpu')\n"
        "print(config.__path__[0])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "site" / "config"), done.stderr
