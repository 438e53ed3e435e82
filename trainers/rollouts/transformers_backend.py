"""Sampling completions with the model that is trained: Outspoken's own sampler, and `model.generate` for what it leaves.

The own sampler passes each distinct prompt through the model once, keeps its keys and values once for all of its
completions (`kv_cache.py`), and drops completions from the batch as they end.

Axes: `B` distinct prompts, `N` rows, one completion each, `P` prompt tokens, `V` vocabulary.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from outspoken.trainers.attention import has_recurrent_layers
from outspoken.trainers.rollouts.batch import Sampled, pad_ids
from outspoken.trainers.rollouts.kv_cache import (
    Groups,
    SharedPromptCache,
    attending,
    new_cache,
    share_prompts,
    why_not_cached,
)
from outspoken.trainers.rollouts.packed_linear import packed_linears
from outspoken.trainers.rollouts.sampling import SamplingParams, folded
from outspoken.trainers.sharding import is_sharded, unwrapped

# Tokens of prompts that go through the model at a time, and how much of them may be padding.
PREFILL_TOKENS = 2**13
MAX_PADDING = 0.2
# Rows that ended are dropped once they are this share of the batch.
ENDED_SHARE = 1 / 8
# Weights are laid out for sampling (`packed_linear.py`) where a completion may have so many tokens.
PACK_FROM = 32
# So many likeliest tokens are sorted first on a CPU, and all only where they are not enough for `top_p`.
SORT_FIRST = 512

# Fields of `GenerationConfig` that the own sampler leaves to transformers' logits processors.
_PROCESSED = {
    "begin_suppress_tokens",
    "bad_words_ids",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "remove_invalid_values",
    "renormalize_logits",
    "sequence_bias",
    "suppress_tokens",
    "top_h",
    "typical_p",
}
# Fields that change nothing here: whatever they say, or with the values given.
_IGNORED = {"bos_token_id", "compile_config", "disable_compile", "max_length", "pad_token_id"}
_NEUTRAL = {
    "cache_implementation": "dynamic",
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
}


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those the model declares (an end-of-turn token, say) and the tokenizer's."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [tokenizer.eos_token_id, *ids]
    return ids


def cut_after_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    """The tokens up to and with the first EOS token, or all of them if there is none."""
    for position, token in enumerate(ids):
        if token in eos_ids:
            return ids[: position + 1]
    return ids


# ------------------------------------------------------------------------------------------------- what is called


def sample(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
    caps: Sequence[int] | None = None,
    max_batch_tokens: int | None = None,
    cache_implementation: str | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    synced: Callable[[bool], bool] | None = None,
) -> Sampled:
    """Sample a completion for each prompt; a prompt that occurs G times gets G of them.

    The model samples in evaluation mode (no dropout, and keys and values are kept even where training recomputes
    activations) and is left in the mode it came in. Autocast is the caller's business.

    Args:
        model: what is called for a forward pass; a wrapper for distributed training is looked into for the rest.
        prompt_ids: token ids of each prompt.
        params: how to sample.
        tokenizer: it decodes what is looked through for `params.stop`.
        caps: most new tokens for each prompt; None: `params.max_new_tokens` for all.
        max_batch_tokens: most tokens, prompts' and completions', whose keys and values are kept at a time; prompts
            beyond are sampled for one batch after another. None: no bound.
        cache_implementation: what `model.generate` is to use; None or "dynamic" for the own sampler.
        model_inputs: further arguments of the model, such as images, aligned with the prompts.
        synced: for models whose weights are spread over processes, which have to call the model in step: it tells the
            others whether this process is unfinished and returns whether any is. A finished one keeps calling the
            model on a dummy.

    Raises:
        ValueError: a prompt is empty, or `params` asks for what does not exist.
    """
    params = _settled(params, prompt_ids, caps)
    limits = [params.max_new_tokens] * len(prompt_ids) if caps is None else list(caps)
    if max_batch_tokens is not None and max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens is {max_batch_tokens}; choose 1 or more, or None for no bound.")
    more = bool(model_inputs)
    if synced is not None:
        more = synced(more)  # all processes go the same way
    reason = "the model gets more than tokens" if more else None
    if cache_implementation not in (None, "dynamic"):
        reason = f"cache_implementation is {cache_implementation!r}"
    with _evaluation(model, synced):
        reason = reason or _why_not(model, params, synced)
        if reason is not None:
            return _sample_by_generate(
                model, prompt_ids, params, tokenizer, limits, cache_implementation, model_inputs or {}, synced
            )
        run = _Run(model, params, tokenizer, synced)
        found = _Found.of(len(prompt_ids))
        pack = packed_linears(unwrapped(model)) if max(limits, default=0) >= PACK_FROM else contextlib.nullcontext()
        with pack:
            for rows in _batches(prompt_ids, limits, max_batch_tokens):
                _sample_batch(run, prompt_ids, limits, rows, found)
        if synced is not None:
            while synced(False):
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=run.device), use_cache=False)
    return Sampled(found.ids, found.finished, found.logps, found.entropies)


def why_not_own_sampler(model: nn.Module, params: SamplingParams) -> str | None:
    """Why these completions are sampled with `model.generate` instead, in a phrase; None if they are not.

    A model that passes by its config is tried once: a few tokens are sampled, and its logits must be those of a plain
    pass. So a model of someone else's that goes its own ways with caches or attention is found out.

    Raises:
        ValueError: `params` asks for what does not exist.
    """
    with _evaluation(model, None):
        return _why_not(model, _settled(params, [], None), None)


# ---------------------------------------------------------------------------------------------- what is asked for


def _settled(
    params: SamplingParams, prompt_ids: Sequence[Sequence[int]], caps: Sequence[int] | None
) -> SamplingParams:
    """The settings with what `extra` says about their fields, checked."""
    params = folded(params)
    extra = {name: value for name, value in params.extra.items() if value is not None}
    known = vars(GenerationConfig())
    for name in extra:
        if name not in known or name.startswith("_"):
            raise ValueError(f"{name!r} is no setting of sampling with transformers; see its `GenerationConfig`.")
    params = replace(params, extra=extra)
    if extra.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"num_return_sequences is {extra['num_return_sequences']}; a prompt gets as many completions as it occurs."
        )
    checks: tuple[tuple[str, Any, bool, str], ...] = (
        ("max_new_tokens", params.max_new_tokens, params.max_new_tokens >= 0, "0 or more"),
        ("temperature", params.temperature, params.temperature >= 0, "0 (the likeliest token) or more"),
        ("top_p", params.top_p, 0 <= params.top_p <= 1, "a share between 0 and 1"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (all tokens) or more"),
        ("min_p", params.min_p, params.min_p is None or 0 <= params.min_p <= 1, "a share between 0 and 1"),
        ("repetition_penalty", params.repetition_penalty, params.repetition_penalty > 0, "more than 0"),
    )
    for name, value, fine, choice in checks:
        if not fine:
            raise ValueError(f"{name} is {value}; choose {choice}.")
    if "" in params.stop:
        raise ValueError("stop contains an empty text, which would end every completion; leave it out.")
    for row, ids in enumerate(prompt_ids):
        if len(ids) == 0:
            raise ValueError(f"prompt_ids[{row}] is empty; give each prompt a token at least, such as the BOS token.")
    if caps is not None and len(caps) != len(prompt_ids):
        raise ValueError(f"caps has {len(caps)} entries for {len(prompt_ids)} prompts; give one to each prompt.")
    return params


_trials: "weakref.WeakKeyDictionary[nn.Module, str | None]" = weakref.WeakKeyDictionary()


def _why_not(model: nn.Module, params: SamplingParams, synced: Callable[[bool], bool] | None) -> str | None:
    for name, value in params.extra.items():
        if name not in _PROCESSED | _IGNORED and _NEUTRAL.get(name) != value:
            return f"{name} is {value!r}"
    inner: Any = unwrapped(model)
    if is_peft_model(inner) and inner.active_peft_config.is_prompt_learning:
        return "the adapter puts virtual tokens in front"
    base = _base(inner)
    if base.config.is_encoder_decoder:
        return "the model has an encoder"
    if has_recurrent_layers(base.config):
        return "some of its layers carry a state from token to token"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} has attention of its own"
    if not {"position_ids", "past_key_values"} <= inspect.signature(base.forward).parameters.keys():
        return f"{type(base).__name__} takes no position ids or no cache"
    if (reason := why_not_cached(base.config)) is not None:
        return reason
    if inner not in _trials:
        _trials[inner] = _why_not_by_trial(model, synced)
    return _trials[inner]


def _why_not_by_trial(model: nn.Module, synced: Callable[[bool], bool] | None) -> str | None:
    """Compare the logits of a few tokens sampled here with those of plain passes."""
    run = _Run(model, SamplingParams(max_new_tokens=4), None, synced)
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    rows = torch.randint(run.vocabulary, (4, 9), generator=generator)
    rows[1, :3], rows[3, :5] = rows[0, :3], rows[2, :5]
    lengths = (3, 3, 5, 5)
    try:
        plain = [
            run.call(input_ids=row[None, : length + 4].to(run.device), use_cache=False).logits[0, length - 1 :]
            for row, length in zip(rows, lengths)
        ]
        prompts = [rows[0, :3].tolist(), rows[2, :5].tolist()]
        logits, cache = _prefill(run, prompts, Groups.of([0, 0, 1, 1], 2, run.device), 4)
        steps = [logits[[0, 0, 1, 1]]]
        for step in range(4):
            tokens = torch.stack([row[length + step] for row, length in zip(rows, lengths)]).to(run.device)
            position = torch.tensor([length + step for length in lengths], device=run.device)
            steps.append(_step(run, cache, tokens, position))
    except Exception as error:  # whatever a model of someone else's does with a cache it was not made for
        return (
            f"it fails with a cache that shares prompts ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
        )
    wanted, found = torch.stack(plain).float(), torch.stack(steps, 1).float()
    # The mean forgives one token that a router sends elsewhere for a rounding error.
    difference = (wanted - found).norm(dim=-1).mean() / wanted.norm(dim=-1).mean()
    precise = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    precise &= not torch.is_autocast_enabled(run.device.type)
    tolerance = 5e-2 if not precise else 1e-4 if run.device.type == "cpu" else 3e-3
    if not difference <= tolerance:
        return f"its logits would differ by {float(difference):.1e} of their size"
    return None


def _base(model: Any) -> Any:
    """The `PreTrainedModel` that a PEFT model adapts, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


