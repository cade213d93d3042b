"""MVDream: SD 2.1 that paints four separate views which see each other through their self-attention.

The network is the stock `UNet2DConditionModel`: the camera goes in as `class_labels`, and an attention processor lets
the self-attention run over the tokens of all views of a sample (Shi et al. 2023, "MVDream", section 3.1; the layout of
the weights was read from the public checkpoints).
"""

import re

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from diffusers_patch.policy import MultiViewPolicy, weights_dtype
from recon.weights import check_weights

VIEWS = 4
PREFIX = "model.diffusion_model."
CAMERA_NUMBERS = 16  # a camera-to-world matrix
UNET_CONFIG = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": CAMERA_NUMBERS,
}


class ViewsAttend:
    """Self-attention over all tokens of a sample's views: (B V, L, C) is seen as (B, V L, C).

    attend: the processor that does the arithmetic."""

    def __init__(self, attend, views=VIEWS):
        self.attend, self.views = attend, views

    def __call__(self, attn, hidden_states, *args, **kwargs):
        together = hidden_states.reshape(-1, self.views * hidden_states.shape[1], hidden_states.shape[2])
        return self.attend(attn, together, *args, **kwargs).reshape(hidden_states.shape)


def let_views_attend(unet: UNet2DConditionModel, attend=None, views: int = VIEWS) -> UNet2DConditionModel:
    """Let the self-attentions (`attn1`) of a UNet run over all `views` of a sample; cross-attentions stay per view.

    attend: the processor below both, None = fused attention."""
    attend = attend or AttnProcessor2_0()
    unet.set_attn_processor(
        {name: ViewsAttend(attend, views) if ".attn1." in name else attend for name in unet.attn_processors}
    )
    return unet


RENAMED = {  # stock name -> ldm name, outside the blocks and inside the residual blocks
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "class_embedding.linear_1.": "camera_embed.0.",
    "class_embedding.linear_2.": "camera_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",  # of SDXL, whose code continues ldm's
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RENAMED_IN_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}


def ldm_name(name: str, config) -> str:
    """The name in the ldm code base of the weight `name` of a stock UNet with `config`.

    ldm numbers the layers of all blocks consecutively: `layers_per_block` (one more on the way up) and a sampler."""
    for stock, ldm in RENAMED.items():
        name = name.replace(stock, ldm) if name.startswith(stock) else name
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match:
        way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        row = config.layers_per_block + 1
        number = block * row + layer + (way == "down")
        if kind == "downsamplers":
            number, rest = (block + 1) * row, rest.replace("conv.", "0.op.")
        elif kind == "upsamplers":
            place = 2 if "CrossAttn" in config.up_block_types[block] else 1  # behind the attention, if there is one
            number, rest = (block + 1) * row - 1, f"{place}.{rest}"
        else:
            rest = f"{('resnets', 'attentions').index(kind)}.{rest}"
        name = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{rest}"
    for stock, ldm in RENAMED_IN_RESNET.items():
        name = re.sub(
            rf"^((?:input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.){re.escape(stock)}", rf"\g<1>{ldm}", name
        )
    return name


def convert_mvdream_unet(state_dict: dict[str, torch.Tensor], **unet_overrides) -> UNet2DConditionModel:
    """Weights under MVDream's own (ldm) names -> the stock UNet whose self-attention runs over all views.

    state_dict: {key: tensor}, with or without the prefix "model.diffusion_model."; other keys of a whole checkpoint are
    ignored where the prefix is used. unet_overrides: entries of the stock UNet's config that differ from the public
    model's. Tensors on the meta device give a UNet on the meta device.
    Raises ValueError that lists what is missing or unknown."""
    prefixed = any(key.startswith(PREFIX) for key in state_dict)
    weights = {
        key.removeprefix(PREFIX): value for key, value in state_dict.items() if key.startswith(PREFIX) or not prefixed
    }
    config = {**UNET_CONFIG, **unet_overrides}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    wanted = {ldm_name(name, unet.config): (name, value.shape) for name, value in unet.state_dict().items()}
    check_weights(
        weights,
        {key: shape for key, (_, shape) in wanted.items()},
        "this MVDream UNet",
        "a complete checkpoint of MVDream, or the overrides of its UNet's configuration",
    )
    unet.load_state_dict({name: weights[key] for key, (name, _) in wanted.items()}, assign=True)
    return let_views_attend(unet)


class MVDream(MultiViewPolicy):
    """A stock `StableDiffusionPipeline` whose UNet takes cameras, as a multi-view policy. Latents are (B, 4, 4, h, w),
    views first: the four of a sample are one action.

    camera_vectors: (4, 16), `cameras` in the form that the UNet is conditioned on. negative_prompt: the prompt of the
    unconditional branch of the guidance."""

    def __init__(self, pipeline, cameras, camera_vectors, guidance_rescale=0.0, negative_prompt=""):
        super().__init__(pipeline, cameras, guidance_rescale)
        self.camera_vectors, self.negative_prompt = camera_vectors, negative_prompt
        self._set_attention(self.unet, None)

    def to(self, device, mixed_precision="no"):
        self.camera_vectors = self.camera_vectors.to(device)  # once, not in every step
        return super().to(device, mixed_precision)

    def _text_encoders(self):
        return [self.pipeline.text_encoder]

    def _set_attention(self, unet, processor):
        let_views_attend(unet, processor)

    @property
    def latent_shape(self):
        size = self.unet.config.sample_size
        return (VIEWS, self.unet.config.in_channels, size, size)

    def _encode(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def encode(self, prompts):
        self._encode_new([*prompts, self.negative_prompt])  # together, for both branches need the text encoder
        return super().encode(prompts)

    def _unconditional(self, conditioning):
        negative = super().encode([self.negative_prompt])["prompt_embeds"]
        return {"prompt_embeds": negative.expand_as(conditioning["prompt_embeds"])}

    def _unet(self, unet, latents, timesteps, conditioning):
        B, dtype = len(latents), weights_dtype(unet)
        vectors = self.camera_vectors.to(latents.device, dtype).repeat(B, 1)
        embeds = conditioning["prompt_embeds"].to(dtype).repeat_interleave(VIEWS, 0)
        output = unet(
            latents.flatten(0, 1).to(dtype), timesteps.repeat_interleave(VIEWS), embeds, class_labels=vectors
        ).sample
        return output.unflatten(0, (B, VIEWS))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 4, 4, h, w) -> views (B, 4, 3, S, S) in [0, 1]."""
        vae = self.pipeline.vae
        scaled = (latents.flatten(0, 1) / vae.config.scaling_factor).to(weights_dtype(vae))
        parts = scaled.split(VIEWS * self.decode_batch_size)
        images = torch.cat([vae.decode(part).sample.float() for part in parts])
        return (images / 2 + 0.5).clamp(0, 1).unflatten(0, (len(latents), VIEWS))
