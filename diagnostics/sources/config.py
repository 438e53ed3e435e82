"""What a log tells beside its numbers: the method, and settings. And the settings a user hands over in a file."""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources.files import UnreadableLog
from outspoken.diagnostics.sources.names import is_reward_model

MAX_CONFIG = 10 * 1024 * 1024  # bytes
MAX_SETTINGS = 1_000_000  # of a configuration, each counted wherever YAML repeats it
LN2 = math.log(2)  # the first loss of a preference run

# trainer_state.json's name -> the config field
_STATE_FIELDS = {
    "max_steps": "max_steps",
    "train_batch_size": "per_device_train_batch_size",
    "logging_steps": "logging_steps",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
    "num_train_epochs": "num_train_epochs",
}


def read_config(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings as they are named there, from a mapping or a YAML, JSON or TOML file.

    Raises:
        UnreadableLog: the file is missing, none of the three, or no mapping of names to values.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return {str(k): v for k, v in source.items()}
    return {name: _number_if_one(value) for name, value in load(Path(source)).items()}


def load(path: Path, max_yaml: int = MAX_CONFIG) -> dict[str, Any]:
    """A configuration file as it stands: TOML by its name, else JSON or YAML by its content.

    Args:
        max_yaml: bytes up to which YAML is read, which takes seconds a megabyte.

    Raises:
        UnreadableLog: the file is missing, too large, none of the three, or no mapping of names to values.
    """
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_CONFIG + 1)
        if len(data) > MAX_CONFIG:
            raise UnreadableLog(f"{path}: is larger than {MAX_CONFIG // 2**20} MiB, which no configuration is.")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UnreadableLog(f"{path}: the configuration cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise UnreadableLog(f"{path}: is not UTF-8 text (byte {error.start}), so it is no configuration.") from None
    if len(data) > max_yaml and path.suffix != ".toml" and not text.lstrip().startswith("{"):
        raise UnreadableLog(f"{path}: is larger than {max_yaml // 1024} KiB, which no configuration in YAML is.")
    value = _parse(path, text)
    if not isinstance(value, dict):
        raise UnreadableLog(f"{path}: must hold settings as `name: value`, not a {type(value).__name__}.")
    return {str(k): v for k, v in value.items()}


def _parse(path: Path, text: str) -> Any:
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if text.lstrip().startswith("{"):
            return json.loads(text)
        return load_yaml(text)
    except tomllib.TOMLDecodeError as error:
        raise UnreadableLog(f"{path}: is not valid TOML ({error}).") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise UnreadableLog(f"{path}: line {line} is not valid YAML ({error.problem}).") from None
    except json.JSONDecodeError as error:
        raise UnreadableLog(f"{path}: line {error.lineno} is not valid JSON ({error.msg}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableLog(f"{path}: is neither YAML nor JSON ({type(error).__name__}).") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which a few lines of nested `<<` would keep busy for ever."""

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MAX_SETTINGS:
            raise yaml.YAMLError("repeats too many settings")


def load_yaml(text: str | bytes) -> Any:
    """The value of a YAML text; nothing is executed.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is no YAML.
    """
    value = yaml.load(text, _Loader)
    if _size(value, {}) > MAX_SETTINGS:
        raise yaml.YAMLError("repeats too many settings")
    return value


def _size(value: Any, known: dict[int, float]) -> float:
    """How many values a value holds, where one that stands in many places counts in each; inf if it holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


def _number_if_one(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text; a learning rate is a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def config_of_state(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that trainer_state.json holds beside its rows."""
    config: dict[str, Any] = {}
    for theirs, ours in _STATE_FIELDS.items():
        value = extra.get(theirs)
        if _is_positive(value):
            config[ours] = value
    return config


def total_steps_of(config: Mapping[str, Any], last: Mapping[str, Any]) -> int | None:
    """Planned steps, from the config or a column that says so in every row, of which `last` is the last."""
    for value in (config.get("max_steps"), last.get("total_steps")):
        if _is_positive(value):
            return int(value)
    return None


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53


def points_per_log(config: Mapping[str, Any]) -> int | None:
    """Generation batches that one logged point is the mean of; None if the config does not tell.

    `logging_steps` optimizer steps consume `logging_steps * gradient_accumulation_steps` micro-batches, and one
    generation batch serves `steps_per_generation * num_iterations` of them.
    """
    numbers = [
        config.get("logging_steps"),
        config.get("gradient_accumulation_steps"),
        config.get("steps_per_generation") or config.get("gradient_accumulation_steps"),
        config.get("num_iterations", 1),
    ]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n >= 1 for n in numbers):
        return None
    logging, accumulation, per_generation, iterations = (float(n) for n in numbers)
    return max(1, int(logging * accumulation / (per_generation * iterations)))


def infer_method(names: set[str], observations: Iterable[Observation]) -> tuple[str, str]:
    """The training method that the signals speak for, and one sentence why; "unknown" where they do not tell."""

    def has(*wanted: str) -> bool:
        return any(any(n.startswith(w) for n in names) if w.endswith("/") else w in names for w in wanted)

    if has("critic/vf_loss", "loss/value_avg", "objective/rlhf_reward"):
        return "ppo", "it logs a value function's loss"
    if has("teacher_kl", "teacher_kl/", "distillation/"):
        return "distillation", "it logs the divergence from a teacher"
    if has("log_odds_chosen", "odds_ratio_loss"):
        return "orpo", "it logs an odds ratio"
    paired = has("rewards/accuracies", "eval_rewards/accuracies")
    if has("rewards/chosen", "eval_rewards/chosen") and has("kl", "eval_kl") and not paired:
        return "kto", "it logs rewards/chosen and kl"
    if has("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        return "dpo", "it logs rewards of chosen and rejected answers"
    if has("eval_rewards/chosen", "eval_rewards/margins"):
        return "dpo", "it logs evaluated rewards of chosen and rejected answers"
    if is_reward_model(names):
        return "reward", "it logs the margin of a reward model"
    if has("reward", "eval_reward") and has(
        "reward_std", "frac_reward_zero_std", "groups/", "completions/", "clip_ratio/", "kl", "advantages/"
    ):
        return "grpo", "it logs rewards of sampled completions"
    if has("reward"):
        return "grpo", "it logs a reward (low confidence: no group or completion statistics)"
    if has("min_reward", "max_reward", "scores/mean", "chosen_last_scores", "center_rewards"):
        return "reward", "it logs scores of a reward model"
    if has("mean_token_accuracy", "num_loss_tokens", "train_mean_bpb"):
        return "sft", "it logs token-level supervised metrics"
    first = next((o.signals["loss"] for o in observations if "loss" in o.signals), None)
    if first is None:
        return "unknown", "no metric tells"
    if abs(first - LN2) < 0.06:
        return "unknown", "only a loss is logged, and it begins near ln 2, as preference losses do"
    return "sft", "only a loss is logged (low confidence)"


_NAMED = re.compile(r"\b(SFT|DPO|KTO|ORPO|CPO|GRPO|RLOO|PPO)(?:Trainer|Config|Arguments)?\b")


def method_in_text(text: str) -> str | None:
    """The one method that the text of a console names, as in `DPOTrainer` or `Starting DPO`; None if several or none."""
    named = set(_NAMED.findall(text))
    return named.pop().lower() if len(named) == 1 else None
