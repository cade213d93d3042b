"""The sculptor: posed views in, a 3D scene out, and pictures of it from any camera."""

from typing import Protocol

import torch

from recon.background import background_remover
from recon.cameras import Cameras
from recon.grm import GRM
from recon.lgm import LGM
from recon.openlrm import OpenLRM
from recon.tiny_lrm import TinyLRM

__all__ = ["Reconstructor", "background_remover", "load_reconstructor", "reconstructor_cameras"]


class Reconstructor(Protocol):
    """What `mrc` needs of a sculptor."""

    num_views: int
    input_size: int
    cameras: Cameras  # where its input views must stand

    def reconstruct(self, views, cameras):
        """views (B, V, 3, S, S) in [0, 1] on white -> a scene (batch of B)."""

    def render(self, scene, cameras, size):
        """images (B, M, 3, size, size) in [0, 1] on white, alpha (B, M, 1, size, size); with an axis K behind B for K
        scenes of single views."""


RECONSTRUCTORS = {"tiny_lrm": TinyLRM, "lgm": LGM, "grm": GRM, "openlrm": OpenLRM}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reconstructor_cameras(config):
    """The cameras that `config` (config.recon) wants its views from, known before any weights are loaded."""
    return RECONSTRUCTORS[config.name].input_cameras()


def load_reconstructor(config, device="cpu") -> Reconstructor:
    """The reconstructor named by config.recon.name, with the weights of config.recon.checkpoint, frozen."""
    model = RECONSTRUCTORS[config.name].from_pretrained(config.checkpoint)
    model.chunk_size, model.input_views = config.chunk_size, config.input_views
    return model.requires_grad_(False).eval().to(device).set_dtype(DTYPES[config.dtype])
