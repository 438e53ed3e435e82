"""What a training script of one's own needs: its arguments as dataclasses, from the command line and a YAML file.

Names, fields and defaults are TRL 1.16's.
"""

import argparse
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from transformers import BitsAndBytesConfig, HfArgumentParser
from transformers.utils import is_peft_available, is_rich_available

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class ScriptArguments:
    """Which dataset a script trains on; all but `ignore_bias_buffers` count only without a mixture (`datasets`).

    Attributes:
        dataset_name: its path or hub name.
        dataset_config: its configuration, the argument `name` of `datasets.load_dataset`.
        dataset_train_split: the split to train on.
        dataset_test_split: the split to evaluate on.
        dataset_streaming: whether to stream it.
        ignore_bias_buffers: keep boolean buffers of attention masks out of DistributedDataParallel's synchronisation.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Path or hub name of the dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream the dataset."})
    ignore_bias_buffers: bool = field(
        default=False,
        metadata={"help": "Keep boolean buffers of attention masks out of DistributedDataParallel's synchronisation."},
    )


@dataclass
class ModelConfig:
    """Which model a script trains, and with which adapter and quantization.

    Attributes:
        model_name_or_path: path or hub name of the model.
        model_revision: its branch, tag or commit.
        dtype: of the weights: "auto" (the checkpoint's), "bfloat16", "float16" or "float32".
        attn_implementation: of the attention, e.g. "sdpa" or "flash_attention_2".
        use_peft: whether to train a LoRA adapter (arXiv 2106.09685) instead of the model.
        lora_r: its rank.
        lora_alpha: its scale, divided by the rank.
        lora_dropout: dropout before it.
        lora_target_modules: the modules that get one; None takes the architecture's usual ones.
        lora_target_parameters: parameters that get one, where layers are parameters rather than modules.
        lora_modules_to_save: modules to train whole.
        lora_task_type: "CAUSAL_LM", or "SEQ_CLS" for a reward model.
        use_rslora: divide by the square root of the rank instead (arXiv 2312.03732).
        use_dora: learn the weights' magnitudes apart (arXiv 2402.09353).
        load_in_8bit: quantize the base model to 8 bits.
        load_in_4bit: quantize the base model to 4 bits.
        bnb_4bit_quant_type: "nf4" or "fp4".
        use_bnb_nested_quant: quantize the quantization constants, too.
        bnb_4bit_quant_storage: dtype that the packed weights are stored in.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Path or hub name of the model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: str | None = field(
        default="float32",
        metadata={"help": "Dtype of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, e.g. sdpa or flash_attention_2."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, divided by its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that get an adapter."})
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that get an adapter."}
    )
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "SEQ_CLS for a reward model."})
    use_rslora: bool = field(default=False, metadata={"help": "Divide lora_alpha by the root of the rank."})
    use_dora: bool = field(default=False, metadata={"help": "Learn the weights' magnitudes apart."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the base model to 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base model to 4 bits."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Kind of 4-bit numbers.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the constants, too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Dtype of the packed weights."})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("`load_in_8bit` and `load_in_4bit` are both set; choose one.")
        if self.lora_target_modules is not None and len(self.lora_target_modules) == 1:
            # One name may be a pattern, or "all-linear", which LoraConfig takes as text only.
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The quantization that `load_in_4bit` or `load_in_8bit` ask for, or None; 4-bit computes in the model's dtype."""
    if model_args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=None if model_args.dtype == "auto" else model_args.dtype,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
            bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.load_in_8bit else None


def get_peft_config(model_args: ModelConfig) -> "PeftConfig | None":
    """The LoRA adapter that `use_peft` and the fields `lora_*` ask for, or None."""
    if not model_args.use_peft:
        return None
    if not is_peft_available():
        raise ValueError("`use_peft` is set, but peft is not installed; run `pip install peft`.")
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        bias="none",
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        modules_to_save=model_args.lora_modules_to_save,
    )


def init_zero_verbose() -> None:
    """Log errors only, plainly, and send warnings through the log. Call it before importing what logs."""
    handler: logging.Handler
    if is_rich_available():
        from rich.logging import RichHandler

        handler = RichHandler()
    else:
        handler = logging.StreamHandler()
    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[handler], level=logging.ERROR)

    def log_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        logging.warning(f"{filename}:{lineno}: {category.__name__}: {message}")

    warnings.showwarning = log_warning


