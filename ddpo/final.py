"""What a run leaves for others: `final/`, with what stock diffusers needs beside the painter, and how to load it."""

import shutil
from pathlib import Path

from ml_collections import ConfigDict

from ddpo.files import whole
from diffusers_patch.checks import LORA_FILE
from diffusers_patch.policy import MultiViewPolicy

FUSED = "fuse_first"  # the LoRA that was fused into the painter before the run

README = """\
# What the run `{run}` learned

```python
{code}
```

{about}
"""
PAINTS = "Prompts were read with {suffix!r} behind them, and painted in {steps} DDIM steps with guidance {guidance:g}."
MVDREAM = (
    "Stock diffusers loads the weights, but it has no MVDream: to paint, use `python -m tools.evaluate` or "
    "`diffusers_patch.mvdream`."
)


def save_final(policy: MultiViewPolicy, config: ConfigDict, folder: Path) -> None:
    """Write what was trained into `folder`, a copy of the LoRA that belongs below it, and a README.md with the code.

    The painter itself is not copied."""
    with whole(folder) as partial:
        policy.save_weights(partial)
        if config.pretrained.lora and config.use_lora:
            (partial / FUSED).mkdir()
            shutil.copy2(Path(config.pretrained.lora) / LORA_FILE, partial / FUSED / LORA_FILE)
        code = loading_code(type(policy.pipeline).__name__, config, folder)
        sample = config.sample
        about = PAINTS.format(suffix=sample.prompt_suffix, steps=sample.num_steps, guidance=sample.guidance_scale)
        about = f"{about}\n{MVDREAM}" if config.painter.name == "mvdream" else about
        (partial / "README.md").write_text(README.format(run=folder.parent.name, code=code, about=about))


def loading_code(pipeline: str, config: ConfigDict, folder: Path) -> str:
    """Python that makes the trained painter, called `pipeline`, from `folder`. pipeline: the name of its class."""
    pretrained, classes, lines = config.pretrained, [pipeline], []
    revision = "" if Path(pretrained.model).exists() else f", revision={pretrained.revision!r}"
    lines.append(f"pipeline = {pipeline}.from_pretrained({pretrained.model!r}{revision})")
    lines.append("pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)")
    if pretrained.vae:
        classes.append("AutoencoderKL")
        lines.append(f"pipeline.vae = AutoencoderKL.from_pretrained({pretrained.vae!r})")
    if config.use_lora:
        if pretrained.lora:
            lines.append("# the run began with this LoRA in the painter's weights")
            lines.append(f"pipeline.load_lora_weights({str(folder / FUSED)!r})")
            lines += ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
        lines.append(f"pipeline.load_lora_weights({str(folder)!r})")
    else:
        classes.append("UNet2DConditionModel")
        lines.append(f"pipeline.unet = UNet2DConditionModel.from_pretrained({str(folder / 'unet')!r})")
    imports = ", ".join(sorted({*classes, "DDIMScheduler"}))
    return "\n".join([f"from diffusers import {imports}", "", *lines])
