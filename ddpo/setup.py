"""What a run needs beside its models: processes and device, an optimizer, and what it says of its machine."""

import datetime
import importlib.metadata
import netrc
import os
import platform
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from ml_collections import ConfigDict

from diffusers_patch.policy import MultiViewPolicy

PACKAGES = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate")  # whose versions may change a run


def set_arithmetic(config: ConfigDict) -> None:
    """TF32 and determinism of this process, before anything is computed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)


def start_accelerator(config: ConfigDict) -> Accelerator:
    """The Accelerator of this run: processes, device, loss scaling, tracker."""
    if config.tracker == "wandb" and not has_wandb_account():
        os.environ.setdefault("WANDB_MODE", "offline")  # otherwise wandb stops to ask for an account
    # bf16 is the policy's business (autocast inside `predict`); fp16 also needs the accelerator's loss scaling
    return Accelerator(
        mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=None if config.tracker == "none" else config.tracker,
        # published: a validation in which one process has more to paint than the others must not end the run
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=5400))],
        project_config=ProjectConfiguration(project_dir=config.logdir),
    )


def has_wandb_account() -> bool:
    """Whether wandb will find an account in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def environment(num_processes: int) -> dict[str, str]:
    """What a run needs besides its configuration to be repeated bit by bit, versions and machine: {name: words}."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads per process",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "processes": str(num_processes),
    }


def adam_settings(config: ConfigDict) -> dict:
    """AdamW's settings under torch's names."""
    train = config.train
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.adam_weight_decay,
        "eps": train.adam_epsilon,
    }


def make_optimizer(policy: MultiViewPolicy, config: ConfigDict) -> torch.optim.Optimizer:
    """AdamW over the policy's trainable weights, in 8 bits if asked for."""
    if config.train.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(policy.trainable_parameters(), **adam_settings(config))
    return torch.optim.AdamW(policy.trainable_parameters(), **adam_settings(config))
