"""Sparse-view reconstruction: posed views in, a 3D scene out, images of it from any camera. See README.md."""

from importlib import import_module

import torch

from config.errors import UserError
from recon.background import background_remover
from recon.cameras import Cameras
from recon.reconstructor import Reconstructor

__all__ = ["RECONSTRUCTORS", "Reconstructor", "background_remover", "load_reconstructor", "reconstructor_cameras"]

# Imported when asked for: some need libraries that take seconds to import.
RECONSTRUCTORS = {
    "tiny_lrm": "recon.tiny_lrm:TinyLRM",
    "lgm": "recon.lgm:LGM",
    "grm": "recon.grm:GRM",
    "openlrm": "recon.openlrm:OpenLRM",
    "instantmesh": "recon.instantmesh:InstantMesh",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reconstructor_cameras(config) -> Cameras:
    """The cameras that the reconstructor of `config` (config.recon) wants its views from, without loading its weights.

    Raises UserError for an unknown config.recon.name."""
    return _reconstructor_class(config.name).cameras_of_config(config)


def load_reconstructor(config, device: str | torch.device = "cpu") -> Reconstructor:
    """The reconstructor config.recon.name with the weights of config.recon.checkpoint, frozen, in eval mode.

    config: config.recon. Raises MissingFileError or UserError with one sentence if the name is unknown or the
    checkpoint cannot be used."""
    model = _reconstructor_class(config.name).from_config(config)
    return model.requires_grad_(False).eval().to(device).set_dtype(DTYPES[config.dtype])


def _reconstructor_class(name: str) -> type[Reconstructor]:
    if name not in RECONSTRUCTORS:
        raise UserError(f"config.recon.name is {name!r}: choose one of {', '.join(RECONSTRUCTORS)}.")
    module, _, attribute = RECONSTRUCTORS[name].partition(":")
    return getattr(import_module(module), attribute)
