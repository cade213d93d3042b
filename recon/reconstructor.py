"""The protocol of sparse-view reconstructors: posed views in, a 3D scene out, images of it from any camera."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from recon.cameras import Cameras


class Reconstructor(nn.Module, ABC):
    """A frozen feed-forward model that turns a few views of an object into a 3D scene.

    Images are RGB in [0, 1] on white. All cameras that are given or returned are in one common world, whose box
    [-1, 1]^3 holds the object. A scene is a batch of B objects; its type depends on the model. Reconstructors of
    radiance fields also have `radiance_field(scene)`, for a batch of one: what `recon.mesh.extract_mesh` takes.

    num_views: V, the number of input views. input_size: their side in pixels. chunk_size: rays rendered at a time,
    which bounds the memory and changes no result; splatting has no rays and ignores it. takes_fewer_views: whether
    `reconstruct` makes sense of V - 1 views too, so that one can be held out.
    """

    num_views: int
    input_size: int
    chunk_size: int = 65536
    takes_fewer_views = False

    @classmethod
    @abstractmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """The model with the weights of `checkpoint`, in float32 on the CPU.

        Raises FileNotFoundError or ValueError with one sentence that says what to give instead."""

    @classmethod
    def from_config(cls, config) -> Self:
        """The model that `config` (config.recon) describes. Raises what `from_pretrained` raises."""
        model = cls.from_pretrained(config.checkpoint)
        model.chunk_size = config.chunk_size
        return model

    @staticmethod
    @abstractmethod
    def input_cameras() -> Cameras:
        """The V cameras that the input views must be taken from; known before any weights are loaded."""

    @classmethod
    def cameras_of_config(cls, config) -> Cameras:
        """The `cameras` of the model that `config` (config.recon) describes; known before any weights are loaded."""
        return cls.input_cameras()

    @property
    def cameras(self) -> Cameras:
        """The cameras that the input views are taken for, on the model's device."""
        return self.input_cameras().to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_dtype(self, dtype: torch.dtype) -> Self:
        """Set the precision of the networks. Geometry and rendering stay in float32."""
        return self.to(dtype)

    @abstractmethod
    def reconstruct(self, views: torch.Tensor, cameras: Cameras) -> Any:
        """A scene of B objects.

        views: (B, V, 3, input_size, input_size); cameras: V common to all objects, or (B, V)."""

    @abstractmethod
    def render(self, scene: Any, cameras: Cameras, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, M, 3, size, size) and alpha (B, M, 1, size, size) of B objects, deterministic, both in [0, 1].

        cameras: M common to all objects, or (B, M); size: pixels per side."""

    def compare(
        self, scene: Any, cameras: Cameras, size: int, distance: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the scene is from the views that it was reconstructed from.

        cameras: those of the views, in their order; size: pixels per side of the renders; distance: renders (B, V, 3,
        size, size) -> distances (B, V) from the views.
        Returns distances (B, V), NaN for a view that was compared with nothing, and the renders (B, V, 3, size, size).
        """
        renders, _ = self.render(scene, cameras, size)
        return distance(renders), renders