@contextlib.contextmanager
def _evaluation(model: nn.Module, synced: Callable[[bool], bool] | None) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device.type
    # Weights gathered or cast within inference mode could not be used in training afterwards.
    plain = synced is not None or is_sharded(model) or torch.is_autocast_enabled(device)
    model.eval()
    try:
        with torch.no_grad() if plain else torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------------ the own sampler


class _Run:
    """What stays the same while one call samples."""

    def __init__(
        self,
        model: nn.Module,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerBase | None,
        synced: Callable[[bool], bool] | None,
    ):
        self.model, self.params, self.tokenizer, self.synced = model, params, tokenizer, synced
        self.base = _base(unwrapped(model))
        self.config = self.base.config
        self.vocabulary: int = self.config.get_text_config().vocab_size
        self.device = next(model.parameters()).device
        self.keeps_last = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self.pad_id = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.ends = torch.tensor(params.end_ids, dtype=torch.long, device=self.device)
        self.generator = None
        if params.seed is not None:
            self.generator = torch.Generator(self.device).manual_seed(params.seed)

    def call(self, **inputs: Any) -> Any:
        """A forward pass, in step with the other processes."""
        if self.synced is not None:
            self.synced(True)
        return self.model(**inputs)

    def last_logits(self, **inputs: Any) -> Tensor:
        """Logits after the last token of each row, (rows, V)."""
        kept = {"logits_to_keep": 1} if self.keeps_last else {}
        return self.call(**inputs, **kept, use_cache=True).logits[:, -1]


