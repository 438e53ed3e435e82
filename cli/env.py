"""`outspoken env`: what this machine has, for a bug report; and the accelerate configs that come with the package."""

import importlib.metadata
import importlib.resources
import os
import platform
from pathlib import Path
from typing import Any

from outspoken.cli.common import CommandError, JsonFlag, print_json, say

PACKAGES = (
    "outspoken",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "huggingface_hub",
    "peft",
    "trl",
    "deepspeed",
    "vllm",
    "liger-kernel",
    "bitsandbytes",
    "flash-attn",
    "kernels",
    "numpy",
)


def env(json: JsonFlag = False) -> None:
    """Print versions, devices, and the accelerate configs that come with the package."""
    found = environment()
    if json:
        print_json(found)
        return
    say("Versions", "bold")
    for name, version in {"python": found["python"], **found["packages"]}.items():
        say(f"  {name:<16} {version or 'not installed'}", "" if version else "dim")
    say("Machine", "bold")
    say(f"  {'platform':<16} {found['platform']}")
    say(f"  {'processors':<16} {found['cpus']}")
    for index, device in enumerate(found["devices"]):
        say(f"  {f'device {index}':<16} {device}")
    if not found["devices"]:
        say(f"  {'device':<16} cpu")
    if found["accelerate_default_config"]:
        say(f"  {'accelerate':<16} {found['accelerate_default_config']} (what `accelerate launch` takes by default)")
    say("Accelerate configs, for --accelerate_config NAME or accelerate launch --config_file PATH", "bold")
    for name, path in found["accelerate_configs"].items():
        say(f"  {name:<16} {path}")


def environment() -> dict[str, Any]:
    """What `env` prints: versions (None where not installed), platform, devices, accelerate configs by name."""
    import torch
    from accelerate.commands.config import default_config_file

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": _devices(torch),
        "cuda": torch.version.cuda,
        "accelerate_configs": {name: str(path) for name, path in accelerate_configs().items()},
        "accelerate_default_config": default_config_file if os.path.isfile(default_config_file) else None,
    }


def accelerate_configs() -> dict[str, Path]:
    """The accelerate configs that come with the package: name -> file."""
    folder = Path(str(importlib.resources.files("outspoken.cli") / "accelerate_configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def accelerate_config(name: str) -> Path:
    """The file that `--accelerate_config` means: a file, or the name of one that comes with the package.

    Raises:
        CommandError: there is none.
    """
    shipped = accelerate_configs()
    if name in shipped:
        return shipped[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise CommandError(f"accelerate_config {name!r} is no file, nor one of {', '.join(shipped)}.")


def _devices(torch: Any) -> list[str]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(kind)
    count = module.device_count() if hasattr(module, "device_count") else 1
    names = [module.get_device_name(i) if hasattr(module, "get_device_name") else kind.upper() for i in range(count)]
    if kind == "cuda":
        sizes = [module.get_device_properties(i).total_memory / 2**30 for i in range(count)]
        return [f"{name}, {size:.0f} GiB" for name, size in zip(names, sizes)]
    return names


def _version(package: str) -> str | None:
    if package == "outspoken":
        from outspoken import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
