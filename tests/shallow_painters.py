"""Painters of full width with one block and one layer of a kind, for the pretend GPU, whose time grows with the layers.

They meet every line of the code that the painters of full size meet.
"""

import json

from diffusers_patch.instant3d_checkpoint import CONFIGS as SDXL
from diffusers_patch.mvdream import UNET_CONFIG
from diffusers_patch.mvdream_checkpoints import TEXT_ENCODER

SHALLOW = {  # one block of a kind, on the first level and the lowest one
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "block_out_channels": [320, 1280],
    "attention_head_dim": [5, 20],
}
FEW_LAYERS = {"num_hidden_layers": 2}
SHALLOW_PAINTERS = {  # run of config/dgx.py -> part -> its configuration
    "carve3d_train": {
        "unet": {
            **SDXL["unet"],
            **SHALLOW,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        "text_encoder": {**SDXL["text_encoder"], **FEW_LAYERS},
        "text_encoder_2": {**SDXL["text_encoder_2"], **FEW_LAYERS},
    },
    "mvdream_lgm": {
        "unet": {
            **UNET_CONFIG,
            **SHALLOW,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "text_encoder": {**TEXT_ENCODER, **FEW_LAYERS},
    },
}


def write_shallow_painter(run, folder):
    """The config.json files, without weights, of a painter of `SHALLOW_PAINTERS`: the folder, for pretrained.model."""
    for name, config in SHALLOW_PAINTERS[run].items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    return str(folder)