@dataclass
class _Found:
    """What was sampled, by row; the lists of `Sampled`."""

    ids: list[list[int]]
    finished: list[bool]
    logps: list[list[float]]
    entropies: list[list[float]]

    @classmethod
    def of(cls, rows: int) -> "_Found":
        return cls([[] for _ in range(rows)], [False] * rows, [[] for _ in range(rows)], [[] for _ in range(rows)])


def _batches(prompt_ids: Sequence[Sequence[int]], caps: Sequence[int], most: int | None) -> list[list[int]]:
    """The rows that are sampled together: those of equal prompts side by side, shorter prompts first.

    Rows that may not have a token are left out; rows of one prompt stay together unless they alone are too many.
    """
    rows = sorted(
        (row for row, cap in enumerate(caps) if cap > 0), key=lambda row: (len(prompt_ids[row]), *prompt_ids[row])
    )
    if most is None:
        return [rows] if rows else []
    batches: list[list[int]] = []
    room = 0
    for group in _runs(rows, lambda row: tuple(prompt_ids[row])):
        length, whole = len(prompt_ids[group[0]]), sum(caps[row] for row in group)
        if length + whole > room and batches and batches[-1]:
            batches.append([])
            room = most
        if not batches:
            batches.append([])
            room = most
        used = length
        for row in group:
            if batches[-1] and used + caps[row] > room:
                batches.append([])
                room, used = most, length
            batches[-1].append(row)
            used += caps[row]
        room -= used
    return batches


