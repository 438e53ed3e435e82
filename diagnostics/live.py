"""Reading and changing the settings of a trainer while it trains. Duck-typed: it imports no trainer and no torch.

Our own configs say in their field metadata which fields are live. For other trainers `FOREIGN_LIVE` lists the fields
that they read anew at every step, and the attributes that hold a second copy.
"""

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

SECRET_FIELDS = ("hub_token", "push_to_hub_token")

Bounds = dict[str, Any]


def _bounds(minimum: float | None = None, maximum: float | None = None, choices: list[Any] | None = None) -> Bounds:
    return {"minimum": minimum, "maximum": maximum, "choices": choices}


# Field -> bounds and the trainer attributes that shadow it, for trainers that are not ours. A field counts only when
# the trainer has its attribute: `trl.DPOTrainer` has `beta` and no `epsilon`.
FOREIGN_LIVE: dict[str, tuple[Bounds, tuple[str, ...]]] = {
    "beta": (_bounds(0.0), ("beta",)),
    "epsilon": (_bounds(0.0, 1.0), ("epsilon_low",)),
    "epsilon_high": (_bounds(0.0, 10.0), ("epsilon_high",)),
    "temperature": (
        _bounds(0.01, 10.0),
        ("temperature", "generation_config.temperature", "vllm_generation.temperature"),
    ),
    "top_p": (_bounds(0.0, 1.0), ("top_p", "generation_config.top_p", "vllm_generation.top_p")),
    "scale_rewards": (_bounds(choices=["group", "batch", "none"]), ("scale_rewards",)),
    "mask_truncated_completions": (_bounds(choices=[True, False]), ("mask_truncated_completions",)),
    "max_completion_length": (
        _bounds(1, 1_000_000),
        ("max_completion_length", "generation_config.max_new_tokens"),
    ),
}
# Fields of `TrainingArguments` that the training loop reads at every step, for any trainer.
COMMON_LIVE: dict[str, Bounds] = {"learning_rate": _bounds(0.0, 1.0), "max_grad_norm": _bounds(0.0)}


def config_of(args: Any) -> dict[str, Any]:
    """The settings of a run as JSON can hold them: enums by value, unknown objects by `repr`, secrets masked."""
    config = {}
    for f in dataclasses.fields(args):
        value = getattr(args, f.name, None)
        if f.name.startswith("_"):
            continue
        if f.name in SECRET_FIELDS:
            value = None if value is None else "<masked>"
        config[f.name] = _plain(value)
    world_size = getattr(args, "world_size", 1)
    config["world_size"] = int(world_size)
    return config


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if depth < 6 and isinstance(value, Mapping):
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    if depth < 6 and isinstance(value, list | tuple | set):
        return [_plain(v, depth + 1) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value), depth + 1)
    return repr(value)[:200]


def live_fields(trainer: Any, args: Any) -> dict[str, Bounds]:
    """Field -> bounds of what may be changed while this trainer trains."""
    own = {
        f.name: _bounds(f.metadata["minimum"], f.metadata["maximum"], f.metadata["choices_live"])
        for f in dataclasses.fields(args)
        if "live" in f.metadata
    }
    if own:
        if getattr(args, "deepspeed", None):
            own.pop("max_grad_norm", None)  # DeepSpeed takes it from its own config at start
        return own
    live = {name: dict(bounds) for name, bounds in COMMON_LIVE.items() if hasattr(args, name)}
    if getattr(args, "deepspeed", None):
        live.pop("max_grad_norm", None)
    for name, (bounds, attributes) in FOREIGN_LIVE.items():
        if trainer is not None and hasattr(args, name) and hasattr(trainer, attributes[0]):
            live[name] = dict(bounds)
    return live


def refusal(trainer: Any, config: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """Why values that are within bounds still cannot take effect in this trainer; None if they can."""
    if "beta" in fields and config.get("beta") == 0 and fields["beta"] and config.get("num_generations") is not None:
        if getattr(trainer, "ref_model", None) is None:
            return "beta was 0 when the run began, so no reference model was loaded; set beta for the next run"
    vllm_limit = config.get("vllm_max_model_length")
    new_length = fields.get("max_completion_length")
    if new_length is not None and config.get("use_vllm") and isinstance(vllm_limit, int) and new_length > vllm_limit:
        return f"max_completion_length={new_length} exceeds vllm_max_model_length={vllm_limit}, fixed at start"
    return None


def apply_fields(
    trainer: Any, args: Any, fields: Mapping[str, Any], optimizer: Any = None, lr_scheduler: Any = None
) -> None:
    """Set config fields in a running trainer, where they take effect: in `args`, and in every copy known of them.

    The learning rate also rescales the scheduler's base rates and the rate now in the optimizer, so that the
    schedule's shape is kept.
    """
    for name, value in fields.items():
        if name == "learning_rate":
            set_learning_rate(args, float(value), optimizer, lr_scheduler)
            continue
        setattr(args, name, value)
        if name in FOREIGN_LIVE and trainer is not None:
            for path in FOREIGN_LIVE[name][1]:
                _set_path(trainer, path, value)
        if name == "epsilon" and trainer is not None and getattr(args, "epsilon_high", None) is None:
            _set_path(trainer, "epsilon_high", value)


def _set_path(owner: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        owner = getattr(owner, part, None)
    if owner is not None and hasattr(owner, last):
        setattr(owner, last, value)


def set_learning_rate(args: Any, new: float, optimizer: Any, lr_scheduler: Any) -> None:
    """Make `new` the peak learning rate: groups with rates of their own keep their ratio to it."""
    old = float(args.learning_rate)
    args.learning_rate = new
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)

    def scaled(rate: float) -> float:
        return rate * new / old if old > 0 else new

    if scheduler is not None and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [scaled(rate) for rate in scheduler.base_lrs]
    for group in getattr(optimizer, "param_groups", []):
        if "initial_lr" in group:
            group["initial_lr"] = scaled(group["initial_lr"])
        group["lr"] = scaled(group["lr"])
