"""Reading and changing the settings of a trainer while it trains. Duck-typed: it imports no trainer and no torch.

Our own configs say in their field metadata which fields are live. For TRL's trainers `FOREIGN_LIVE` lists the fields
that take effect in flight, and the attributes in which the trainer keeps its own copy.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

SECRET_FIELDS = ("hub_token", "push_to_hub_token")
SECRET_KEYS = ("token", "hf_token", "use_auth_token", "api_key", "password", "secret")  # … inside a field's dict
MAX_DEPTH = 6

Bounds = dict[str, Any]  # "minimum" and "maximum" (inclusive), "choices", "type"; None: unbounded, or not told


def _bounds(
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
    type: str | None = None,
) -> Bounds:
    return {
        "minimum": minimum,
        "maximum": maximum,
        "choices": None if choices is None else list(choices),
        "type": type,
    }


class Foreign(NamedTuple):
    """A live field of a trainer that is not ours: its bounds, and the trainer's attributes that hold copies of it.

    Without a copy the trainer reads it from its `args` where it is used.
    """

    bounds: Bounds
    copies: tuple[str, ...]


def _sampled(bounds: Bounds, name: str, generation_name: str | None = None) -> Foreign:
    """A field of sampling: TRL keeps it on the trainer, in `generation_config`, and with vLLM in `vllm_generation`."""
    return Foreign(bounds, (name, f"generation_config.{generation_name or name}", f"vllm_generation.{name}"))


# Sampling temperature is not here: TRL 1.16 builds it into the head that scores the completions, so that a change
# would reach the sampling only, and the log-probabilities would be those of another distribution.
_SAMPLING = {
    "max_completion_length": _sampled(_bounds(1, 1_000_000, type="int"), "max_completion_length", "max_new_tokens"),
    "top_p": _sampled(_bounds(0.01, 1.0, type="float"), "top_p"),
    "top_k": _sampled(_bounds(0, type="int"), "top_k"),
    "min_p": _sampled(_bounds(0.0, 1.0, type="float"), "min_p"),
    "repetition_penalty": _sampled(_bounds(0.1, 10.0, type="float"), "repetition_penalty"),
}
_POLICY = {
    "beta": Foreign(_bounds(0.0, type="float"), ("beta",)),
    "epsilon": Foreign(_bounds(0.0, 1.0, type="float"), ("epsilon_low",)),
    "epsilon_high": Foreign(_bounds(0.0, type="float"), ("epsilon_high",)),
    "mask_truncated_completions": Foreign(_bounds(choices=(True, False)), ("mask_truncated_completions",)),
    "reward_weights": Foreign(_bounds(type="list"), ("reward_weights",)),
}
# TRL's trainer class -> field -> where it lives, for TRL 1.16. Each copy is read where it is used, not once at start.
# Losses such as IPO divide by the beta of preference methods, so that it stays above 0.
FOREIGN_LIVE: dict[str, dict[str, Foreign]] = {
    "GRPOTrainer": {
        **_POLICY,
        **_SAMPLING,
        "scale_rewards": Foreign(_bounds(choices=("group", "batch", "none")), ("scale_rewards",)),
    },
    "RLOOTrainer": {**_POLICY, **_SAMPLING},
    "DPOTrainer": {"beta": Foreign(_bounds(1e-6, type="float"), ("beta",))},
    "KTOTrainer": {
        "beta": Foreign(_bounds(1e-6, type="float"), ("beta",)),
        "desirable_weight": Foreign(_bounds(0.0, type="float"), ("desirable_weight",)),
        "undesirable_weight": Foreign(_bounds(0.0, type="float"), ("undesirable_weight",)),
    },
    "RewardTrainer": {"center_rewards_coefficient": Foreign(_bounds(0.0, type="float"), ())},
}
# Fields of `TrainingArguments` that the training loop reads at every step, for any trainer.
COMMON_LIVE: dict[str, Bounds] = {
    "learning_rate": _bounds(0.0, 1.0, type="float"),
    "max_grad_norm": _bounds(0.0, type="float"),
}


# ---------------------------------------------------------------------- reading


def config_of(args: Any) -> dict[str, Any]:
    """The settings of a run as JSON can hold them: enums by value, unknown objects by `repr`, secrets masked."""
    config: dict[str, Any] = {}
    for f in dataclasses.fields(args):
        if not f.name.startswith("_"):
            value = getattr(args, f.name, None)
            config[f.name] = _masked(value) if f.name in SECRET_FIELDS else _plain(value)
    config["world_size"] = int(getattr(args, "world_size", 1))
    return config


def _masked(value: Any) -> str | None:
    return None if value is None else "<masked>"


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, depth)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {str(k): _masked(v) if k in SECRET_KEYS else _plain(v, depth + 1) for k, v in value.items()}
    if depth < MAX_DEPTH and isinstance(value, list | tuple | set):
        return [_plain(v, depth + 1) for v in value]
    if depth < MAX_DEPTH and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name, None), depth + 1) for f in dataclasses.fields(value)}
    try:
        return repr(value)[:200]
    except Exception:  # a foreign object's own method
        return f"<{type(value).__name__}>"


def live_fields(trainer: Any, args: Any) -> dict[str, Bounds]:
    """Field -> bounds of what may be changed while this trainer trains."""
    live = {
        f.name: _bounds(f.metadata["minimum"], f.metadata["maximum"], f.metadata["choices_live"], _type_word(f.type))
        for f in _own_fields(args)
    }
    if not live:
        live = {name: dict(bounds) for name, bounds in COMMON_LIVE.items() if hasattr(args, name)}
        live |= {name: dict(foreign.bounds) for name, foreign in _foreign_fields(trainer, args).items()}
    if getattr(args, "deepspeed", None):
        live.pop("max_grad_norm", None)  # DeepSpeed takes it from its own config at start
    return live


def _own_fields(args: Any) -> list["dataclasses.Field[Any]"]:
    return [f for f in dataclasses.fields(args) if "live" in f.metadata]


def _foreign_fields(trainer: Any, args: Any) -> dict[str, Foreign]:
    """The live fields of a TRL trainer, as far as this version of it has them; none for a trainer of ours."""
    if trainer is None or _own_fields(args):
        return {}
    for cls in type(trainer).__mro__:
        if cls.__name__ in FOREIGN_LIVE:
            known = FOREIGN_LIVE[cls.__name__]
            return {
                n: f for n, f in known.items() if hasattr(args, n) and all(hasattr(trainer, c) for c in f.copies[:1])
            }
    return {}


def _type_word(annotation: Any) -> str | None:
    """`list[float] | None` -> "list": the type of a field whose value may be unset."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    word = text.split("|")[0].split("[")[0].strip()
    return word if word in ("bool", "int", "float", "str", "list") else None


# ---------------------------------------------------------------------- changing


def refusal(trainer: Any, config: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """Why values that are within bounds still cannot take effect in this trainer; None if they can."""
    if fields.get("learning_rate") == 0:
        return "learning_rate=0 stops training, and could not be scaled back; ask for a small positive rate"
    if fields.get("beta") and config.get("beta") == 0 and config.get("num_generations") is not None:
        adapters = getattr(getattr(trainer, "model", None), "peft_config", None) or ()
        if getattr(trainer, "ref_model", None) is None and "ref" not in adapters:
            return "beta was 0 when the run began, so no reference model was loaded; set beta for the next run"
    if "reward_weights" in fields:
        weights, names = fields["reward_weights"], list(getattr(trainer, "reward_func_names", ()))
        if len(weights) != len(names) or not all(_is_finite(w) for w in weights):
            return f"reward_weights={weights} must be a finite number for each of the {len(names)} reward functions"
    reason = _wrong_for_preferences(config, fields)
    if reason is not None:
        return reason
    wins = config.get("generation_kwargs")
    for name in fields:
        other = "max_new_tokens" if name == "max_completion_length" else name
        if isinstance(wins, Mapping) and other in wins:
            return f"{name} would have no effect: generation_kwargs sets {other}, which wins over it"
    new_length = fields.get("max_completion_length")
    return None if new_length is None else _too_long(trainer, config, new_length)


def _wrong_for_preferences(config: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    losses = config.get("loss_type")
    if fields.get("label_smoothing") == 0 and isinstance(losses, list) and "exo_pair" in losses:
        return "label_smoothing=0 makes the loss 'exo_pair' infinite; ask for a small positive number"
    weights = fields.get("loss_weights")
    if weights is not None and isinstance(losses, list) and len(weights) != len(losses):
        return f"loss_weights={weights} must have a number for each of the {len(losses)} losses in loss_type"
    if "ld_alpha" in fields and config.get("precompute_ref_log_probs"):
        return "ld_alpha is part of the reference's log-probabilities, which were computed before training"
    return None


def _too_long(trainer: Any, config: Mapping[str, Any], new_length: int) -> str | None:
    vllm_limit = config.get("vllm_max_model_length") if config.get("use_vllm") else None
    model_config = getattr(getattr(trainer, "model", None), "config", None)
    limits = (
        ("vllm_max_model_length", vllm_limit),
        ("the model's max_position_embeddings", getattr(model_config, "max_position_embeddings", None)),
    )
    for what, limit in limits:
        if isinstance(limit, int) and new_length > limit:
            return f"max_completion_length={new_length} exceeds {what}={limit}, fixed at start"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def apply_fields(
    trainer: Any, args: Any, fields: Mapping[str, Any], optimizer: Any = None, lr_scheduler: Any = None
) -> None:
    """Set config fields in a running trainer, where they take effect: in `args`, and in every copy known of them.

    The learning rate also rescales the schedule and the rates now in the optimizer, see `set_learning_rate`.
    """
    foreign = _foreign_fields(trainer, args)
    for name, value in fields.items():
        if name == "learning_rate":
            set_learning_rate(args, float(value), optimizer, lr_scheduler)
            continue
        if name == "beta" and value and not args.beta and hasattr(trainer, "_buffered_inputs"):
            trainer._buffered_inputs = None  # TRL's rollouts from before lack the reference's log-probabilities
        setattr(args, name, value)
        for path in foreign[name].copies if name in foreign else ():
            _set_copy(trainer, path, value)
    if "epsilon_high" in foreign and args.epsilon_high is None:
        _set_copy(trainer, "epsilon_high", args.epsilon)


def _set_copy(owner: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        owner = getattr(owner, part, None)
    if owner is None or not hasattr(owner, last):
        return
    now = getattr(owner, last)
    if hasattr(now, "new_tensor"):  # reward weights; unset they are all 1
        value = now.new_tensor([1.0] * len(now) if value is None else value)
    setattr(owner, last, value)


def set_learning_rate(args: Any, new: float, optimizer: Any, lr_scheduler: Any) -> None:
    """Make `new` the peak learning rate, in flight: the schedule keeps its shape, and parameter groups with rates of
    their own keep their ratio to it.

    Args:
        args: its `learning_rate` is the peak so far.
        optimizer, lr_scheduler: torch's, or accelerate's around them; None where there is none.
    """
    old = float(args.learning_rate)
    args.learning_rate = new

    def scaled(rate: Any) -> Any:
        return new if rate == old or old == 0 else rate * (new / old)

    for group in getattr(optimizer, "param_groups", ()):
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # the latter two are OneCycleLR's
            if group.get(key) is not None:
                group[key] = scaled(group[key])
    _scale_schedule(getattr(lr_scheduler, "scheduler", lr_scheduler), scaled)


def _scale_schedule(scheduler: Any, scaled: Any) -> None:
    for rates in ("base_lrs", "_last_lr"):  # the latter is what `get_last_lr` tells, and the trainer logs
        if getattr(scheduler, rates, None) is not None:
            setattr(scheduler, rates, [scaled(rate) for rate in getattr(scheduler, rates)])
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR's
        _scale_schedule(inner, scaled)
