"""The reference policy: the model as it was when training began, which preference and RL methods measure against.

It is a frozen copy of the policy; or the policy itself with its adapter switched off (or back to what the adapter was);
or gone, once what it says about the data was computed before training.
"""

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher, generate_random_fingerprint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from outspoken.trainers.loading import is_quantized, load_model, model_id
from outspoken.trainers.setup import disable_dropout
from outspoken.trainers.sharding import local_part

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "ref"

# LoRA initialisations that take from the base weights what they put into the adapter.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


# ---------------------------------------------------------------------- making it


def make_reference(
    model: "PreTrainedModel | PeftModel",
    source: "str | PreTrainedModel | PeftModel",
    args: Any,
    quantization_config: Any = None,
) -> PreTrainedModel | None:
    """A frozen copy of the policy as it is now; None where an adapter of its own can be switched off instead.

    Of an adapter that was trained before and is handed in, a frozen copy is added to the model under the name "ref".
    The copy is made in memory, so that a model edited there is its own reference; only where that cannot work (ZeRO-3,
    quantized weights, a model spread over devices) it is loaded again from its path.

    Args:
        model: the policy, ready to train.
        source: what the user passed as the model.
        args: the trainer's config; read: `model_init_kwargs`, `trust_remote_code`, and `disable_dropout` if it has it.
        quantization_config: what the policy was loaded with.

    Raises:
        ValueError: the model can neither be copied nor loaded again.
    """
    if is_peft_model(model):
        config = model.peft_config[str(model.active_adapter)]
        changed_base = str(getattr(config, "init_lora_weights", "")).lower().startswith(_CHANGES_BASE)
        if changed_base or (not isinstance(source, str) and is_peft_model(source)):
            _add_reference_adapter(model)
        return None
    obstacle = _why_not_copied(model)
    if obstacle is None:
        reference = copy.deepcopy(model)
    else:
        path = model_id(source) or model_id(model)
        if not path:
            raise ValueError(
                f"The reference model cannot be copied from the policy, because {obstacle}, and the policy was not "
                "loaded from a path; pass the model as a path, or a `ref_model`."
            )
        init_kwargs = dict(args.model_init_kwargs or {})
        init_kwargs.setdefault("dtype", model.dtype)
        init_kwargs.setdefault("attn_implementation", model.config._attn_implementation)
        reference = load_model(
            path, init_kwargs, trust_remote_code=args.trust_remote_code, quantization_config=quantization_config
        )
    return freeze_reference(reference, args)


def given_reference(ref_model: "str | PreTrainedModel", model: "str | PreTrainedModel | PeftModel", args: Any) -> Any:
    """The reference model that the user passed, loaded if it is a path, and frozen.

    Raises:
        ValueError: it is the policy itself.
    """
    if ref_model is model and not isinstance(model, str):
        raise ValueError(
            "`ref_model` is the same object as `model`, so it would train along; leave it out to have a frozen copy."
        )
    reference: Any = ref_model
    if isinstance(ref_model, str):
        reference = load_model(ref_model, args.model_init_kwargs, trust_remote_code=args.trust_remote_code)
    return freeze_reference(reference, args)


def freeze_reference(reference: Any, args: Any) -> Any:
    """Put a reference model into evaluation mode, without gradients, dropout (if `args` say so) and router losses."""
    if getattr(args, "disable_dropout", False):
        disable_dropout(reference)
    config = reference.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    return reference.requires_grad_(False).eval()


def _why_not_copied(model: Any) -> str | None:
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "DeepSpeed ZeRO-3 has spread it over the processes"
    if is_quantized(model):
        return "it is quantized"
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        return "it is spread over several devices"
    return None


def _add_reference_adapter(model: Any) -> None:
    """Keep a frozen copy of the active adapter under the name "ref"; one that is there already stays."""
    active = model.active_adapter
    new = REFERENCE_ADAPTER not in model.peft_config
    if new:
        config = copy.deepcopy(model.peft_config[active])
        if str(getattr(config, "init_lora_weights", "")).lower().startswith(_CHANGES_BASE):
            config.init_lora_weights = True  # the base weights were changed once already
        model.add_adapter(REFERENCE_ADAPTER, config)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if new and active in parts:
            at = len(parts) - 1 - parts[::-1].index(active)
            copied = model.get_parameter(".".join([*parts[:at], REFERENCE_ADAPTER, *parts[at + 1 :]]))
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)
        elif REFERENCE_ADAPTER in parts:
            parameter.requires_grad_(False)


