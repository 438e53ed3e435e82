"""What a trainer does before its method begins and around it, whatever the method: arguments, model, logging."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed
from transformers.utils import is_liger_kernel_available

from outspoken.trainers.data.chat_templates import fit_embeddings, set_chat_template
from outspoken.trainers.loading import (
    config_of,
    load_model,
    load_processor,
    refuse_unsupported_model,
    set_eos_token,
    set_pad_token,
    tell_model,
    tokenizer_of,
    wrap_with_peft,
)

if TYPE_CHECKING:
    from peft import PeftModel

AnyDataset: TypeAlias = Dataset | IterableDataset
Datasets: TypeAlias = AnyDataset | dict[str, AnyDataset] | None


@dataclass
class Processing:
    """What turns text into a model's input.

    Attributes:
        processor: the tokenizer, or the processor of a model that also takes images.
        tokenizer: the tokenizer, whichever `processor` is.
        pad_token_id: the id that fills up short rows.
        new_tokens: tokens that came with a chat template, for which the model has to make room; None if no template
            was copied.
    """

    processor: Any
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    new_tokens: list[str] | None = None


def check_datasets(train_dataset: Any, eval_dataset: Any, args: Any) -> None:
    """Raise unless both are datasets; make streams work with several processes.

    Raises:
        ValueError, TypeError: one is missing or something else.
    """
    for argument, dataset in datasets_by_argument(train_dataset, eval_dataset).items():
        check_dataset_type(dataset, argument)
    if getattr(args, "precompute_ref_log_probs", False):
        for name, dataset in {"train": train_dataset, **named_datasets(eval_dataset, "eval")}.items():
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"`precompute_ref_log_probs=True` needs rows that stay in place, but the {name} dataset is a stream; "
                    "pass a datasets.Dataset, or set it to False."
                )
    if isinstance(train_dataset, IterableDataset):
        # Batches of a stream differ in length, which Accelerate cannot dispatch from one process to the others.
        args.accelerator_config.dispatch_batches = False
        if args.max_steps <= 0:
            raise ValueError(
                f"`max_steps` is {args.max_steps}, but a streamed `train_dataset` has no length; set `max_steps` to "
                "the number of update steps to train for."
            )


def datasets_by_argument(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """All datasets by what they are as arguments: `train_dataset`, and `eval_dataset` or `eval_dataset['name']`."""
    evaluated = {
        f"eval_dataset[{name!r}]" if isinstance(eval_dataset, dict) else "eval_dataset": dataset
        for name, dataset in named_datasets(eval_dataset, "eval").items()
    }
    return {"train_dataset": train_dataset, **evaluated}


def check_dataset_type(dataset: Any, argument: str) -> None:
    """Raise unless `dataset` is a `Dataset` or `IterableDataset`."""
    if dataset is None:
        raise ValueError(f"`{argument}` is missing; pass a datasets.Dataset.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"`{argument}` must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}; "
            "datasets.Dataset.from_list makes one of a list of rows."
        )


def named_datasets(datasets: Datasets, name: str) -> dict[str, AnyDataset]:
    """One dataset as `{name: dataset}`, several as they are, none as an empty dict."""
    if datasets is None:
        return {}
    return datasets if isinstance(datasets, dict) else {name: datasets}


def map_datasets(datasets: Datasets, name: str, prepare: Callable[[AnyDataset, str], AnyDataset]) -> Any:
    """`prepare(dataset, name)` of one dataset or of each in a dict; None stays None."""
    prepared = {key: prepare(dataset, key) for key, dataset in named_datasets(datasets, name).items()}
    return prepared if isinstance(datasets, dict) else prepared.get(name)


def prepare_processing(
    model: "str | PreTrainedModel | PeftModel",
    args: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    *,
    trainer: str,
    images: bool = False,
) -> Processing:
    """The tokenizer as `args` say, before the weights are loaded: so wrong data is told without waiting for them.

    Read from `args`, where it has them: `model_init_kwargs`, `trust_remote_code`, `eos_token`, `chat_template_path`,
    `pad_token`.

    Args:
        trainer: the trainer's class name, for messages.
        images: whether the trainer can train models that take images.

    Raises:
        ValueError, TypeError: in one sentence, what is wrong with the model or the tokenizer, and what to do.
    """
    config = config_of(model, args.model_init_kwargs, args.trust_remote_code)
    name = (config.architectures or [config.model_type])[0] if isinstance(model, str) else type(model).__name__
    refuse_unsupported_model(config, name, trainer, images)
    processor = load_processor(
        model,
        processing_class,
        config=config,
        revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
        trust_remote_code=args.trust_remote_code,
        trainer=trainer,
        images=images,
    )
    tokenizer = tokenizer_of(processor)
    if getattr(args, "eos_token", None) is not None:
        set_eos_token(tokenizer, args.eos_token)
    new_tokens = None
    if getattr(args, "chat_template_path", None) is not None:
        new_tokens = set_chat_template(tokenizer, args.chat_template_path)
    if processor is not tokenizer:  # both have a template; the trainer may ask either
        if getattr(args, "chat_template_path", None) is None and processor.chat_template is not None:
            tokenizer.chat_template = processor.chat_template
        processor.chat_template = tokenizer.chat_template
    return Processing(processor, tokenizer, set_pad_token(tokenizer, getattr(args, "pad_token", None)), new_tokens)


def prepare_model(
    model: "str | PreTrainedModel | PeftModel",
    args: Any,
    processing: Processing,
    *,
    peft_config: Any = None,
    quantization_config: Any = None,
    auto_class: Any = None,
    **load_kwargs: Any,
) -> Any:
    """Load the model as `args` say, make it agree with its tokenizer, and put the adapter on.

    Read from `args`, where it has them: `seed`, `model_init_kwargs`, `trust_remote_code`, `eos_token`,
    `disable_dropout`, `gradient_checkpointing`.

    Args:
        auto_class: class to load a path with; by default the one that the model's config names.
        load_kwargs: further keyword arguments of `from_pretrained`, stronger than `args.model_init_kwargs`.
    """
    set_seed(args.seed)  # new weights, of an adapter or a score head, are drawn at random
    init_kwargs = args.model_init_kwargs
    if isinstance(model, str) and load_kwargs:
        init_kwargs = {**(init_kwargs or {}), **load_kwargs}
    loaded: Any = load_model(
        model,
        init_kwargs,
        trust_remote_code=args.trust_remote_code,
        quantization_config=quantization_config,
        auto_class=auto_class,
    )
    added_tokens = []
    if processing.new_tokens is not None:
        added_tokens = fit_embeddings(loaded, processing.tokenizer, processing.new_tokens)
    tell_model(loaded, processing.tokenizer, eos=getattr(args, "eos_token", None) is not None)
    loaded = wrap_with_peft(loaded, peft_config, args, added_tokens)
    if getattr(args, "disable_dropout", False):
        disable_dropout(loaded)
    return loaded


def prepare_liger(args: Any) -> None:
    """Let Liger replace the model's layers, not its loss, which the trainers compute themselves.

    Raises:
        ImportError: `use_liger_kernel` is set, but the package is not installed.
        ValueError: `liger_kernel_config` asks for the fused loss.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise ImportError(
            "`use_liger_kernel=True` needs the package liger-kernel and a GPU; install it with `pip install "
            "liger-kernel`, or set it to False."
        )
    config = args.liger_kernel_config or {}
    if config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "`liger_kernel_config` has 'fused_linear_cross_entropy': True, which would replace the loss that the "
            "trainer computes without full logits anyway; remove it."
        )
    args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: of the dropout layers, and what modules keep as a number (`attention_dropout`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def finish_setup(trainer: Any, method: str) -> None:
    """What is left to do once `Trainer.__init__` has run: refuse what cannot work, and attach the diagnostics.

    Args:
        method: the tag that a model trained so gets, e.g. "sft".
    """
    refuse_parallelism(trainer)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    if hasattr(trainer.model, "add_model_tags"):
        trainer.model.add_model_tags(["outspoken", method])
    if trainer.args.diagnose:
        from outspoken.diagnostics.callback import DiagnosticsCallback

        present = [c for c in trainer.callback_handler.callbacks if isinstance(c, DiagnosticsCallback)]
        observer = present[0] if present else DiagnosticsCallback()
        if not present:
            trainer.add_callback(observer)
        observer.attach(trainer)


def refuse_parallelism(trainer: Any) -> None:
    """Raise for ways to spread a model over devices that the trainers do not support."""
    name = type(trainer).__name__
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs are visible to one process, which {name} cannot use; launch with "
            "`accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"`parallelism_config` splits sequences over processes, which {name} does not support; set its "
            "`cp_size` and `sp_size` to 1."
        )