def _runs(rows: Sequence[int], key: Callable[[int], Any]) -> list[list[int]]:
    """The rows in runs of equal key."""
    groups: list[list[int]] = []
    last: Any = None
    for row in rows:
        if groups and key(row) == last:
            groups[-1].append(row)
        else:
            groups.append([row])
            last = key(row)
    return groups


def _sample_batch(
    run: _Run, prompt_ids: Sequence[Sequence[int]], caps: Sequence[int], rows: list[int], found: _Found
) -> None:
    """Sample for these rows of the call, side by side where their prompts are equal, and write down what came of it."""
    params, device = run.params, run.device
    groups = _runs(rows, lambda row: tuple(prompt_ids[row]))
    prompts = [list(prompt_ids[group[0]]) for group in groups]
    owners = [number for number, group in enumerate(groups) for _ in group]
    most = max(caps[row] for row in rows)
    logits, cache = _prefill(run, prompts, Groups.of(owners, len(prompts), device), most)
    batch = _Batch(run, prompts, owners, [caps[row] for row in rows], cache, logits.size(-1))
    logits = logits[batch.owner]

    stops = _StopTexts(run.tokenizer, params.stop, [prompts[owner] for owner in owners]) if params.stop else None
    drawn: list[tuple[Tensor, ...]] = []  # of each step: the rows' slots, tokens, log-probabilities and entropies
    lengths, finished = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.bool)
    for step in range(most):
        tokens, logps, entropies = _next_tokens(logits, params, batch.scores(logits), run.generator)
        drawn.append((batch.slot, tokens, logps, entropies))
        by_itself = (tokens[:, None] == run.ends).any(1)
        if stops is not None:
            by_itself |= stops.completed_by(batch.slot.tolist(), tokens.tolist(), device)
        ended = by_itself & batch.alive
        if step + 1 >= batch.next_cap:
            ended |= (batch.cap <= step + 1) & batch.alive
        if bool(ended.any()):
            slots = batch.slot[ended].cpu()
            lengths[slots], finished[slots] = step + 1, by_itself[ended].cpu()
            batch.end(ended)
        if not batch.running:
            break
        batch.add(tokens)
        if len(tokens) - batch.running >= max(1.0, ENDED_SHARE * len(tokens)):
            tokens = tokens[batch.drop_ended()]
        logits = _step(run, cache, tokens, batch.position + step)

    slot, *values = (torch.cat(of_steps).cpu() for of_steps in zip(*drawn))
    column = torch.arange(len(drawn)).repeat_interleave(torch.tensor([len(slots) for slots, *_ in drawn]))
    for number, value in enumerate(values):
        table = value.new_zeros(len(rows), len(drawn))
        table[slot, column] = value
        for row, length, of_row in zip(rows, lengths.tolist(), table.tolist()):
            (found.ids, found.logps, found.entropies)[number][row] = of_row[:length]
    for row, by_itself_at_last in zip(rows, finished.tolist()):
        found.finished[row] = by_itself_at_last


