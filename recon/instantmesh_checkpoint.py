"""Between the published weights of InstantMesh's NeRF stage, instant_nerf_{base,large}.ckpt of TencentARC/InstantMesh,
and those of `recon.instantmesh`: tensor for tensor, under other names where a module is a library's.

The files hold no configuration; it follows from the shapes of their tensors.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from config.errors import UserError
from recon.weights import check_weights, renamed

PREFIX = "lrm_generator."  # of the reconstructor's weights among those of the training's
MESH_STAGE = "synthesizer.decoder.net_sdf."  # what only the second stage of the training has
REMEDY = "instant_nerf_base.ckpt or instant_nerf_large.ckpt of TencentARC/InstantMesh"
RENAMED = {  # pattern of our names -> published name, applied in this order
    r"^encoder\.modulations\.(\d+)\.": r"encoder.model.encoder.layer.\1.adaLN_modulation.1.",
    r"^encoder\.vit\.layers\.": "encoder.model.encoder.layer.",
    r"^encoder\.vit\.": "encoder.model.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
    r"^camera_embedder\.": "encoder.camera_embedder.",
    r"^(transformer\.layers\.\d+\.mlp)\.2\.": r"\1.3.",  # the published module has a dropout in between
    r"^pos_embed$": "transformer.pos_embed",
    r"^upsampler\.": "transformer.deconv.",
    r"^decoder\.": "synthesizer.decoder.",
    r"^": PREFIX,
}
SHARED = dict(
    encoder_model_name="facebook/dino-vitb16",
    encoder_feat_dim=768,
    encoder_freeze=False,
    transformer_dim=1024,
    transformer_heads=16,
    triplane_low_res=32,
    triplane_high_res=64,
)
OPTIONS = {  # the published sizes
    "base": dict(SHARED, transformer_layers=12, triplane_dim=40, rendering_samples_per_ray=96),
    "large": dict(SHARED, transformer_layers=16, triplane_dim=80, rendering_samples_per_ray=128),
}
HEAD_WIDTH = 64  # of all attention layers, which no shape shows


def published_name(name: str) -> str:
    """The published name of the weight `name`."""
    return renamed(name, RENAMED)


def published_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of an InstantMesh under their published names: the "state_dict" of a published file."""
    return {published_name(name): value for name, value in model.state_dict().items()}


def configuration(weights: Mapping[str, torch.Tensor]) -> dict:
    """Arguments of the InstantMesh that published weights {key: tensor} belong to: those of `OPTIONS` whose width and
    channels they have, or otherwise, for small models with attention heads of 64 channels, what their shapes say.

    Raises UserError with one sentence for weights of another kind, or if the tensors that show sizes are missing."""
    if any(key.startswith(PREFIX + MESH_STAGE) for key in weights):
        raise UserError(
            f"These are the weights of InstantMesh's mesh stage (instant_mesh_*.ckpt), which renders surfaces and no "
            f"radiance field: give its NeRF stage, {REMEDY}."
        )
    try:
        embed, _, patch, _ = weights[f"{PREFIX}encoder.model.embeddings.patch_embeddings.projection.weight"].shape
        positions = weights[f"{PREFIX}encoder.model.embeddings.position_embeddings"].shape[1] - 1
        tokens = weights[f"{PREFIX}transformer.pos_embed"].shape[1]
        width, channels, _, _ = weights[f"{PREFIX}transformer.deconv.weight"].shape
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"These are not the weights of InstantMesh, of whose {PREFIX}* they lack "
            f"{error if isinstance(error, KeyError) else 'some in the right shape'}: give {REMEDY}."
        ) from error
    for option in OPTIONS.values():
        if (width, channels) == (option["transformer_dim"], option["triplane_dim"]):
            return option
    side = math.isqrt(tokens // 3)
    return dict(
        SHARED,
        encoder_feat_dim=embed,
        transformer_dim=width,
        transformer_layers=_layers(weights, f"{PREFIX}transformer.layers."),
        transformer_heads=max(1, width // HEAD_WIDTH),
        triplane_low_res=side,
        triplane_high_res=2 * side,
        triplane_dim=channels,
        rendering_samples_per_ray=OPTIONS["base"]["rendering_samples_per_ray"],
        encoder_overrides=dict(
            hidden_size=embed,
            intermediate_size=4 * embed,
            num_hidden_layers=_layers(weights, f"{PREFIX}encoder.model.encoder.layer."),
            num_attention_heads=max(1, embed // HEAD_WIDTH),
            image_size=patch * math.isqrt(positions),
            patch_size=patch,
        ),
    )


def convert_instantmesh(weights: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Published weights {key: tensor} as a float32 state dict of the InstantMesh `model`, which may be on the meta
    device. Weights without the prefix, such as those of the training's losses, are left out.

    Raises UserError with a list of the weights that are missing, unknown or of another shape."""
    weights = {key: value for key, value in weights.items() if key.startswith(PREFIX)}
    shapes = {key: value.shape for key, value in published_weights(model).items()}
    check_weights(weights, shapes, "this InstantMesh", f"the complete {REMEDY}")
    return {name: weights[published_name(name)].float() for name in model.state_dict()}


def _layers(weights, prefix):
    """How many numbers follow `prefix` in the keys of `weights`."""
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})
