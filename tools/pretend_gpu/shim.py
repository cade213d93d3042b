"""Builds shim.cpp once for every version of torch and loads it, so that tensors can claim to be on cuda:0."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from config.errors import MissingFileError, UnwritableError

SOURCE = Path(__file__).with_name("shim.cpp")


def load() -> None:
    """Load the shim into this process. It must come before torch, which looks for devices only once.

    Raises OSError with one sentence if it cannot be built, RuntimeError if it comes too late or torch has GPUs of its
    own.
    """
    libraries = _torch_folder() / "lib"
    if (libraries / "libtorch_cuda.so").exists():
        raise RuntimeError("the pretend GPU needs a CPU build of torch, and the one that is installed is for real GPUs")
    if "torch" in sys.modules:
        raise RuntimeError("the pretend GPU must be loaded before torch: import tools.pretend_gpu first")
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        if (libraries / name).exists():
            ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)


def build() -> Path:
    """The shared library: compiled in two seconds, or found in the user's cache.

    Raises OSError with one sentence if there is no compiler, or if it fails."""
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = _cache_folder() / f"pretend-gpu-torch-{version}-{digest}.so"
    if library.exists():
        return library
    if shutil.which("g++") is None:
        raise MissingFileError("the pretend GPU is compiled once by g++, which is not installed: install it")
    torch_folder = _torch_folder()
    # renamed when complete: a compilation that is killed, or another at the same time, must not leave half a file
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(SOURCE)]
        command += ["-o", str(partial), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise OSError(f"g++ could not compile {SOURCE.name} for torch {version}: {reason}")
        os.replace(partial, library)
    return library


def _torch_folder():
    """Where torch is installed, found without importing it."""
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def _cache_folder():
    """A folder that can be written to, outside the repository, which may be read-only."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carve3d"
    for folder in (wanted, Path(tempfile.gettempdir()) / f"carve3d-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UnwritableError(f"the pretend GPU needs a folder for what it compiles, and {wanted} cannot be written to")