class _Batch:
    """The rows that are sampled at a time, each array in the order in which they stand in the batch.

    Attributes:
        slot: the row's number before any was dropped. owner: its prompt. cap: most tokens it may have. position: of its
            first token. All (n,).
        alive: whether it goes on, (n,); `running` of them do, the first to be cut after `next_cap` tokens.
        seen: the tokens that the repetition penalty is for, (n, V); None without it.
        processors: transformers' logits processors, if the settings need them, for each length of a prompt.
        history: prompts and completions, for the processors, (n, P + tokens); None without them.
    """

    def __init__(
        self,
        run: _Run,
        prompts: list[list[int]],
        owners: list[int],
        caps: list[int],
        cache: SharedPromptCache,
        vocabulary: int,
    ):
        device = run.device
        self.cache = cache
        self.slot = torch.arange(len(owners), device=device)
        self.owner = torch.tensor(owners, device=device)
        self.cap = torch.tensor(caps, device=device)
        self.position = torch.tensor([len(prompt) for prompt in prompts], device=device)[self.owner]
        self.alive = torch.ones(len(owners), dtype=torch.bool, device=device)
        self.running, self.next_cap = len(owners), min(caps)
        self.params = run.params
        self.longest = max(map(len, prompts))
        self.seen: Tensor | None = None
        self.history: Tensor | None = None
        self.processors: dict[int, LogitsProcessorList] = {}
        if _is_processed(run.params):
            self.processors = {length: _processors(run, length) for length in {*map(len, prompts)}}
            self.history = pad_ids(prompts, 0, "left")[0].to(device)[self.owner]
        elif run.params.repetition_penalty != 1.0:
            seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, [token for token in prompt if token < vocabulary]] = True
            self.seen = seen.to(device)[self.owner]

    def scores(self, logits: Tensor) -> Tensor | None:
        """What `_next_tokens` draws from instead of the logits, (n, V)."""
        if self.seen is not None:
            return _penalised(logits.float(), self.seen, self.params.repetition_penalty)
        if self.history is None:
            return None
        scores = torch.empty_like(logits, dtype=torch.float32)
        for length, processors in self.processors.items():
            # Prompts of one length at a time: processors count tokens and look for some, and padding is not to matter.
            rows = (self.position == length).nonzero().squeeze(1)
            history: Any = self.history[rows, self.longest - length :]
            if len(rows):
                scores[rows] = processors(history, logits[rows].float())
        return scores

    def end(self, ended: Tensor) -> None:
        """Let rows go no further, (n,) bool."""
        self.alive &= ~ended
        caps = self.cap[self.alive].tolist()
        self.running, self.next_cap = len(caps), min(caps, default=0)

    def add(self, tokens: Tensor) -> None:
        """Remember the tokens sampled at this step."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.history is not None:
            self.history = torch.cat([self.history, tokens[:, None]], 1)

    def drop_ended(self) -> Tensor:
        """Let the last rows take the places of those that ended; returns which rows are left, in their new order."""
        device = self.slot.device
        to, source, rows = _moves(self.alive.tolist(), device)
        self.cache.move_rows(to, source, self.running)
        self.slot, self.owner, self.cap = self.slot[rows], self.owner[rows], self.cap[rows]
        self.position, self.alive = self.position[rows], self.alive[rows]
        self.seen = None if self.seen is None else self.seen[rows]
        self.history = None if self.history is None else self.history[rows]

        owners, prompts = self.owner.tolist(), self.cache.groups.prompts
        if len(wanted := {*owners}) < prompts:
            to, source, kept = _moves([prompt in wanted for prompt in range(prompts)], device)
            self.cache.move_prompts(to, source, len(wanted))
            place = {prompt: number for number, prompt in enumerate(kept.tolist())}
            owners = [place[owner] for owner in owners]
            self.owner = torch.tensor(owners, device=device)
        self.cache.groups = Groups.of(owners, len(wanted), device)
        return rows


def _moves(alive: list[bool], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places in front that are free, the places at the back whose content goes there, and the order that results."""
    number = sum(alive)
    to = [place for place in range(number) if not alive[place]]
    source = [place for place in range(number, len(alive)) if alive[place]]
    order = list(range(number))
    for new, old in zip(to, source):
        order[new] = old
    moves = (torch.tensor(places, dtype=torch.long, device=device) for places in (to, source, order))
    return tuple(moves)  # type: ignore[return-value]


