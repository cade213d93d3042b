"""`pip install .`, or `-e .` to edit: the rooms importable from anywhere. carve3d_train.sh does not need it.

Extras: `.[gpu]` what NVIDIA GPUs can use besides, `.[background]` for config.recon.remove_background, `.[tests]`.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("config", "prompts", "diffusers_patch", "recon", "mrc", "ddpo", "tools", "tiny")
# requirements.txt has blocks: what we import, what the tests need, what those import
DIRECT, TESTS, _ = (Path(__file__).parent / "requirements.txt").read_text().split("\n\n")


def requirements(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


setup(
    name="carve3d-open",
    version="0.1.0",
    description="RL finetuning of multi-view diffusion models with a multi-view reconstruction consistency reward",
    license="MIT",
    python_requires=">=3.11",
    py_modules=["carve3d_train"],
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={
        "prompts": ["*.txt", "tiny/*.txt"],
        "diffusers_patch": ["instant3d/*.json"],
        "mrc": ["weights/*"],
        "ddpo.report": ["page/*", "vendor/*"],
        "tiny": ["weights/**"],
        "tools.pretend_gpu": ["shim.cpp"],
    },
    install_requires=requirements(DIRECT),
    extras_require={
        "gpu": ["bitsandbytes", "gsplat==1.5.3"],
        "background": ["rembg"],
        "tests": requirements(TESTS),
    },
)