def prepare_reference(ref_model: Any, accelerator: Any, trainer: Any) -> Any:
    """A reference model as it runs beside the policy: on its device, in its precision, and sharded as it is.

    Under DeepSpeed it becomes an inference engine: sharded under ZeRO-3, else whole on every process. Under FSDP it is
    sharded like the policy.
    """
    if trainer.is_deepspeed_enabled:
        return _deepspeed_engine(ref_model, accelerator)
    if trainer.is_fsdp_enabled:
        if accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(accelerator, ref_model).eval()
        return accelerator.prepare_model(ref_model).eval()
    return accelerator.prepare_model(ref_model, evaluation_mode=True)


def _deepspeed_engine(model: Any, accelerator: Any) -> Any:
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    zero = config["zero_optimization"]
    # What only concerns training would make DeepSpeed build an optimizer over the frozen weights.
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    zero.pop("offload_optimizer", None)
    if zero["stage"] == 3:
        text_config = model.config.get_text_config()
        size = max(getattr(text_config, "hidden_sizes", None) or [getattr(text_config, "hidden_size", 0)])
        if size:
            zero["reduce_bucket_size"] = size * size
            zero["stage3_param_persistence_threshold"] = 10 * size
            zero["stage3_prefetch_bucket_size"] = int(0.9 * size * size)
    else:
        zero["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # which returns nothing
    return engine


# ---------------------------------------------------------------------- asking it


@contextmanager
def reference_policy(trainer: Any) -> Iterator[Any]:
    """While open, the model to call is the reference policy: no gradients, no dropout, no gradient checkpointing.

    >>> with reference_policy(trainer) as model:  # doctest: +SKIP
    ...     scores, _ = label_scores(model, inputs, labels, unwrapped=trainer.accelerator.unwrap_model(model))

    Raises:
        ValueError: the trainer holds no reference model, and its policy no adapter.
    """
    model = trainer.ref_model
    if model is None:
        model = trainer.model
        if not is_peft_model(trainer.accelerator.unwrap_model(model)):
            raise ValueError("No reference model is held, so its log-probabilities cannot be computed.")
    with as_reference(model, trainer.accelerator):
        yield model


@contextmanager
def as_reference(model: Any, accelerator: Any) -> Iterator[None]:
    """While open, a model computes what the reference would; afterwards it is as it was."""
    inner = accelerator.unwrap_model(model)
    adapter = reference_adapter(inner) if is_peft_model(inner) else nullcontext()
    # Layers that are not training neither drop out nor checkpoint, which without gradients would only waste time.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), adapter, accelerator.autocast():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def reference_adapter(model: "PeftModel") -> Iterator[None]:
    """While open, the model is its own reference: with the adapter "ref" if there is one, else without an adapter."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    active = model.active_adapter
    try:
        if REFERENCE_ADAPTER in model.peft_config:
            model.set_adapter(REFERENCE_ADAPTER)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if model.active_adapter != active:
            model.set_adapter(active)
        for name, parameter in model.named_parameters():  # switching adapters also switches what trains
            parameter.requires_grad_(name in trainable)


# ---------------------------------------------------------------------- asking it once, before training


def precompute(
    trainer: Any,
    dataset: Dataset,
    name: str,
    batch_size: int,
    score: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]],
    settings: Mapping[str, Any] | None = None,
) -> Dataset:
    """Add columns to a dataset that the reference policy computes, each row once.

    The columns of a dataset that lies on disk are kept in its cache, and found again by its fingerprint, the
    reference's weights, the collator and `settings`; so a second run over the same data need not compute them. The
    processes share the work.

    Without a reference model, and before training, the policy (its adapter switched) is the reference.

    Args:
        name: what the dataset is called on the progress bar.
        batch_size: rows per process at a time.
        score: `f(model, batch)` gives one number per row of the batch for each new column: {column: (B,)}.
        settings: whatever else the numbers depend on.

    Returns:
        The dataset with the new columns, in float32.

    Raises:
        ValueError: the dataset is a stream, or training has begun and no reference is held.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`precompute_ref_log_probs=True` needs rows that stay in place, but the {name} dataset is a stream; pass "
            "a datasets.Dataset, or set it to False."
        )
    if trainer.ref_model is None and trainer.state.global_step > 0 and not is_peft_model(trainer.model):
        raise ValueError(
            f"The reference is the model before training, which is not held under `precompute_ref_log_probs=True`, so "
            f"what it says about the {name} dataset cannot be computed after training began; pass that dataset as "
            "`eval_dataset` when the trainer is built, or pass a `ref_model`."
        )
    accelerator = trainer.accelerator
    model = trainer.ref_model if trainer.ref_model is not None else _untrained_policy(trainer)
    key = [_fingerprint(dataset, model, trainer, settings)]
    path = dataset._get_cache_file_path(key[0])
    # Folders for temporary files differ between processes, so the main process alone reads and writes.
    hit = [_read_columns(path) if accelerator.is_main_process else None]
    broadcast_object_list(hit)
    columns = hit[0]
    if columns is None:
        # A generator of its own keeps the global one, and so the training, the same whether or not there is a cache.
        loader = accelerator.prepare_data_loader(
            DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=trainer.data_collator,
                num_workers=trainer.args.dataloader_num_workers,
                pin_memory=trainer.args.dataloader_pin_memory,
                generator=torch.Generator(),
            )
        )
        parts: dict[str, list[Tensor]] = {}
        with as_reference(model, accelerator):
            quiet = trainer.args.disable_tqdm or not accelerator.is_main_process
            for batch in tqdm(loader, desc=f"Reference log-probabilities of the {name} dataset", disable=quiet):
                scored = accelerator.gather_for_metrics(score(model, batch))
                for column, values in scored.items():
                    parts.setdefault(column, []).append(values.float().cpu())
        columns = {column: torch.cat(values).numpy() for column, values in parts.items()}
        if accelerator.is_main_process:
            _write_columns(columns, path)
    return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)


