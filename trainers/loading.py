"""Getting a model, its tokenizer and its adapter ready: what every trainer does before it trains."""

import logging
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.utils import is_peft_available

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)


def model_id(model: "str | PreTrainedModel | PeftModel") -> str:
    """The path or hub name a model was loaded from; empty if it was built in memory."""
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")


def load_model(
    model: "str | PreTrainedModel | PeftModel",
    model_init_kwargs: dict[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    auto_class: Any = None,
) -> "PreTrainedModel | PeftModel":
    """Return the model to train: loaded, if a path or hub name is given, else the given one.

    A loaded model is float32 unless `model_init_kwargs["dtype"]` says otherwise: training in the checkpoint's bfloat16
    loses small updates. It is an instance of the class its config names; `auto_class` (e.g.
    `AutoModelForSequenceClassification`) overrides that.

    Args:
        model_init_kwargs: keyword arguments of `from_pretrained`. Ignored, with a warning, for a model already built.
        quantization_config: a `BitsAndBytesConfig`, as an argument of the trainer.

    Raises:
        ValueError: `dtype` is no dtype, or the quantization is given twice.
    """
    if not isinstance(model, str):
        for name, value in (("model_init_kwargs", model_init_kwargs), ("quantization_config", quantization_config)):
            if value is not None:
                logger.warning(f"`{name}` is ignored, because `model` is already built, not a path.")
        return model

    kwargs = dict(model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "`quantization_config` is set both as a trainer argument and in `model_init_kwargs`; "
                "keep the trainer argument only."
            )
        kwargs["quantization_config"] = quantization_config
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    kwargs["dtype"] = parse_dtype(kwargs.get("dtype", "float32"))
    if "device_map" not in kwargs or PartialState().num_processes > 1:
        single_gpu = PartialState().num_processes == 1 and PartialState().device.type not in ("cpu", "mps")
        kwargs["device_map"] = "auto" if single_gpu else None
    if auto_class is None:
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=kwargs["trust_remote_code"], revision=kwargs.get("revision")
        )
        auto_class = getattr(transformers, (config.architectures or [""])[0] or "", AutoModelForCausalLM)
    return auto_class.from_pretrained(model, **kwargs)


def parse_dtype(dtype: Any) -> Any:
    """`"bfloat16"`, `"float16"` and `"float32"` as `torch.dtype`; a `torch.dtype`, `"auto"` or None as it is."""
    if isinstance(dtype, torch.dtype) or dtype in ("auto", None):
        return dtype
    if dtype in ("bfloat16", "float16", "float32"):
        return getattr(torch, dtype)
    raise ValueError(
        f"`model_init_kwargs['dtype']` is {dtype!r}; use 'auto', 'bfloat16', 'float16', 'float32' or a torch.dtype."
    )


def config_of(
    model: "str | PreTrainedModel | PeftModel", model_init_kwargs: dict[str, Any] | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """A model's config, without its weights.

    Raises:
        ValueError: there is no model at this path.
    """
    if not isinstance(model, str):
        return model.config
    revision = (model_init_kwargs or {}).get("revision")
    if (model_init_kwargs or {}).get("gguf_file"):
        return AutoConfig.from_pretrained(model, gguf_file=model_init_kwargs["gguf_file"])  # type: ignore[index]
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"`model` is {model!r}, which is neither a folder with a model nor one on the hub that can be reached; "
            "check the path or name."
        ) from error


def refuse_unsupported_model(config: PreTrainedConfig, name: str, trainer: str, images: bool = False) -> None:
    """Raise for architectures that the trainer cannot train.

    Args:
        name: the model's class, for messages.
        images: whether the trainer can train models that take images.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{trainer} trains decoder-only language models, but {name} is an encoder-decoder; "
            "pass a causal language model."
        )
    takes = ["audio"] if getattr(config, "audio_config", None) is not None else []
    if getattr(config, "vision_config", None) is not None and not images:
        takes.insert(0, "images")
    if takes:
        raise ValueError(
            f"{trainer} cannot train {name}, which also takes {' and '.join(takes)}; pass its text-only causal "
            "language model."
        )


def load_processor(
    model: "str | PreTrainedModel | PeftModel",
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    config: PreTrainedConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trainer: str = "this trainer",
    images: bool = False,
) -> Any:
    """Return the tokenizer, or the processor of a model that takes images: the given one, or the one beside the model.

    Args:
        config: the model's, where `model` is a path.
        images: whether the trainer can train models that take images.

    Raises:
        ValueError: there is none beside the model.
        TypeError: `processing_class` is a processor, but the trainer takes text only, or it is neither.
    """
    if processing_class is None:
        path = model_id(model)
        if not path:
            raise ValueError(
                "`processing_class` is missing, and the model was not loaded from a path where a tokenizer could be; "
                "pass the model's tokenizer as `processing_class`."
            )
        auto_class: Any = AutoTokenizer
        config = config if config is not None or isinstance(model, str) else model.config
        if images and getattr(config, "vision_config", None) is not None:
            auto_class = AutoProcessor
        try:
            processing_class = auto_class.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"No tokenizer could be loaded from {path!r}; pass the model's tokenizer as `processing_class`."
            ) from error
    if isinstance(processing_class, ProcessorMixin):
        if not images:
            raise TypeError(
                f"`processing_class` is a {type(processing_class).__name__}, but {trainer} trains text models only; "
                "pass its tokenizer, `processing_class.tokenizer`."
            )
    elif not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"`processing_class` must be a tokenizer, got {type(processing_class).__name__}.")
    return processing_class


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """The tokenizer: the processor's, or itself if it is one."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def set_eos_token(tokenizer: PreTrainedTokenizerBase, eos_token: str) -> None:
    """Make `eos_token` the token that ends a turn; `tell_model` tells the model.

    Raises:
        ValueError: the vocabulary does not have it.
    """
    if eos_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`eos_token` is {eos_token!r}, which is not in the vocabulary of the {type(tokenizer).__name__}; "
            "name a token it has, or add it to the tokenizer and resize the model's embeddings first."
        )
    tokenizer.eos_token = eos_token


