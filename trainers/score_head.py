"""The score head of a model: whether it is new, has as many outputs as wanted, and is trained; what it said of a token."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification

logger = logging.getLogger(__name__)

HEADS = ("score", "classifier")  # what score heads are called


def base_model(model: Any) -> Any:
    """The model itself, without an adapter around it."""
    return model.get_base_model() if is_peft_model(model) else model


def head_is_new(config: PreTrainedConfig) -> bool:
    """Whether a model's checkpoint, if there is one, has no score head."""
    return not str((config.architectures or [""])[0]).endswith("ForSequenceClassification")


def head_is_trained(model: Any) -> bool:
    """Whether an adapter trains, and saves, the score head itself, not only something beside it."""
    return any(
        parameter.requires_grad and "lora_" not in name
        for name, parameter in model.named_parameters()
        if {*name.split(".")} & {*HEADS}
    )


def check_head(config: PreTrainedConfig, num_scores: int, built: bool) -> None:
    """Raise unless the model has, or will get, a head with as many outputs as scores are wanted."""
    if config.num_labels == num_scores or (not built and head_is_new(config)):
        return
    if built:
        raise ValueError(
            f"The model has `num_labels={config.num_labels}`, but `num_scores={num_scores}` scores are to be learned; "
            "pass its path instead, or load it with AutoModelForSequenceClassification and "
            f"`num_labels={num_scores}`."
        )
    raise ValueError(
        f"The checkpoint's score head has {config.num_labels} outputs, but `num_scores` is {num_scores}; set "
        f"`num_scores={config.num_labels}`, or start from a checkpoint without such a head."
    )


def train_new_head(peft_config: Any, config: PreTrainedConfig) -> Any:
    """The adapter's config, with the score head among the modules to train and save whole if it is new.

    Raises:
        ValueError: the adapter is for another kind of model.
    """
    task = getattr(peft_config, "task_type", None)
    task = getattr(task, "value", task)
    if task not in (None, "SEQ_CLS"):
        raise ValueError(
            f"`peft_config.task_type` is {task!r}, but a reward model classifies sequences; use 'SEQ_CLS'."
        )
    named = [*(getattr(peft_config, "modules_to_save", None) or [])]
    if task == "SEQ_CLS" or not hasattr(peft_config, "modules_to_save") or {*named} & {*HEADS}:
        return peft_config  # for this task, peft adds the head
    if head_is_new(config):
        logger.warning(
            "The score head is new, so 'score' was added to the adapter's `modules_to_save`: else it would stay at "
            "random, and would be drawn anew when the adapter is loaded."
        )
        peft_config = copy.copy(peft_config)
        peft_config.modules_to_save = [*named, "score"]
    return peft_config


@contextmanager
def new_head_expected() -> Iterator[None]:
    """No report about the language-model head that is dropped and the score head that is new."""
    names = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    old = {name: getattr(GenericForSequenceClassification, name, None) for name in names}
    for name, key in zip(names, (r"^score\.weight$", r"^lm_head\.")):
        setattr(GenericForSequenceClassification, name, [*(old[name] or []), key])
    try:
        yield
    finally:
        for name in names:
            setattr(GenericForSequenceClassification, name, old[name])


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """While open, what the module returns is kept."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()