def prepare_exactly(
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    inputs: Mapping[str, Any],
    columns: Collection[str],
    device: Any,
) -> dict[str, Any]:
    """`prepare(inputs)`, a trainer's way to move a batch to its device, but with these columns' values as they are.

    DeepSpeed rounds what is no integer to the precision of the weights, in which hundreds of nats are whole nats.
    """
    exact = {key: value for key, value in inputs.items() if key in columns}
    prepared = prepare({key: value for key, value in inputs.items() if key not in exact})
    return {**prepared, **{key: value.to(device) for key, value in exact.items()}}


def _untrained_policy(trainer: Any) -> Any:
    """The policy as it can be called before training, when it is not yet placed or sharded."""
    if trainer.model_wrapped is trainer.model and not getattr(trainer.model, "_is_accelerate_prepared", False):
        if trainer.is_deepspeed_enabled:
            return prepare_reference(trainer.model, trainer.accelerator, trainer)
        if trainer.is_fsdp_enabled:
            return prepare_reference(copy.deepcopy(trainer.model), trainer.accelerator, trainer)
    return trainer.model


def _fingerprint(dataset: Dataset, model: Any, trainer: Any, settings: Mapping[str, Any] | None) -> str:
    accelerator = trainer.accelerator
    inner = accelerator.unwrap_model(model)
    adapters = (REFERENCE_ADAPTER in inner.peft_config) if is_peft_model(inner) else None
    parts = (weights_hash(inner), adapters, accelerator.mixed_precision, dict(settings or {}))
    try:
        key = Hasher.hash((dataset._fingerprint, trainer.data_collator, parts))
    except Exception:  # a collator that cannot be pickled: compute anew
        key = generate_random_fingerprint()
    # The dataset's fingerprint and the part of the weights that a process holds may differ between the processes.
    keys = [key]
    broadcast_object_list(keys)
    return keys[0]


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types and values of all weights and buffers that this process holds."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        part = (local_part(tensor) if isinstance(tensor, nn.Parameter) else tensor).detach().cpu().contiguous()
        digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_columns(path: str) -> dict[str, Any] | None:
    if not os.path.exists(path):
        return None
    try:
        return Dataset.from_file(path).with_format("numpy")[:]
    except Exception as error:  # torn by a crash, or written by another version
        logger.warning(f"The cached reference log-probabilities in {path} cannot be read ({error}); computing anew.")
        return None


def _write_columns(columns: dict[str, Any], path: str) -> None:
    """As an Arrow file, complete or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    table = Dataset.from_dict(columns).data.table
    with ArrowWriter(path=temporary, schema=table.schema) as writer:
        writer.write_table(table)
        writer.finalize()
    os.replace(temporary, path)
