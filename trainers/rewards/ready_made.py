"""Ready-made reward functions. Those that TRL 1.16 has as well have its names, arguments and results."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from outspoken.trainers.rewards import math_check
from outspoken.trainers.rewards.calling import RewardFunction


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """What a completion says in the end: a string itself; of messages the last one, if the assistant wrote it."""
    if isinstance(completion, str):
        return completion
    if not completion or completion[-1].get("role", "assistant") != "assistant":
        return ""  # cut while a tool had the word: its output is no answer
    content = completion[-1].get("content")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


# ---------------------------------------------------------------------- exact answers


def exact_match_reward(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the completion equals the dataset column `answer` up to surrounding white space, else 0.

    None where the row has no answer.

    Raises:
        ValueError: the dataset has no column `answer`.
    """
    if answer is None:
        raise ValueError("exact_match_reward needs a dataset column 'answer' with the expected completion")
    return [
        None if expected is None else float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer)
    ]


class _ExactMatch:
    # Classes and not closures, so that they can be pickled and sent to other processes.
    __name__ = "exact_match_reward"

    def __init__(self, column: str, pattern: str | None):
        self.column = column
        self.pattern = None if pattern is None else re.compile(pattern)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if columns.get(self.column) is None:
            raise ValueError(f"get_exact_match_reward needs the dataset column {self.column!r} that it was given")
        return [
            None if expected is None else float(self._found(completion_text(completion)) == str(expected).strip())
            for completion, expected in zip(completions, columns[self.column])
        ]

    def _found(self, text: str) -> str | None:
        if self.pattern is None:
            return text.strip()
        found = None
        for match in self.pattern.finditer(text):
            found = match[1 if self.pattern.groups else 0] or ""
        return None if found is None else found.strip()


def get_exact_match_reward(column: str = "answer", pattern: str | None = None) -> RewardFunction:
    r"""A reward function: 1 where the answer found in the completion equals the dataset column, else 0.

    >>> gsm8k = get_exact_match_reward("answer", r"####\s*(-?[\d,.]+)")
    >>> gsm8k(completions=["2 + 2 is #### 4"], answer=["4"])
    [1.0]

    Args:
        column: of the expected answers; None where the row has none.
        pattern: regular expression of the answer; of several matches the last one counts, and of a match its first
            group. Unset: the whole completion.
    """
    return _ExactMatch(column, pattern)


# ---------------------------------------------------------------------- mathematics


def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""1 where the LaTeX answer in the completion is mathematically equal to the dataset column `solution`, else 0.

    None where the solution holds nothing that math-verify can read. The check of a completion that takes longer than
    `math_check.SECONDS`, or more memory than `math_check.MEMORY`, is broken off and counts as wrong.

    >>> accuracy_reward([r"My answer is \boxed{\frac{1}{3}}"], [r"\frac{1}{3}"])  # doctest: +SKIP
    [1.0]

    Logs the columns `solution`, `gold_parsed` and `answer_parsed`, and the share of checks broken off as
    `accuracy_reward/timed_out`.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: the dataset has no column `solution`.
    """
    return _accuracies("accuracy_reward", completions, solution, None, log_extra, log_metric)


def reasoning_accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str] | None = None,
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    """Like `accuracy_reward`, of what follows the reasoning; 0 where the reasoning does not end.

    Args:
        reasoning_delimiters: ends of reasoning, `["</think>"]` by default. The answer is what follows the last
            occurrence of the first of them that the completion has.
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else list(reasoning_delimiters)
    return _accuracies("reasoning_accuracy_reward", completions, solution, delimiters, log_extra, log_metric)


