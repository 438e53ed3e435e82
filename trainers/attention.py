"""Documents that stand in one row (packing, padding-free batches), kept apart.

A batch says where documents begin by `position_ids` that start at 0 there. How a model learns of it depends on its
attention: flash attention takes the cumulated lengths of one single row; the other backends take a block-diagonal mask,
which most architectures make from the positions themselves and the others are given (`tell_boundaries`). Whether a
model really keeps documents apart is not believed but proved, once, on a few random tokens (`prove_boundaries`):
convolutions and recurrent states, or an architecture that forgets about packing, would carry one document into the next
without any error.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate

POSITIONS, MASKS, LENGTHS = "positions", "masks", "lengths"  # ways to tell a model where documents begin

_LENGTH_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_RECURRENT_LAYERS = {"linear_attention", "conv", "recurrent", "mamba", "mamba2", "hybrid", "hybrid_sliding"}
_RECURRENT_MODELS = {"rwkv", "xlstm", "zamba", "zamba2"}  # which do not list their layers


def uses_flash_attention(config: PreTrainedConfig) -> bool:
    """Whether the model attends through a flash attention kernel, its own or one of the hub's."""
    return "flash" in str(config.get_text_config()._attn_implementation)


def has_recurrent_layers(config: PreTrainedConfig) -> bool:
    """Whether some layers carry a state from token to token: linear attention, Mamba, short convolutions."""
    config = config.get_text_config()
    layers = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    return bool(layers & _RECURRENT_LAYERS) or config.model_type in _RECURRENT_MODELS


def needs_one_row(config: PreTrainedConfig) -> bool:
    """Whether the kernels of a model keep documents apart only if all of a batch stand in one row."""
    return uses_flash_attention(config) or has_recurrent_layers(config)


def boundary_lengths(lengths: list[int]) -> dict[str, Any]:
    """What flash attention and recurrent kernels take for a single row of documents of these lengths, in tokens."""
    sizes = torch.tensor([length for length in lengths if length > 0], dtype=torch.int32)
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), sizes.cumsum(0).to(torch.int32)])
    longest = int(sizes.max())
    numbers = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)
    return dict(zip(_LENGTH_KEYS, (ends, ends, longest, longest, numbers[None])))


def tell_boundaries(inputs: Mapping[str, Any], way: str, model: Any) -> dict[str, Any]:
    """Inputs of a model that keep the documents of a batch apart.

    Args:
        inputs: `input_ids` and `position_ids`, (B, T), and what `boundary_lengths` returns if B is 1. A mask of
            padding is dropped: padding is a document of its own.
        way: POSITIONS, LENGTHS or MASKS.
        model: a `PreTrainedModel` or `PeftModel`, for which the masks are.
    """
    dropped = ("attention_mask", *(() if way == LENGTHS else _LENGTH_KEYS))
    told = {key: value for key, value in inputs.items() if key not in dropped}
    if way == MASKS:
        positions = inputs["position_ids"]
        dtype = model.get_input_embeddings().weight.dtype
        embeddings = torch.empty((), dtype=dtype, device=positions.device).expand(*positions.shape, 1)
        told["attention_mask"] = create_masks_for_generate(
            model.config, embeddings, None, None, position_ids=positions
        )
    return told


def one_document_a_row(position_ids: Tensor, *tensors: tuple[Tensor, float]) -> list[Tensor]:
    """Tensors of shape (B, T), with the D documents of a packed batch as rows: (D, length of the longest).

    Args:
        position_ids: (B, T), 0 where a document begins.
        tensors: each with what shall stand behind shorter documents.
    """
    positions = position_ids.flatten()
    document = (positions == 0).cumsum(0) - 1
    shape = (int(document[-1]) + 1, int(positions.max()) + 1)
    rows = []
    for tensor, fill in tensors:
        row = tensor.new_full(shape, fill)
        row[document, positions] = tensor.flatten()
        rows.append(row)
    return rows


def prove_boundaries(
    model: Any,
    setting: str,
    *,
    one_row: bool,
    context: AbstractContextManager | None = None,
    **forward_kwargs: Any,
) -> str:
    """The way to tell this model where documents begin, found by trying.

    A few random documents go through the model side by side. No gradient of a document's logits may reach another
    document's embeddings (a test that does not depend on the precision), and the logits must be those of the document
    alone.

    Args:
        model: whole, on its device; it may be a `PeftModel`.
        setting: the name of the setting that puts documents side by side, for the message.
        one_row: whether a batch's rows are joined to one.
        context: to run the model in, e.g. autocast.
        forward_kwargs: what the model is called with beside.

    Raises:
        ValueError: the model does not keep them apart, in whatever way it is told.
    """
    config = model.config
    ways = [LENGTHS] if one_row and needs_one_row(config) else [POSITIONS, MASKS]
    training = [module for module in model.modules() if module.training]
    model.eval()
    reasons = []
    try:
        with torch.enable_grad(), context or nullcontext():
            for way in ways:
                reasons.append(_mixing(model, way, one_row, forward_kwargs))
                if reasons[-1] is None:
                    return way
    finally:
        for module in training:
            module.training = True
    text = config.get_text_config()
    other = " or `router_aux_loss_coef=0`" if forward_kwargs.get("output_router_logits") else ""
    kernels = " or install kernels that take document boundaries" if has_recurrent_layers(config) else ""
    raise ValueError(
        f"`{setting}=True` puts several documents into one row, and {type(model).__name__} ({text.model_type}) with "
        f"`attn_implementation={text._attn_implementation!r}` does not keep them apart: {reasons[0]}; set "
        f"`{setting}=False`{other}{kernels}."
    )