class ScriptParser(HfArgumentParser):
    """Parses dataclasses from the command line and from a YAML file that `--config` names.

    The file's keys are the dataclasses' fields, and `env` with environment variables to set. What the command line says
    counts more than the file, and that more than the defaults. In TRL this is `TrlParser`.

    Args:
        dataclass_types: a dataclass or several; none may have a field called `config`.
        kwargs: of `HfArgumentParser`.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any):
        if dataclass_types is None:
            dataclass_types = []
        elif not isinstance(dataclass_types, Iterable):
            dataclass_types = [dataclass_types]
        dataclass_types = list(dataclass_types)
        for dataclass_type in dataclass_types:
            if "config" in dataclass_type.__dataclass_fields__:
                raise ValueError(
                    f"{dataclass_type.__name__} has a field 'config', but `--config` names the YAML file; rename the "
                    "field."
                )
        super().__init__(dataclass_types, **kwargs)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        optional = type(None) in get_args(field.type)
        HfArgumentParser._parse_dataclass_field(parser, field)
        action = parser._option_string_actions[f"--{field.name}"]
        if optional and action.nargs is None and isinstance(action.type, type) and action.type is not str:
            action.type = _or_none(action.type)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """The dataclasses' instances, from the command line and the file it names.

        Args:
            args: the words of the command line; by default the program's.
            return_remaining_strings: also return, at the end, the words nobody knows: of the file, then of the command
                line.
            fail_with_unknown_args: raise for unknown keys in the file, unless they are returned.
            separate_remaining_strings: return the two as two lists.

        Raises:
            ValueError: the file cannot be read, or has unknown keys.
        """
        words = list(sys.argv[1:] if args is None else args)
        path = _take_config(words)
        unknown = [] if path is None else self.set_defaults_with_config(**_read_config(path))
        parsed = self.parse_args_into_dataclasses(args=words, return_remaining_strings=return_remaining_strings)
        if return_remaining_strings:
            *instances, rest = parsed
            remaining = (unknown, rest) if separate_remaining_strings else (unknown + rest,)
            return (*instances, *remaining)
        if fail_with_unknown_args and unknown:
            names = ", ".join(repr(word.removeprefix("--")) for word in unknown[::2])
            raise ValueError(f"{path}: no argument is called {names}; remove or rename them.")
        return parsed

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Make these values the defaults, also of subparsers; what has one is no longer required.

        Returns:
            The values that no argument takes, as words of a command line: `--name`, then the value.
        """
        used = _set_defaults(self, kwargs)
        return [word for name, value in kwargs.items() if name not in used for word in (f"--{name}", str(value))]


TrlParser = ScriptParser


def _or_none(convert: type) -> Callable[[str], Any]:
    """`convert`, but "none" and "null" on the command line give None."""

    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    parse.__name__ = convert.__name__  # argparse's messages name it
    return parse


def _set_defaults(parser: argparse.ArgumentParser, values: dict[str, Any]) -> set[str]:
    """Give a parser's arguments these defaults; returns the names that were found."""
    used = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                used |= _set_defaults(subparser, values)
        elif action.dest in values:
            action.default = values[action.dest]
            action.required = False
            used.add(action.dest)
    return used


def _take_config(words: list[str]) -> str | None:
    """Remove `--config PATH` or `--config=PATH` from a command line, and return the path."""
    for index, word in enumerate(words):
        if word.startswith("--config="):
            return words.pop(index).removeprefix("--config=")
        if word == "--config":
            if index + 1 == len(words):
                raise ValueError("`--config` has no value; give the path of a YAML file.")
            del words[index]
            return words.pop(index)
    return None


def _read_config(path: str) -> dict[str, Any]:
    """The values in a YAML file; the environment variables under `env` are set."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`--config` is {path!r}, which cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{line}: no valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold `name: value` lines (a YAML mapping), but holds {config!r:.50}.")
    environment = config.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: `env` must be a mapping of environment variables, but is {environment!r:.50}.")
    for name, value in environment.items():
        os.environ[name] = str(value)
    return config
