"""The rewards of an online trainer: functions, reward models and environments, each a column of a matrix."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from outspoken.trainers import loading
from outspoken.trainers.data.formats import is_messages
from outspoken.trainers.measuring import raise_together
from outspoken.trainers.reference import prepare_reference
from outspoken.trainers.rewards.calling import CallPolicy, RewardCalls, callable_name, checked_rewards

logger = logging.getLogger(__name__)

# A reward is a function, a sequence classifier with one label, or the path of one.
RewardFunc = str | PreTrainedModel | Callable[..., Any]

# Tokens, padding included, that a reward model reads at a time.
REWARD_MODEL_TOKENS = 16_384


class RewardSet:
    """What scores completions: K reward functions and models.

    Args:
        reward_funcs: one or several: a function, a sequence classifier with one label, or the path of one.
        processing_classes: tokenizers of the reward models, in the order of `reward_funcs`. Default: those stored with
            the models.
        args: the trainer's config. Read once: `model_init_kwargs` and `trust_remote_code`. Read where they are used, so
            that they may change in flight: `reward_timeout`, `reward_max_retries`, `reward_on_error`,
            `chat_template_kwargs`.
        accelerator: puts reward models on their device, and lets processes fail together.
        environment_rewards: name -> function of rewards that environments give; they come last and have weight 1.

    Attributes:
        functions: name -> function or model in evaluation mode, in the order of the columns.
        tokenizers: name of a model -> its tokenizer.
        calls: how the functions behave: `calls.failures`, `calls.seconds`.

    Raises:
        ValueError: there is no reward, tokenizers do not match, a model has more than one label, or
            `args.reward_weights` do not match.
        TypeError: an entry is neither callable nor a path.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
        processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
        args: Any,
        accelerator: Accelerator,
        environment_rewards: Mapping[str, Callable[..., Any]] | None = None,
    ):
        self.args = args
        self.accelerator = accelerator
        self.functions: dict[str, Any] = {}
        self.tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        given = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        given = [function for function in given if function is not None]
        for function, tokenizer in zip(given, _one_tokenizer_each(processing_classes, len(given))):
            self._add(function, tokenizer)
        self._weighted = len(self.functions)
        for name, function in (environment_rewards or {}).items():
            self.functions[_unused(name, self.functions)] = function
        if not self.functions:
            raise ValueError("`reward_funcs` is empty; pass at least one reward function.")
        plain = {name: function for name, function in self.functions.items() if name not in self.tokenizers}
        self.calls = RewardCalls(plain)
        self.weights(args)  # checks their number

    @property
    def names(self) -> list[str]:
        """The names that the K rewards are logged under, all different."""
        return list(self.functions)

    def weights(self, args: Any) -> Tensor:
        """`args.reward_weights`, 1 where they are unset and for environments: (K,) on the accelerator's device.

        Raises:
            ValueError: there is not one weight per entry of `reward_funcs`.
        """
        weights = args.reward_weights
        if weights is None:
            weights = [1.0] * self._weighted
        if len(weights) != self._weighted:
            raise ValueError(
                f"reward_weights has {len(weights)} entries for {self._weighted} reward functions "
                f"({', '.join(self.names[: self._weighted])}); give one weight per function."
            )
        weights = [*weights, *[1.0] * (len(self.functions) - self._weighted)]
        return torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)

    def score(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        environments: list[Any] | None = None,
    ) -> Tensor:
        """The rewards of this process's completions: (n, K) float32 on the accelerator's device, NaN for None.

        Every process has to call it, with or without completions. Where one fails, all raise.

        Args:
            prompts, completions: n strings, or n lists of messages.
            completion_ids: their tokens.
            columns: the dataset's other columns, n values each. They reach functions as keywords of their own; one that
                is called like another keyword is left out.
            trainer_state, log_extra, log_metric, environments: handed to functions; `environments` only if there are
                some.

        Raises:
            ValueError, RuntimeError: a function failed, see `RewardCalls`; elsewhere, see `raise_together`.
        """
        inputs = {
            **{name: values for name, values in columns.items() if name not in ("prompt", "completion")},
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": trainer_state,
            "log_extra": log_extra or (lambda column, values: None),
            "log_metric": log_metric or (lambda name, value: None),
            **({} if environments is None else {"environments": environments}),
        }
        rewards: dict[str, list[float]] = {}
        error: Exception | None = None
        if completions:
            try:
                rewards = self.calls(len(completions), inputs, CallPolicy.of(self.args))
            except Exception as failed:
                error = failed
        raise_together(self.accelerator, error)  # before the models: a sharded one needs every process
        if self.tokenizers:
            try:
                for name in self.tokenizers:
                    rewards[name] = self._model_rewards(name, prompts, completions)
            except Exception as failed:
                error = failed
            raise_together(self.accelerator, error)
        matrix = [rewards.get(name, []) for name in self.functions]
        per_function = torch.tensor(matrix, dtype=torch.float32).T.contiguous()
        self._tell_of_unscorable(per_function)
        return per_function.to(self.accelerator.device)

    def _tell_of_unscorable(self, per_function: Tensor) -> None:
        unscorable = int(torch.isnan(per_function).all(dim=1).sum())
        if unscorable:
            logger.warning(
                f"{unscorable} of {len(per_function)} completions got None from every reward function "
                f"({', '.join(self.functions)}) and teach nothing; at least one function should score each."
            )

    # Reward models

    def _add(self, function: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        revision = None
        if isinstance(function, str):
            load = {**(self.args.model_init_kwargs or {}), "num_labels": 1}
            revision = load.get("revision")
            with _every_process_loads():
                function = loading.load_model(
                    function,
                    load,
                    trust_remote_code=self.args.trust_remote_code,
                    auto_class=AutoModelForSequenceClassification,
                )
        if not callable(function):
            raise TypeError(
                f"`reward_funcs` holds a {type(function).__name__}; pass functions, sequence classifiers or paths."
            )
        if not isinstance(function, nn.Module):
            self.functions[_unused(callable_name(function), self.functions)] = function
            return
        model: Any = function
        name = _unused(loading.model_id(model).rstrip("/").split("/")[-1] or type(model).__name__, self.functions)
        labels = getattr(model.config, "num_labels", 1)
        if labels != 1:
            raise ValueError(
                f"The reward model {name!r} has {labels} labels, so which one is the reward is not clear; load it with "
                "num_labels=1, or pass a function that picks one."
            )
        self.tokenizers[name] = self._tokenizer_of(model, tokenizer, revision)
        if self._lockstep:
            stand_in = SimpleNamespace(is_deepspeed_enabled=True, is_fsdp_enabled=False)
            self.functions[name] = prepare_reference(model, self.accelerator, stand_in)
        else:  # whole on every process, under FSDP too
            model = self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)
            self.functions[name] = model.eval()

    @property
    def _lockstep(self) -> bool:
        """Whether reward models may be spread over processes, which then have to call them equally often."""
        return getattr(self.accelerator.state, "deepspeed_plugin", None) is not None

    def _tokenizer_of(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, revision: str | None
    ) -> PreTrainedTokenizerBase:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                loading.model_id(model), revision=revision, trust_remote_code=self.args.trust_remote_code
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # A sequence classifier reads the last token that is not padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return tokenizer

    def _model_rewards(self, name: str, prompts: list[Any], completions: list[Any]) -> list[float]:
        """A reward model's scores; NaN for a text without tokens."""
        model, tokenizer = self.functions[name], self.tokenizers[name]
        texts = self._texts(tokenizer, prompts, completions)
        encoded = dict(tokenizer(text=texts, add_special_tokens=False)) if texts else {"input_ids": []}
        lengths = [len(ids) for ids in encoded["input_ids"]]
        chunks = chunks_by_length(lengths, REWARD_MODEL_TOKENS)
        rounds = len(chunks)
        if self._lockstep:
            counts: Any = self.accelerator.gather(torch.tensor([rounds], device=self.accelerator.device))
            rounds = int(counts.max())
        scores = torch.full((len(texts),), torch.nan)
        for i in range(rounds):
            chunk = chunks[i] if i < len(chunks) else []
            rows = {key: [values[j] for j in chunk] for key, values in encoded.items()}
            if not chunk:  # this process is done, others are not
                rows = {"input_ids": [[tokenizer.pad_token_id]]}
            inputs = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self.accelerator.device)
            with torch.inference_mode():
                logits = model(**inputs).logits
            scores[chunk] = logits[: len(chunk), 0].float().cpu()
        given = [score if length else None for score, length in zip(scores.tolist(), lengths)]
        return checked_rewards(name, given, len(texts), completions)

    def _texts(self, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], completions: list[Any]) -> list[str]:
        if not prompts or not is_messages(prompts[0]):
            return [prompt + completion for prompt, completion in zip(prompts, completions)]
        options = self.args.chat_template_kwargs or {}
        return [
            str(tokenizer.apply_chat_template(prompt + completion, tokenize=False, **options))
            for prompt, completion in zip(prompts, completions)
        ]


def chunks_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in chunks of at most `budget` tokens once padded, longest first, empty rows left out.

    A row above the budget is a chunk of its own.
    """
    chunks: list[list[int]] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if chunks and (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] <= budget:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def _one_tokenizer_each(processing_classes: Any, count: int) -> list[PreTrainedTokenizerBase | None]:
    if processing_classes is None:
        return [None] * count
    tokenizers = list(processing_classes) if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    if len(tokenizers) != count:
        raise ValueError(
            f"`reward_processing_classes` has {len(tokenizers)} entries for {count} reward functions; give one per "
            "function, None for those that are no models."
        )
    return tokenizers


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or with a number behind it if it is taken: two lambdas must not share a metric."""
    number = 2
    unused = name
    while unused in taken:
        unused, number = f"{name}_{number}", number + 1
    return unused


@contextlib.contextmanager
def _every_process_loads() -> Iterator[None]:
    """FSDP may load weights on the first process only and spread them when it shards; reward models it does not."""
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(variable)
    if before is not None:
        os.environ[variable] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before