def refuse_prompt_learning(model: Any, peft_config: Any, setting: str | None) -> None:
    """Raise if documents are put side by side (by `setting`) behind virtual tokens, which only the first would see."""
    configs = [peft_config, *getattr(model, "peft_config", {}).values()]
    config = next((config for config in configs if getattr(config, "is_prompt_learning", False)), None)
    if setting is not None and config is not None:
        raise ValueError(
            f"`{setting}=True` puts several documents into one row, and {type(config).__name__} puts its virtual tokens "
            f"before the first of them only; set `{setting}=False`, or use another adapter, such as LoRA."
        )


def refuse_unproved(config: PreTrainedConfig, setting: str, router_loss: bool) -> str:
    """The way to tell a model where documents begin that cannot be tried, because its weights are sharded.

    Raises:
        ValueError: whether this model keeps documents apart has to be tried.
    """
    if has_recurrent_layers(config) or (router_loss and not uses_flash_attention(config)):
        raise ValueError(
            f"`{setting}=True` with sharded weights needs an architecture that surely keeps documents apart, and "
            f"{config.get_text_config().model_type} with `attn_implementation="
            f"{config.get_text_config()._attn_implementation!r}` has to be tried first; set `{setting}=False`, or "
            "train without sharding."
        )
    return LENGTHS if uses_flash_attention(config) else MASKS


def _mixing(model: Any, way: str, one_row: bool, kwargs: dict[str, Any]) -> str | None:
    """How documents mix in a model that is told about them in this way; None if they do not."""
    config, layer = model.config, model.get_input_embeddings()
    device, dtype = layer.weight.device, layer.weight.dtype
    first, second, probed = _random_documents(config, (7, 5, 9))
    rows = [[first, probed, second, probed]] if one_row else [[first, probed, second], [second, probed, first]]
    ids = torch.stack([torch.cat(row) for row in rows]).to(device)
    positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows]).to(device)
    is_probed = torch.stack([torch.cat([torch.full_like(part, part is probed) for part in row]) for row in rows])
    is_probed = is_probed.bool().to(device)  # (B, T)
    inputs = {"input_ids": ids, "position_ids": positions}
    if one_row:
        lengths = boundary_lengths([len(part) for part in rows[0]])
        inputs |= {key: value.to(device) if isinstance(value, Tensor) else value for key, value in lengths.items()}
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models scale their embeddings in place

    kwargs = {**kwargs, "use_cache": False}
    handle = layer.register_forward_hook(keep)
    try:
        # A model spread over devices returns logits on another one.
        packed = (
            model(**tell_boundaries(inputs, way, model), **kwargs).logits.to(device)[is_probed].float()
        )  # (2 * 9, V)
        weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0)).to(device)
        (gradient,) = torch.autograd.grad((packed * weights).sum(), embeddings[0])
        alone = model(input_ids=probed[None].to(device), **kwargs).logits[0].detach().to(device).float()  # (9, V)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        first_sentence = str(error).strip().split("\n")[0].split(". ")[0]
        return f"it cannot be told where documents begin ({type(error).__name__}: {first_sentence[:200]})"
    finally:
        handle.remove()

    strength = gradient.float().abs().amax(-1)  # (B, T)
    if not strength[~is_probed].max() <= 1e-6 * strength[is_probed].max():
        return "the predictions in a document depend on the documents before it"
    # The same numbers by other shapes and kernels: they differ by rounding.
    exact = dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)
    tolerance = 1e-3 if exact and not uses_flash_attention(config) else 0.05
    size = (alone - alone.mean(-1, keepdim=True)).square().mean().sqrt()
    if not (packed - alone.repeat(2, 1)).square().mean().sqrt() <= tolerance * size:
        return "positions do not start anew with each document"
    return None


def _random_documents(config: PreTrainedConfig, lengths: tuple[int, ...]) -> list[Tensor]:
    """Documents of random ordinary tokens, the same each time and without a trace in the global random state."""
    text = config.get_text_config()
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    allowed = [token for token in range(min(text.vocab_size, 1000)) if token not in special]
    chosen = torch.randint(len(allowed), (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return list(torch.tensor(allowed)[chosen].split(lengths))
