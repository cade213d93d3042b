"""Converts OpenLRM's published weights (version 1.1, https://huggingface.co/zxhezexin) to those of `recon.openlrm`.

Only library modules have other names here: the encoder is transformers' Dinov2WithRegistersModel, which keeps queries,
keys and values in separate matrices where DINOv2 stacks them in one.
"""

import re
from collections.abc import Mapping

import torch
from torch import nn

from recon.weights import check_weights, renamed

RENAMED = {  # pattern of our names -> published name, applied in this order
    r"^encoder\.embeddings\.position_embeddings$": "encoder.model.pos_embed",
    r"^encoder\.embeddings\.patch_embeddings\.projection\.": "encoder.model.patch_embed.proj.",
    r"^encoder\.embeddings\.": "encoder.model.",
    r"^encoder\.encoder\.layer\.": "encoder.model.blocks.",
    r"^encoder\.layernorm\.": "encoder.model.norm.",
    r"\.attention\.[qkv]_proj\.": ".attn.qkv.",
    r"\.attention\.o_proj\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"^camera_embedder\.": "camera_embedder.mlp.",
    r"^(transformer\.layers\.\d+\.mlp)\.2\.": r"\1.3.",  # the published module has a dropout in between
    r"^decoder\.": "synthesizer.decoder.",
}


def published_name(name: str) -> str:
    """The published name of the weight `name`, or of the matrix that it is stacked in."""
    return renamed(name, RENAMED)


def published_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the published file of an OpenLRM with the configuration of `model`."""
    return {
        published_name(name): ((3 if _stacked(name) else 1) * value.shape[0], *value.shape[1:])
        for name, value in model.state_dict().items()
    }


def convert_openlrm(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Published weights {key: tensor} as a float32 state dict of the OpenLRM `model`, which may be on the meta device.

    Raises ValueError with a list of the weights that are missing, unknown or of another shape."""
    check_weights(
        state_dict,
        published_shapes(model),
        "this OpenLRM",
        "the model.safetensors that was published together with its config.json (OpenLRM v1.1)",
    )
    converted = {}
    for name in model.state_dict():
        value, part = state_dict[published_name(name)], _stacked(name)
        converted[name] = (value.chunk(3)["qkv".index(part[1])] if part else value).float()
    return converted


def _stacked(name):
    """A match whose group 1 is q, k or v if the published file stacks the weight `name` with two others, else None."""
    return re.search(r"\.attention\.([qkv])_proj\.", name)