def _prefill(run: _Run, prompts: list[list[int]], groups: Groups, most: int) -> tuple[Tensor, SharedPromptCache]:
    """Pass the prompts, shorter ones first, through the model: logits after each, (B, V), and the cache to go on with."""
    parts: list[list[list[int]]] = []
    for prompt in prompts:
        # The prompt is the longest of its part so far, to whose length the others are padded.
        if parts:
            size = (len(parts[-1]) + 1) * len(prompt)
            padding = 1 - sum(map(len, [*parts[-1], prompt])) / size
        if not parts or size > PREFILL_TOKENS or padding > MAX_PADDING:
            parts.append([])
        parts[-1].append(prompt)
    logits, caches = [], []
    for part in parts:
        ids, mask = pad_ids(part, run.pad_id, "left")
        inputs: dict[str, Any] = {"input_ids": ids.to(run.device)}
        if len(part[0]) < len(part[-1]):
            inputs["attention_mask"] = mask.to(run.device)
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(run.device)
        caches.append(new_cache(run.config))
        logits.append(run.last_logits(**inputs, past_key_values=caches[-1]))
    return torch.cat(logits), share_prompts(caches, [len(prompt) for prompt in prompts], groups, most)


def _step(run: _Run, cache: SharedPromptCache, tokens: Tensor, position: Tensor) -> Tensor:
    """Logits after one more token a row, (N, V)."""
    with attending(run.config, cache):
        return run.last_logits(input_ids=tokens[:, None], position_ids=position[:, None], past_key_values=cache)


# --------------------------------------------------------------------------------------------------- the next token


def _next_tokens(
    logits: Tensor, params: SamplingParams, scores: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens drawn from logits (N, V), their log-probabilities and the entropies, (N,) each.

    The latter two are those of `softmax(logits / temperature)`, whatever penalties and truncation do to the draw.

    Args:
        scores: what to draw from, if that is not the logits, (N, V): the logits with penalties, before temperature and
            truncation; or, if `params.extra` asks for transformers' processors, what those made of them, all done.
    """
    logits = logits.float()
    scaled = logits / (params.temperature or 1.0)
    scaled -= scaled.amax(-1, keepdim=True)
    probs = torch.softmax(scaled, -1)
    if params.temperature == 0.0:
        tokens = (scaled if scores is None else scores).argmax(-1)
    elif _is_processed(params):
        assert scores is not None
        tokens = _draw(torch.softmax(scores, -1), generator)
    else:
        weights = probs if scores is None else torch.softmax(scores / params.temperature, -1)
        weights, ids = _truncated(weights, params)
        tokens = _draw(weights, generator)
        if ids is not None:
            tokens = ids.gather(1, tokens[:, None]).squeeze(1)
    # The likeliest token's logit is 0 now, so its probability tells the normaliser.
    log_sum = -torch.log(probs.amax(-1))
    logps = scaled.gather(1, tokens[:, None]).squeeze(1) - log_sum
    entropies = log_sum - (probs * scaled.clamp_(min=torch.finfo(scaled.dtype).min)).sum(-1)
    return tokens, logps, entropies


def _is_processed(params: SamplingParams) -> bool:
    return bool(params.extra.keys() & _PROCESSED)


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of seen tokens divided by the penalty, or multiplied where they are negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _truncated(probs: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Weights to draw from after top-k, top-p and min-p, in this order, and the tokens that they are for; None: all.

    The weights, (N, K), are zero where a token is ruled out, and need not sum to 1.
    """
    ids: Tensor | None = None
    if 0 < params.top_k < probs.size(-1):
        probs, ids = probs.topk(params.top_k)
        probs = probs / probs.sum(-1, keepdim=True)
    if params.top_p < 1.0:
        if ids is None:
            probs, ids = _likeliest(probs, params.top_p)
        before = probs.cumsum(-1) - probs
        ruled_out = before >= params.top_p
        ruled_out[:, 0] = False
        probs = probs.masked_fill(ruled_out, 0.0)
    if params.min_p:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs, ids


def _likeliest(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in order, as many as have this probability in every row, or more."""
    if probs.device.type == "cpu" and probs.size(-1) > SORT_FIRST:
        found, ids = probs.topk(SORT_FIRST)
        if bool((found.sum(-1) >= top_p).all()):
            return found, ids
    return probs.sort(-1, descending=True)


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A place in each row, drawn with probabilities proportional to the weights: (N,).

    On a CPU a random number a row picks the place where the running sum of the weights passes it: `multinomial` draws
    one for each weight there, and takes longer than a small model's forward pass.
    """
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1, generator=generator).squeeze(1)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    drawn = torch.rand(len(weights), 1, generator=generator, dtype=sums.dtype) * total
    # Strictly below the total, or rounding may pick a place after the last one with a weight.
    return torch.searchsorted(sums, torch.minimum(drawn, torch.nextafter(total, -total)), right=True).squeeze(1)


def _processors(run: _Run, prompt_length: int) -> LogitsProcessorList:
    """Transformers' logits processors for all settings, in its order, for prompts of this length."""
    config = GenerationConfig(**_generation_settings(run.params))
    # What `generate` derives from the config before it asks for the processors.
    config._eos_token_tensor = run.ends if len(run.ends) else None
    return run.base._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt_length, device=run.device, model_kwargs={}
    )


