"""`pip install -e .` for those who want the rooms importable from anywhere; carve3d_train.sh does not need it."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ROOMS = ("config", "prompts", "diffusers_patch", "recon", "mrc", "ddpo", "tiny")
DIRECT = (HERE / "requirements.txt").read_text().split("\n\n")[0].splitlines()  # the first block: what we import

setup(
    name="carve3d-open",
    version="0.1.0",
    description="RL finetuning of multi-view diffusion models with a multi-view reconstruction consistency reward",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    install_requires=[line for line in DIRECT if line and not line.startswith("#")],
    extras_require={"gpu": ["bitsandbytes", "gsplat==1.5.3"]},
)
