"""The painter: a multi-view diffusion model as a policy, which the trainer finetunes.

`MultiViewPolicy` holds what every painter shares: the UNet with its LoRA, the frozen reference, arithmetic types,
loading and saving. A painter (`MVSDXL`, `MVDream`) adds how prompts are encoded, how the UNet is called, and how
latents become views.
"""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from config.errors import UserError
from diffusers_patch.checks import read_lora
from diffusers_patch.ddim_with_logprob import ddim_mean_std
from diffusers_patch.sample_gradients import SampleGradients
from recon.precision import without_tf32

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention+conv": ATTENTION
    + [
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "time_emb_proj",
        "conv1",
        "conv2",
        "conv_shortcut",
        "conv_in",
        "conv_out",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
    ],
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weights_dtype(network: torch.nn.Module) -> torch.dtype:
    """The type of a network's first weights. The `dtype` of diffusers' models walks through all layers, each time."""
    return next(network.parameters()).dtype


class MultiViewPolicy:
    """A multi-view diffusion model whose denoising steps are actions.

    pipeline: a stock diffusers pipeline with `unet`, `vae`, `scheduler` (DDIM) and text encoders.
    cameras: where the V views stand (any object; the trainer compares it with the reconstructor's).
    guidance_rescale: 0 = plain guidance (Lin et al. 2023, section 3.4, for values up to 1).

    Subclasses provide `_encode(prompts) -> conditioning`, `_unconditional(conditioning)` of the same shapes for the
    other branch of the guidance, `decode(latents) -> views (B, V, 3, S, S)` in [0, 1], `latent_shape` (of one sample)
    and `_unet(unet, latents, timesteps, conditioning)`; conditioning is a dict of (B, ...) tensors.
    """

    def __init__(self, pipeline, cameras, guidance_rescale=0.0):
        self.pipeline, self.cameras, self.guidance_rescale = pipeline, cameras, guidance_rescale
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        self.reference_unet, self.autocast_dtype = None, None
        self._lora_layers = []
        self.decode_batch_size = 8
        self._embeddings = {}
        for model in (self.unet, pipeline.vae, *self._text_encoders()):
            model.requires_grad_(False).eval()

    @property
    def device(self):
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str, mixed_precision: str = "no") -> "MultiViewPolicy":
        """Move everything to `device`; the frozen weights take the type of `mixed_precision` ("no", "fp16", "bf16").

        The VAE stays in float32 where its config says that it overflows in half precision (`force_upcast`). The text
        encoders wait on the CPU until `encode` needs them."""
        dtype = DTYPES[mixed_precision]
        self.autocast_dtype = None if dtype == torch.float32 else dtype
        vae = self.pipeline.vae
        # torch's `to`: that of diffusers warns of modules to be kept in float32 even where there are none
        torch.nn.Module.to(self.unet, device, dtype)
        torch.nn.Module.to(vae, device, torch.float32 if vae.config.force_upcast else dtype)
        for encoder in self._text_encoders():
            torch.nn.Module.to(encoder, "cpu", dtype)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)  # else copied in the first step
        if torch.device(device).type == "cpu":
            # the backward pass of fused attention is slower on CPUs than plain matrix products
            self._set_attention(self.unet, AttnProcessor())
        self._float_trainable()
        return self

    def _set_attention(self, unet, processor):
        unet.set_attn_processor(processor)

    # -- what is trained --------------------------------------------------------------------------------------------

    def add_lora(self, rank: int, targets: str = "attention") -> None:
        """Train low-rank matrices (float32) beside the frozen UNet; the reference is the UNet without them.

        A ~ N(0, (1/rank)^2), B = 0, scaling 1, as published. targets: a key of `LORA_TARGETS`."""
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS[targets])
        self.unet.add_adapter(config)
        self._lora_layers = [module for module in self.unet.modules() if isinstance(module, LoraLayer)]
        for layer in self._lora_layers:
            layer.cast_input_dtype_enabled = False  # autocast does it; peft would keep a float32 copy of every input
        self._float_trainable()

    def train_all(self) -> None:
        """Train every weight of the UNet (float32); the reference is a frozen copy."""
        self.reference_unet = copy.deepcopy(self.unet)
        self.unet.requires_grad_(True)
        self._float_trainable()

    def _float_trainable(self):
        for parameter in self.trainable_parameters():
            parameter.data = parameter.data.float()

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def equals_reference(self) -> bool:
        """Whether the policy is the base model still: the second factor of every LoRA is zero."""
        factors = [layer.lora_B[name].weight for layer in self._lora_layers for name in layer.active_adapters]
        return bool(factors) and not any(torch.stack([factor.any() for factor in factors]).tolist())

    def sample_gradients(self, batch: int, guidance_scale: float) -> SampleGradients:
        """A context that keeps the gradients of `batch` samples apart, of `trainable_parameters` in their order.

        Raises ValueError if more than a LoRA is trained."""
        factors = [
            factor[name]
            for layer in self._lora_layers
            for factor in (layer.lora_A, layer.lora_B)
            for name in layer.active_adapters
        ]
        if [id(factor.weight) for factor in factors] != [id(weight) for weight in self.trainable_parameters()]:
            raise ValueError("gradients of every sample apart need a policy that trains a LoRA and nothing else")
        return SampleGradients(factors, batch, 1 if guidance_scale == 1.0 else 2)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of what is trained."""
        return {name: p.detach() for name, p in self.unet.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `trainable_state` returned. Raises UserError if names or shapes differ."""
        trained = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        if trained.keys() != state.keys() or any(trained[name].shape != value.shape for name, value in state.items()):
            raise UserError(
                "the saved weights do not fit this model: config.use_lora, config.lora.* and "
                "config.pretrained.model must be those of the run that saved them"
            )
        with torch.no_grad():
            for name, value in state.items():
                trained[name].copy_(value)

    def save_lora(self, folder: str | Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, which stock `pipeline.load_lora_weights(folder)` reads."""
        layers = {name: value.cpu().contiguous() for name, value in get_peft_model_state_dict(self.unet).items()}
        self.pipeline.save_lora_weights(str(folder), unet_lora_layers=layers)

    def save_weights(self, folder: str | Path) -> None:
        """Write what was trained, for stock diffusers: the LoRA, or after `train_all` a `unet` folder."""
        if self.reference_unet is None:
            self.save_lora(folder)
        else:
            self.unet.save_pretrained(Path(folder) / "unet")

    def load_lora(self, folder: str | Path) -> None:
        """Load what `save_lora` wrote into the adapter that `add_lora` made.

        Raises MissingFileError or UserError as `read_lora`, also if the file does not fit."""
        weights = read_lora(folder, {}, "the LoRA", "give a folder that a run wrote")
        state = {name.removeprefix("unet."): value for name, value in weights.items()}
        wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(self.unet).items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        unfit = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if unfit:  # asked first, because peft would load the others and leave these as they were
            raise UserError(
                f"{folder} does not fit this model's LoRA: {len(unfit)} weights differ, such as {unfit[0]} with "
                f"{found.get(unfit[0], 'nothing')} instead of {wanted.get(unfit[0], 'nothing')}; config.lora.*, "
                f"config.painter.name and config.pretrained.model must be those of the run that saved it"
            )
        set_peft_model_state_dict(self.unet, state)

    # -- acting -----------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Conditioning of B prompts: a dict of (B, ...) tensors. Each distinct prompt is encoded once in a run.

        One at a time: rounding would depend on the other prompts of a batch, and a resumed run sees other batches.
        For new prompts the text encoders visit the GPU, so encode all prompts of a run at once."""
        self._encode_new(prompts)
        rows = [self._embeddings[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def _encode_new(self, prompts):
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if not new:
            return
        for encoder in self._text_encoders():
            torch.nn.Module.to(encoder, self.device)
        for prompt in new:
            self._embeddings[prompt] = self._encode([prompt])
        for encoder in self._text_encoders():
            torch.nn.Module.to(encoder, "cpu")

    def initial_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """(batch, *latent_shape) float32 noise; generator: one, or a list of `batch` (one per sample)."""
        noise = randn_tensor((batch, *self.latent_shape), generator=generator, device=self.device, dtype=torch.float32)
        return noise * self.scheduler.init_noise_sigma

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
        reference: bool = False,
    ) -> torch.Tensor:
        """The UNet's output after classifier-free guidance, float32, shape of `latents` (B, ...).

        timesteps: (B,). reference: ask the frozen base model instead. guidance_scale = 1 skips the unconditional
        branch."""
        unet = self.unet
        if reference and self.reference_unet is not None:
            unet = self.reference_unet
        with self._reference_mode(reference), self._autocast():
            if guidance_scale == 1.0:
                return self._unet(unet, latents, timesteps, conditioning).float()
            nothing = self._unconditional(conditioning)
            both = {name: torch.cat([nothing[name], value]) for name, value in conditioning.items()}
            output = self._unet(unet, torch.cat([latents] * 2), torch.cat([timesteps] * 2), both).float()
        unconditional, conditional = output.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if self.guidance_rescale > 0:
            guided = rescale_noise_cfg(guided, conditional, self.guidance_rescale)
        return guided

    def mean_std(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
        eta: float,
        reference: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The Gaussian of the next latents, see `ddim_mean_std`; arguments as of `predict`."""
        output = self.predict(latents, timesteps, conditioning, guidance_scale, reference=reference)
        return ddim_mean_std(self.scheduler, output, timesteps, latents, eta)

    @contextlib.contextmanager
    def _reference_mode(self, reference):
        # the flag that peft's layers read; its own switch also walks through all modules and parameters, each time
        for layer in self._lora_layers if reference else ():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._lora_layers if reference else ():
                layer._disable_adapters = False

    def _autocast(self):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    @contextlib.contextmanager
    def full_precision(self):
        """Inside, the UNet computes in float32, TF32 excluded (its frozen weights keep their rounded values)."""
        kept, self.autocast_dtype = self.autocast_dtype, None
        frozen = [p for p in self.unet.parameters() if not p.requires_grad]
        types = [p.dtype for p in frozen]
        for p in frozen:
            p.data = p.data.float()
        try:
            with without_tf32():
                yield
        finally:
            for p, dtype in zip(frozen, types, strict=True):
                p.data = p.data.to(dtype)
            self.autocast_dtype = kept