def _accuracies(
    name: str,
    completions: Sequence[Any],
    solution: Sequence[str] | None,
    delimiters: list[str] | None,
    log_extra: Callable[[str, list], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> list[float | None]:
    if solution is None:
        raise ValueError(f"{name} needs a dataset column 'solution' with the correct answer")
    math_check.require_math_verify(name)
    answers = [_after_reasoning(completion_text(completion), delimiters) for completion in completions]
    golds = ["" if gold is None else str(gold) for gold in solution]
    asked = [(gold, answer) for gold, answer in zip(golds, answers, strict=True) if answer is not None]
    checked = iter(math_check.check_answers(asked))
    incomplete = math_check.Checked(0.0, "[incomplete reasoning]", "[incomplete reasoning]")
    results = [incomplete if answer is None else next(checked) for answer in answers]
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [result.gold for result in results])
        log_extra("answer_parsed", [result.answer for result in results])
    if log_metric is not None and results:
        log_metric(f"{name}/timed_out", sum(result.timed_out for result in results) / len(results))
    return [result.reward for result in results]


def _after_reasoning(text: str, delimiters: list[str] | None) -> str | None:
    if delimiters is None:
        return text
    delimiter = next((delimiter for delimiter in delimiters if delimiter in text), None)
    return None if delimiter is None else text.rpartition(delimiter)[2]


class _CosineScaledReward:
    __name__ = "cosine_scaled_reward"

    def __init__(
        self, max_len: int, wrong: tuple[float, float], correct: tuple[float, float], is_correct: RewardFunction
    ):
        self.max_len = max_len
        self.wrong = wrong
        self.correct = correct
        self.is_correct = is_correct

    def __call__(
        self, completions: Sequence[Any], solution: Any = None, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        columns |= {"solution": solution, "completion_ids": completion_ids}
        correct = self.is_correct(completions=completions, **columns)
        return [
            None if right is None else self._scaled(bool(right), len(ids))
            for right, ids in zip(correct, completion_ids, strict=True)
        ]

    def _scaled(self, right: bool, length: int) -> float:
        # (at the longest, at the shortest); the cosine would rise again beyond max_len
        low, high = self.correct if right else (self.wrong[1], self.wrong[0])
        return low + 0.5 * (high - low) * (1.0 + math.cos(min(length / self.max_len, 1.0) * math.pi))


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    is_correct: RewardFunction = accuracy_reward,
) -> RewardFunction:
    """A reward function of correctness and length (arXiv 2502.03373, appendix C.1).

    Between length 0 and `max_len` (tokens) a correct completion goes from `max_value_correct` down to
    `min_value_correct`, a wrong one from `min_value_wrong` up to `max_value_wrong`, along half a cosine. None where
    correctness is.

    Args:
        is_correct: what tells correct (not 0) from wrong (0), `accuracy_reward` by default.

    Raises:
        ValueError: `max_len` is not positive.
    """
    if max_len <= 0:
        raise ValueError(f"max_len is {max_len}; choose the number of tokens of the longest completion.")
    return _CosineScaledReward(
        max_len, (min_value_wrong, max_value_wrong), (min_value_correct, max_value_correct), is_correct
    )


# ---------------------------------------------------------------------- format


def think_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion opens with one `<think>…</think>` block, else 0 (the format reward of arXiv 2501.12948)."""
    return [float(_opens_with_one_thought(completion_text(completion))) for completion in completions]


def _opens_with_one_thought(text: str) -> bool:
    # A regular expression of the same meaning takes quadratic time on many `</think>`.
    opening, _, rest = text.partition("<think>")
    return opening == "" and text != "" and "</think>" in rest and "<think>" not in rest


class _FormatReward:
    __name__ = "format_reward"

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(self.pattern.fullmatch(completion_text(completion)) is not None) for completion in completions]


def get_format_reward(pattern: str) -> RewardFunction:
    r"""A reward function: 1 where the whole completion matches the regular expression (`.` also a new line), else 0.

    >>> get_format_reward(r"<answer>.*</answer>\s*")(completions=["<answer>4</answer>", "4"])
    [1.0, 0.0]
    """
    return _FormatReward(pattern)


# ---------------------------------------------------------------------- length and repetition


class _LengthReward:
    __name__ = "length_reward"

    def __init__(self, target: int | str, alpha: float):
        self.target = target
        self.alpha = alpha

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        targets: Sequence[Any] = [self.target] * len(completion_ids)
        if isinstance(self.target, str):
            if columns.get(self.target) is None:
                raise ValueError(f"get_length_reward needs the dataset column {self.target!r} that it was given")
            targets = columns[self.target]
        return [
            None if target is None else -self.alpha * abs(target - len(ids))
            for target, ids in zip(targets, completion_ids)
        ]


def get_length_reward(target: int | str, alpha: float = 0.0003) -> RewardFunction:
    """A reward function of the distance to a wanted length: -alpha * |target - length|, in tokens.

    Added to a correctness reward of 0 or 1 it is LCPO-Exact (L1, arXiv 2503.04697, eq. 1).

    Args:
        target: the wanted length, or the dataset column that says it (None: no reward for this row).
        alpha: what a token more or less costs; the paper's value by default.
    """
    return _LengthReward(target, alpha)


class _SoftOverlongPunishment:
    __name__ = "soft_overlong_punishment_reward"

    def __init__(self, max_completion_len: int, soft_punish_cache: int):
        self.max_completion_len = max_completion_len
        self.soft_punish_cache = soft_punish_cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = self.max_completion_len - self.soft_punish_cache
        return [self._punish(len(ids), free) for ids in completion_ids]

    def _punish(self, length: int, free: int) -> float:
        if length <= free:
            return 0.0
        if length <= self.max_completion_len:
            return (free - length) / self.soft_punish_cache
        return -1.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """A reward function that punishes length before the cap does (DAPO, arXiv 2503.14476, eq. 13).

    With L = `max_completion_len` and C = `soft_punish_cache`, in tokens: 0 up to length L - C, then falling linearly to
    -1 at L, and -1 beyond.

    Raises:
        ValueError: unless 0 <= C <= L.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}; choose it between 0 and max_completion_len, here "
            f"{max_completion_len}."
        )
    return _SoftOverlongPunishment(max_completion_len, soft_punish_cache)


class _RepetitionPenalty:
    __name__ = "repetition_penalty_reward"

    def __init__(self, ngram_size: int, max_penalty: float):
        self.ngram_size = ngram_size
        self.max_penalty = max_penalty

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self.max_penalty * self._repeated(list(ids)) for ids in completion_ids]

    def _repeated(self, ids: list[int]) -> float:
        """The share of n-grams that occurred before: 0 up to almost 1."""
        ngrams = list(zip(*(ids[start:] for start in range(self.ngram_size))))
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """A reward function against repetition: `max_penalty` times the share of repeated n-grams of tokens.

    That is (1 - different n-grams / all n-grams) * max_penalty (arXiv 2502.03373, appendix C.2); 0 for a completion
    shorter than `ngram_size`.

    Raises:
        ValueError: `ngram_size` is below 1, or `max_penalty` above 0.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size is {ngram_size}; choose 1 or more.")
    if max_penalty > 0:
        raise ValueError(f"max_penalty is {max_penalty}; choose 0 or less, since it is added to the reward.")
    return _RepetitionPenalty(ngram_size, max_penalty)
