"""What a run leaves for others: `final/`, with what stock diffusers needs beside the painter, and how to load it."""

import shlex
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from ddpo.files import whole
from diffusers_patch.checks import LORA_FILE, has_stock_unet
from diffusers_patch.policy import MultiViewPolicy

FUSED = "fuse_first"  # the LoRA that was fused into the painter before the run
CONVERTED = "painter"  # where the painter can be put in a layout that stock diffusers reads

README = """\
# What the run `{run}` learned

```python
{code}
```

{about}
"""
GRID = "`paint` makes a grid of four views as the run made it."
BLOB = " Diffusers has no blobs to start from: run this in the root of Carve3D's repository, for its `diffusers_patch`."
MVDREAM = """\
Stock diffusers loads the weights, but it has no MVDream: to paint, use `python -m tools.evaluate` or
`diffusers_patch.mvdream`. The run read prompts with {suffix!r} behind them and {negative!r} as the negative prompt, and
painted in {steps} DDIM steps with eta {eta:g}, guidance {guidance:g} and guidance rescale {rescale:g}, from cameras
{elevation:g} degrees above the horizon, the first at azimuth {azimuth:g}."""


def save_final(policy: MultiViewPolicy, config: ConfigDict, folder: Path) -> None:
    """Write what was trained into `folder`, a copy of the LoRA that belongs below it, and a README.md with the code.

    The painter itself is not copied."""
    with whole(folder) as partial:
        policy.save_weights(partial)
        if config.pretrained.lora and config.use_lora:
            (partial / FUSED).mkdir()
            shutil.copy2(Path(config.pretrained.lora) / LORA_FILE, partial / FUSED / LORA_FILE)
        code = python_code(type(policy.pipeline).__name__, config, folder)
        text = README.format(run=folder.parent.name, code=code, about=how_to_paint(config))
        (partial / "README.md").write_text(text)


def python_code(pipeline: str, config: ConfigDict, folder: Path) -> str:
    """Python that makes the trained painter, called `pipeline`, from `folder`, and for SDXL a function `paint`.

    pipeline: the name of its class."""
    imports, lines = {"diffusers": {pipeline, "DDIMScheduler"}}, loading(pipeline, config, folder)
    if config.pretrained.vae:
        imports["diffusers"].add("AutoencoderKL")
    if not config.use_lora:
        imports["diffusers"].add("UNet2DConditionModel")
    if config.painter.name == "mv_sdxl":
        lines += ["", "", *painting(config)]
        if config.sample.initial_latents == "gaussian_blob":
            imports["diffusers.utils.torch_utils"] = {"randn_tensor"}
            imports["diffusers_patch.gaussian_blob"] = {"blob_latent", "fused_start"}
    first = [f"from {module} import {', '.join(sorted(names))}" for module, names in imports.items()]
    return "\n".join([*first, "", *lines])


def loading(pipeline: str, config: ConfigDict, folder: Path) -> list[str]:
    """Lines that make `pipeline`."""
    pretrained, model, lines = config.pretrained, config.pretrained.model, []
    revision = "" if Path(model).exists() else pretrained.revision
    if config.painter.name == "mvdream" and not has_stock_unet(Path(model)):
        command = f"{shlex.quote(model)} {shlex.quote(str(folder / CONVERTED))}"
        tokenizer = pretrained.tokenizer if Path(model).is_file() else ""  # a folder has its own
        for flag, value in (("tokenizer", tokenizer), ("revision", revision)):
            command += f" --{flag} {shlex.quote(value)}" if value else ""
        lines += ["# stock diffusers reads the painter after", f"#     python -m tools.convert_mvdream {command}"]
        model, revision = str(folder / CONVERTED), ""
    revision = f", revision={revision!r}" if revision else ""
    lines.append(f"pipeline = {pipeline}.from_pretrained({model!r}{revision})")
    lines.append("pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)")
    if pretrained.vae:
        lines.append(f"pipeline.vae = AutoencoderKL.from_pretrained({pretrained.vae!r})")
    if not config.use_lora:
        lines.append(f"pipeline.unet = UNet2DConditionModel.from_pretrained({str(folder / 'unet')!r})")
        return lines
    if pretrained.lora:
        lines.append("# the run began with this LoRA in the painter's weights")
        lines.append(f"pipeline.load_lora_weights({str(folder / FUSED)!r})")
        lines += ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
    lines.append(f"pipeline.load_lora_weights({str(folder)!r})")
    return lines


def painting(config: ConfigDict) -> list[str]:
    """Lines of a function that paints a prompt with an SDXL `pipeline` as the run did."""
    sample = config.sample
    lines, keywords = ["def paint(prompt, generator=None):"], []
    if sample.initial_latents == "gaussian_blob":
        lines += [
            f"    pipeline.scheduler.set_timesteps({sample.num_steps})",
            "    size = pipeline.unet.config.sample_size",
            f"    blob = blob_latent(pipeline.vae, size * pipeline.vae_scale_factor, {sample.blob_std})",
            "    noise = randn_tensor((1, 4, size, size), generator, pipeline.device)",
        ]
        keywords.append("latents=fused_start(pipeline.scheduler, blob, noise)")
    keywords += [f"num_inference_steps={sample.num_steps}", f"eta={sample.eta}"]
    keywords += [f"guidance_scale={sample.guidance_scale}", f"guidance_rescale={sample.guidance_rescale}"]
    prompt = f"prompt + {sample.prompt_suffix!r}" if sample.prompt_suffix else "prompt"
    arguments = (prompt, *keywords, "generator=generator")
    return [*lines, "    return pipeline(", *(f"        {argument}," for argument in arguments), "    ).images[0]"]


def how_to_paint(config: ConfigDict) -> str:
    """What is to be said below the code."""
    sample, painter = config.sample, config.painter
    if painter.name == "mv_sdxl":
        return GRID + BLOB * (sample.initial_latents == "gaussian_blob")
    return MVDREAM.format(
        suffix=sample.prompt_suffix,
        negative=painter.negative_prompt,
        steps=sample.num_steps,
        eta=sample.eta,
        guidance=sample.guidance_scale,
        rescale=sample.guidance_rescale,
        elevation=painter.elevation,
        azimuth=painter.azimuth_start,
    )