def set_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None) -> int:
    """Give the tokenizer a padding token and return its id.

    It is the given one, else the tokenizer's own, else its end-of-sequence token.

    Raises:
        ValueError: there is none, or the vocabulary does not have it.
    """
    chosen = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if chosen is None:
        raise ValueError(
            "The tokenizer has neither a padding nor an end-of-sequence token; set `tokenizer.pad_token` before "
            "passing it as `processing_class`."
        )
    if chosen not in tokenizer.get_vocab():
        raise ValueError(
            f"`pad_token` is {chosen!r}, which is not in the vocabulary of the {type(tokenizer).__name__}; "
            "name a token it has."
        )
    tokenizer.pad_token = chosen
    return tokenizer.pad_token_id


def tell_model(model: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase, eos: bool = False) -> None:
    """Make the model's configs agree with the tokenizer on the padding token, and with `eos` on the end of a turn.

    Generation keeps stopping at the tokens it stopped at before.
    """
    config = model.config.get_text_config()
    config.pad_token_id = tokenizer.pad_token_id
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.pad_token_id = tokenizer.pad_token_id
    if not eos:
        return
    config.eos_token_id = tokenizer.eos_token_id
    if generation_config is not None:
        old = generation_config.eos_token_id
        old = [] if old is None else [old] if isinstance(old, int) else list(old)
        if tokenizer.eos_token_id not in old:
            generation_config.eos_token_id = [tokenizer.eos_token_id, *old]


def is_quantized(model: "PreTrainedModel | PeftModel") -> bool:
    """Whether the weights were loaded in 4 or 8 bits by bitsandbytes."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def wrap_with_peft(
    model: "PreTrainedModel | PeftModel",
    peft_config: "PeftConfig | None",
    args: TrainingArguments,
    added_tokens: list[int] | None = None,
) -> "PreTrainedModel | PeftModel":
    """Put a fresh adapter on the model if `peft_config` is given, and make an adapted model ready to train.

    Under gradient checkpointing the frozen embeddings' outputs get a gradient, without which no gradient would reach
    the adapter. Adapters of a quantized model are kept in bfloat16 (QLoRA, arXiv 2305.14314), DoRA's magnitude vectors
    excepted: bfloat16 would round their updates away.

    Args:
        added_tokens: ids of tokens new to the vocabulary, whose embeddings must train beside the adapter.

    Raises:
        ImportError: peft is not installed.
        TypeError: `peft_config` is not a `PeftConfig`.
        ValueError: the model already is a `PeftModel`.
    """
    quantized = is_quantized(model)
    if peft_config is not None:
        if not is_peft_available():
            raise ImportError("`peft_config` needs the package `peft`; install it with `pip install peft`.")
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"`peft_config` must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}."
            )
        if is_peft_model(model):
            raise ValueError(
                "`peft_config` is given, but the model already is a PeftModel; drop `peft_config`, or merge the "
                "adapter first with `model.merge_and_unload()`."
            )
        if added_tokens:
            _train_added_tokens(peft_config, added_tokens)
        model = get_peft_model(model, peft_config)
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    if quantized:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _train_added_tokens(peft_config: Any, added_tokens: list[int]) -> None:
    """Let the embeddings of new tokens, and the output head that must learn to produce them, train."""
    indices = dict(peft_config.trainable_token_indices or {})
    indices["embed_tokens"] = [*indices.get("embed_tokens", []), *added_tokens]
    peft_config.trainable_token_indices = indices
    if "lm_head" not in (peft_config.modules_to_save or []):
        logger.warning(
            "The chat template brought new tokens; 'lm_head' was added to the adapter's `modules_to_save`, so that "
            "the model can learn to produce them."
        )
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), "lm_head"]
