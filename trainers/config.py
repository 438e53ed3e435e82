"""What every trainer's config shares: live fields, and the defaults that differ from `TrainingArguments`."""

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from outspoken.trainers.loading import model_id

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)


class LiveMetadata(dict):
    """Field metadata whose own keys stay out of sight of `HfArgumentParser`.

    The parser copies a field's whole metadata into `argparse.add_argument`, which refuses keys it does not know. Only
    `help` and `aliases` are listed when iterating; `metadata["live"]` and its like are found by name.
    """

    _LISTED = ("help", "aliases")

    def keys(self):  # type: ignore[override]
        return [key for key in self._LISTED if key in self]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


def live_field(default: Any, help: str, minimum: float | None = None, maximum: float | None = None, choices=None):
    """A config field that may be changed while the run trains.

    The trainer must read it from `self.args` wherever it is used. Bounds are inclusive; `None` means unbounded.
    `choices` lists the values of a field that is not a number.
    """
    metadata = LiveMetadata(help=help, live=True, minimum=minimum, maximum=maximum, choices_live=choices)
    return field(default=default, metadata=metadata)


def live_fields(config: Any) -> dict[str, dict[str, Any]]:
    """Name -> bounds of every live field of a config (class or instance): `{"minimum", "maximum", "choices"}`."""
    return {
        f.name: {
            "minimum": f.metadata["minimum"],
            "maximum": f.metadata["maximum"],
            "choices": f.metadata["choices_live"],
        }
        for f in dataclasses.fields(config)
        if "live" in f.metadata
    }


def as_config(config_class: type[ConfigT], args: Any, model: Any, trainer: str) -> ConfigT:
    """What the user passed as `args`, as a `config_class`: itself, or one with the fields that both share.

    Args:
        args: such a config, another `TrainingArguments` (fields that only it has and that were set are named in a
            warning), or None: the defaults, in a folder named after the model.
        trainer: the trainer's class name, like `SFTTrainer`.

    Raises:
        TypeError: `args` is something else.
    """
    name = config_class.__name__
    if args is None:
        return config_class(f"{model_id(model).split('/')[-1] or 'model'}-{trainer.removesuffix('Trainer')}")
    if isinstance(args, config_class):
        return args
    if not isinstance(args, TrainingArguments):
        article = "an" if name[0] in "AEFHILMNORSX" else "a"  # as the letter is spoken
        raise TypeError(f"`args` must be {article} {name}, got {type(args).__name__}.")
    known = {f.name for f in dataclasses.fields(config_class) if f.init}
    dropped = [
        f.name
        for f in dataclasses.fields(args)
        if f.init and f.name not in known and getattr(args, f.name) != f.default and not f.name.startswith("_")
    ]
    if dropped:
        logger.warning(f"{trainer} does not know these settings of the {type(args).__name__}: {', '.join(dropped)}.")
    # to_dict hides everything that is called a token.
    hidden = {key: getattr(args, key) for key in known if key.endswith("_token") and hasattr(args, key)}
    values = {key: value for key, value in args.to_dict().items() if key in known} | hidden
    return config_class(**values)


def bf16_supported() -> bool:
    """Whether bf16 mixed precision is worth defaulting to on this machine's accelerator."""
    return (torch.cuda.is_available() and is_torch_bf16_gpu_available()) or (
        hasattr(torch, "xpu") and torch.xpu.is_available()
    )


@dataclass
class OutspokenConfig(TrainingArguments):
    """Base of all trainer configs: TRL's defaults, the live fields all trainers share, and the diagnostics switch."""

    learning_rate: float = live_field(5e-5, "Peak learning rate.", minimum=0.0, maximum=1.0)
    max_grad_norm: float = live_field(1.0, "Gradient norm above which gradients are scaled down.", minimum=0.0)
    logging_steps: float = field(default=10, metadata={"help": "Log every this many update steps."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "bf16 mixed precision. Unset: on where the accelerator supports it and fp16 is off."},
    )
    diagnose: bool = field(
        default=True, metadata={"help": "Watch the run with the heuristics engine and write the run directory."}
    )
    diagnostics_params: dict | str | None = field(
        default=None,
        metadata={"help": "Overrides of rule thresholds, e.g. {'RL016': {'limit': 0.3}}; see `outspoken rules`."},
    )
    diagnostics_ignore: list[str] | None = field(
        default=None, metadata={"help": "Codes of rules to switch off, e.g. RL002."}
    )

    # TrainingArguments parses the fields named here from JSON when they come as strings (command line).
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "diagnostics_params"]

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and bf16_supported()
        with warnings.catch_warnings():
            # The field keeps TRL's name; that transformers is about to rename it is not the user's business.
            warnings.filterwarnings(
                "ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning
            )
            super().__post_init__()
