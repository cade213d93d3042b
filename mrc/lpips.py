"""LPIPS, the learned perceptual distance between two images (Zhang et al. 2018): AlexNet features, heads v0.1."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from config.errors import MissingFileError, about
from recon.weights import check_weights, weight_shapes

WEIGHTS = Path(__file__).parent / "weights" / "lpips_alex_v0.1.safetensors"
RELUS = (1, 4, 7, 9, 11)  # the layers of AlexNet whose outputs are compared
CHANNELS = (64, 192, 384, 256, 256)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
MIN_SIZE = 31  # below it, AlexNet's second pooling has nothing left to pool
NORM_EPSILON = 1e-10


class LPIPS(nn.Module):
    """`LPIPS()(a, b) -> (N,)`: 0 for equal images, rarely above 1.

    checkpoint: a safetensors file with torchvision's names for AlexNet's convolutions (`features.0.weight`, ...) and
        `lin0.weight` ... `lin4.weight` (1, C, 1, 1); None or "" takes the weights that ship with the project.
    chunk_size: how many pairs of images go through AlexNet at once; bounds memory, does not change the result.

    The parameters are frozen; gradients with respect to the images flow. Raises MissingFileError without the file, and
    UserError if it holds something else.
    """

    def __init__(self, checkpoint: str | Path | None = None, chunk_size: int = 64):
        super().__init__()
        self.chunk_size = chunk_size
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        for i, channels in enumerate(CHANNELS):
            self.add_module(f"lin{i}", nn.Conv2d(channels, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

        checkpoint = Path(checkpoint or WEIGHTS)
        if not checkpoint.is_file():
            raise MissingFileError(
                f"mrc.lpips_checkpoint: no file {checkpoint}; leave the key empty to use the weights "
                f"that ship with the project ({WEIGHTS.name})."
            )
        with about("config.mrc.lpips_checkpoint", str(checkpoint)):
            shapes = {key: value.shape for key, value in self.state_dict().items()}
            remedy = "a file like the one that ships with the project"
            check_weights(weight_shapes(checkpoint), shapes, "LPIPS with AlexNet", remedy)
        self.load_state_dict(load_file(checkpoint))
        self.requires_grad_(False).eval()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distance of every pair: a, b (N, 3, H, W) RGB in [0, 1], H and W >= 31 -> (N,) in the weights' type.

        Raises ValueError for shapes that differ or are too small.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS got images of shapes {tuple(a.shape)} and {tuple(b.shape)}: both must have the same "
                f"shape (N, 3, H, W) with H and W of {MIN_SIZE} or more."
            )
        pairs = zip(a.split(self.chunk_size), b.split(self.chunk_size), strict=True)
        return torch.cat([self._per_layer(x, y).sum(dim=0) for x, y in pairs])

    def _per_layer(self, a, b):
        """The five layers' contributions (5, N), which add up to the distance."""
        x = torch.cat([a, b]).to(self.scale.dtype)
        x = (2 * x - 1 - self.shift) / self.scale
        distances = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in RELUS:
                head = getattr(self, f"lin{len(distances)}")
                # vector_norm rather than sqrt(sum of squares): its gradient is 0, not NaN, where all features are 0.
                unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPSILON)
                unit_a, unit_b = unit.chunk(2)
                distances.append(head((unit_a - unit_b) ** 2).mean(dim=(1, 2, 3)))
        return torch.stack(distances)
