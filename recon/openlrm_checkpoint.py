"""OpenLRM's published weights (version 1.1, https://huggingface.co/zxhezexin) under the names of `recon.openlrm`.

Only what comes from a library has other names here: the encoder is transformers' Dinov2WithRegistersModel, which keeps
queries, keys and values apart where DINOv2 stacks them in one matrix.
"""

import re

from recon.weights import check_weights

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
    r"^(transformer\.layers\.\d+\.mlp)\.2\.": r"\1.3.",  # the published ones count a dropout
    r"^decoder\.": "synthesizer.decoder.",
}


def published_name(name):
    """What the published file calls the weight `name`, or the matrix that holds it."""
    for pattern, published in RENAMED.items():
        name = re.sub(pattern, published, name)
    return name


def published_shapes(model):
    """{key: shape} of the file that is published for an OpenLRM like `model`."""
    return {
        published_name(name): ((3 if _stacked(name) else 1) * value.shape[0], *value.shape[1:])
        for name, value in model.state_dict().items()
    }


def convert_openlrm(state_dict, model):
    """Published weights {key: tensor} as a float32 state dict of `model`, which may be on the meta device.

    Raises ValueError that lists what is missing, unknown or of another shape."""
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
    return re.search(r"\.attention\.([qkv])_proj\.", name)
