"""Float32 that means float32."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, GPUs do not round float32 matrix products and convolutions to TF32's three decimal digits.

    For what three digits are too few: cameras, whose products of 4x4 matrices cost nothing, and KL measurements.
    """
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    try:
        yield
    finally:
        for library, value in zip(libraries, allowed, strict=True):
            library.allow_tf32 = value