def set_up_router_loss(model: Any, coef: float | None) -> float:
    """Switch the load-balancing loss of a mixture of experts on or off, in the model's config too; return its weight.

    Args:
        coef: the weight asked for; None means what the model's config says. 0 for models that have no such loss.

    Raises:
        ValueError: a weight is asked for, but the model has no such loss.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coef:
            raise ValueError(
                f"`router_aux_loss_coef={coef}` needs a mixture-of-experts model that returns its router's "
                f"logits, which {type(model).__name__} does not; leave it unset."
            )
        return 0.0
    weight = getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = weight != 0.0
        config.router_aux_loss_coef = weight
    return weight


def add_metrics(trainer: Any, logs: dict[str, Any], *, skip_nan: bool = False) -> None:
    """Add the means of what `trainer._metrics` collected since the last log, `eval_` in front in evaluation.

    Of several evaluation datasets they also get their dataset's name, `eval_<name>_`, as `eval_<name>_loss` has it: so
    that `metric_for_best_model` can name one.

    Args:
        skip_nan: whether values that are no numbers count as missing; without any other the mean is None. Unset: they
            show.
    """
    mode = "train" if trainer.model.training else "eval"
    prefixes = [""]
    if mode == "eval":
        own = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
        prefixes = [f"{prefix}_" for prefix in dict.fromkeys(("eval", own))]
    for name, values in trainer._metrics[mode].items():
        known = [value for value in values if not math.isnan(value)] if skip_nan else values
        mean = sum(known) / len(known) if known else None
        logs.update({f"{prefix}{name}": mean for prefix in prefixes})
    trainer._metrics[mode].clear()


def parse_pad_to_multiple_of(value: int | str | None) -> int | None:
    """`pad_to_multiple_of` of a config as a number, or None: 'auto' and 'none' do not pad.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str):
        return value
    text = value.lower()
    if text not in ("auto", "none", "null") and not text.isdecimal():
        raise ValueError(f"`pad_to_multiple_of` is {text!r}; use a number of tokens, 'auto' or 'none'.")
    return int(text) if text.isdecimal() else None