def _generation_settings(params: SamplingParams) -> dict[str, Any]:
    """Fields of a `GenerationConfig` that sample like these settings."""
    greedy = params.temperature == 0.0
    drawing = {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    return {
        "do_sample": not greedy,
        **({} if greedy else drawing),
        "repetition_penalty": params.repetition_penalty,
        **{name: value for name, value in params.extra.items() if name not in _IGNORED},
    }


class _StopTexts:
    """Finds the completions that a stop text ends.

    Args:
        stop: the texts. prompts: token ids of each row's prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str], prompts: list[list[int]]):
        if tokenizer is None:
            raise ValueError(f"stop is {tuple(stop)!r}, but there is no tokenizer to decode completions with.")
        self.tokenizer, self.stop, self.prompts = tokenizer, stop, prompts
        self.completions: list[list[int]] = [[] for _ in prompts]
        # A token is a byte at least, and a character has 4 bytes at most. Some more tokens tell a decoder what stands
        # before: some strip the first space.
        self.window = 4 * max(map(len, stop)) + 8
        self.context = 8

    def completed_by(self, rows: list[int], tokens: list[int], device: torch.device) -> Tensor:
        """Whether a stop text stands in a row's completion with this token, (n,). It did not without it."""
        found = []
        for row, token in zip(rows, tokens):
            ids = self.completions[row]
            ids.append(token)
            text = self._text_after((self.prompts[row] + ids[: -self.window])[-self.context :], ids[-self.window :])
            found.append(any(stop in text for stop in self.stop))
        return torch.tensor(found, device=device)

    def _text_after(self, context: list[int], ids: list[int]) -> str:
        before, whole = (self._decoded(part) for part in (context, context + ids))
        return whole[len(before) :] if whole.startswith(before) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


# ------------------------------------------------------------------------------------------------- model.generate


def _sample_by_generate(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    caps: list[int],
    cache_implementation: str | None,
    model_inputs: Mapping[str, Any],
    synced: Callable[[bool], bool] | None,
) -> Sampled:
    """The same through `model.generate`, all prompts in one batch.

    Log-probabilities and entropies are kept where it draws token by token: not of beams or with an assistant.
    """
    rows = len(prompt_ids)
    run = _Run(model, params, tokenizer, synced)
    most = max(caps, default=0)
    if most == 0 and synced is None:
        return Sampled([[] for _ in caps], [False] * rows, [[] for _ in caps], [[] for _ in caps])
    # A process without prompts takes part with a dummy.
    ids, mask = pad_ids(prompt_ids if rows else [[0]], run.pad_id, "left")
    settings: dict[str, Any] = {
        **_generation_settings(params),
        "max_new_tokens": max(most, 1),
        "pad_token_id": run.pad_id,
        "eos_token_id": list(params.end_ids) or None,
        "disable_compile": True,
    }
    if cache_implementation is not None:
        settings["cache_implementation"] = cache_implementation
    plain = all(name in _PROCESSED | _IGNORED or _NEUTRAL.get(name) == value for name, value in params.extra.items())
    stopping = StoppingCriteriaList()
    stops = _StopCriteria(run, prompt_ids) if params.stop and rows else None
    if stops is not None:
        stopping.append(stops)
    recorder = _Recorder(params.temperature or 1.0) if plain else None
    with contextlib.ExitStack() as stack:
        if params.seed is not None:
            stack.enter_context(torch.random.fork_rng([run.device] if run.device.type != "cpu" else []))
            torch.manual_seed(params.seed)
        if recorder is not None:
            hook = run.base.register_forward_hook(recorder.record, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(_nothing_declared(run))
        inner: Any = unwrapped(model)
        sampled = inner.generate(
            input_ids=ids.to(run.device),
            attention_mask=mask.to(run.device),
            generation_config=GenerationConfig(**settings),
            stopping_criteria=stopping,
            synced_gpus=synced is not None,
            **model_inputs,
        )
    completions = sampled[:, ids.size(1) :]
    found = Sampled([], [])
    for row, cap in zip(range(rows), caps):
        whole = cut_after_eos(completions[row].tolist(), {*params.end_ids})
        if stops is not None and row in stops.lengths:
            whole = whole[: stops.lengths[row]]
        found.completion_ids.append(whole[:cap])
        by_stop = stops is not None and stops.lengths.get(row, cap + 1) <= cap
        found.finished.append(len(whole) <= cap and (by_stop or (len(whole) > 0 and whole[-1] in params.end_ids)))
    if recorder is not None:
        logps, entropies = recorder.of(completions)
        lengths = [len(completion) for completion in found.completion_ids]
        found.logps = [logps[row, :length].tolist() for row, length in enumerate(lengths)]
        found.entropies = [entropies[row, :length].tolist() for row, length in enumerate(lengths)]
    return found


@contextlib.contextmanager
def _nothing_declared(run: _Run) -> Iterator[None]:
    """Keep `generate` from taking what is unset from the generation config that came with the model."""
    holders = [holder for holder in (unwrapped(run.model), run.base) if "generation_config" in vars(holder)]
    declared = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, declared):
            holder.generation_config = config


class _StopCriteria(StoppingCriteria):
    """Ends the rows of `generate` that a stop text ends; `lengths` tells after how many tokens."""

    def __init__(self, run: _Run, prompt_ids: Sequence[Sequence[int]]):
        self.texts = _StopTexts(run.tokenizer, run.params.stop, [list(prompt) for prompt in prompt_ids])
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = [row for row in range(len(input_ids)) if row not in self.lengths]
        tokens = input_ids[:, -1].tolist()
        found = self.texts.completed_by(rows, [tokens[row] for row in rows], torch.device("cpu")).tolist()
        self.lengths |= {row: len(self.texts.completions[row]) for row, ended in zip(rows, found) if ended}
        return torch.tensor([row in self.lengths for row in range(len(input_ids))], device=input_ids.device)


class _Recorder:
    """Keeps log-probabilities and entropies of what `generate` draws: the token drawn is the next pass's input."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.logps: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.pending: Tensor | None = None

    def record(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.pending is not None:
            name = "decoder_input_ids" if kwargs.get("decoder_input_ids") is not None else "input_ids"
            self._settle(kwargs[name][:, -1])
        logits = output.logits[:, -1].float() / self.temperature
        self.pending = torch.log_softmax(logits, -1)

    def _settle(self, tokens: Tensor) -> None:
        assert self.pending is not None
        self.logps.append(self.pending.gather(1, tokens[:, None]).squeeze(1))
        self.entropies.append(torch.special.entr(self.pending.exp()).sum(-1))
        self.pending = None

    def of(self, completions: Tensor) -> tuple[Tensor, Tensor]:
        """Both for all tokens, (N, tokens)."""
        if self.pending is not None and len(self.logps) < completions.size(1):
            self._settle(completions[:, len(self.logps)])
        return torch.stack(self.logps, 1), torch.stack(self.entropies, 1)
