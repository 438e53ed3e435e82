"""What a column of a log is: which signal of ours, in which unit, or a clock, or text.

Each family of trainers has one small module with its table of names. A name that no table knows is kept as it is.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from outspoken.diagnostics import signals
from outspoken.diagnostics.records import MAX_TEXT, Observation

Kind = Literal["step", "epoch", "time", "clock", "signal", "summary"]


@dataclass(frozen=True)
class Derived:
    """A signal computed from others of the same row, all under their names in our table."""

    inputs: tuple[str, ...]
    formula: Callable[..., float]


@dataclass(frozen=True)
class Family:
    """How one system names its metrics, and what it means by them.

    Attributes:
        name: as `--format` takes it: "verl". title: as the system calls itself: "veRL".
        signs: names that only this system writes; one that ends with "/" or "_" is a prefix.
        aliases: its name -> ours. Where several mean the same, the one named first here wins.
        scale: its name -> factor to our unit (0.01 for percent, -1 for the other sign).
        meanings: its name -> which of several meanings was taken and why: one sentence, told where the name occurs.
        not_measured: its name -> the number that it writes for "not available"; such a cell counts as empty.
        zero_if_off: names that it writes as 0 in every row where the thing is switched off; a column of nothing but
            zeros then counts as empty.
        steps: its names for the step, best first.
        clocks: names that count time or progress and are no metric.
        known: its own metrics that have no name in our table and need no mention.
        derived: our name -> how it follows from others.
        method_of: the method and why, from all its names of a log; None where they do not tell.
        follow: makes, for one pass over a run, a function that adds to each observation what follows from earlier
            ones.
        writer: which of its processes wrote a row, where several write into one file, each at its own pace: a step that
            goes back or comes again with other values is a restart only among the rows of one of them.
        null_is_nan: its writer turns NaN into null.
        drops_nan: its writer leaves out what is not finite, so that a missing value may have been a NaN.
        settings: its name of a setting, nested ones joined by ".", -> the config field it is here.
    """

    name: str
    title: str = ""
    signs: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    not_measured: Mapping[str, float] = field(default_factory=dict)
    zero_if_off: frozenset[str] = frozenset()
    steps: tuple[str, ...] = ()
    clocks: frozenset[str] = frozenset()
    known: tuple[str, ...] = ()
    derived: Mapping[str, Derived] = field(default_factory=dict)
    method_of: Callable[[Collection[str]], tuple[str, str] | None] | None = None
    follow: Callable[[], Callable[[Observation], None]] | None = None
    writer: Callable[[Mapping[str, Any]], str] | None = None
    null_is_nan: bool = False
    drops_nan: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One name of the log and what becomes of it."""

    raw: str
    kind: Kind
    name: str  # ours, for a signal
    scale: float = 1.0
    evaluation: bool = False


# Names of the step, of any family, best first; compared without regard to case.
STEPS = (
    "step",
    "global_step",
    "training/global_step",
    "train/global_step",
    "trainer/global_step",
    "global step",
    "_step",
    "current_steps",
    "training_step",
    "train_step",
    "iteration",
    "iter",
    "update",
)
EPOCHS = ("epoch", "train/epoch", "training/epoch")
TIMES = ("time", "timestamp", "_timestamp", "wall_time", "wall time", "datetime", "date")
CLOCKS = frozenset(
    (
        *("schema", "segment", "run", "run_id", "type", "event", "progress", "percentage", "total_steps", "max_steps"),
        *("elapsed", "elapsed_time", "remaining_time", "eta", "_runtime", "row_index"),
        *("relative time (process)", "relative time (wall)"),
    )
)

# The Trainer's last row sums the run up; it is no step.
SUMMARY = frozenset(
    (
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_tokens_per_second",
        "total_flos",
        "train_loss",
    )
)

# Names that any home-made loop may use.
COMMON: dict[str, str] = {
    "training loss": "loss",
    "train loss": "loss",
    "lm loss": "loss",
    "train_loss": "loss",
    "training_loss": "loss",
    "validation loss": "eval_loss",
    "val loss": "eval_loss",
    "val_loss": "eval_loss",
    "valid_loss": "eval_loss",
    "validation_loss": "eval_loss",
    "val/loss": "eval_loss",
    "test/loss": "eval_loss",
    "lr": "learning_rate",
    "learning rate": "learning_rate",
    "gradient_norm": "grad_norm",
    "grad norm": "grad_norm",
    "grad-norm": "grad_norm",
    "learning-rate": "learning_rate",
    "grad_norm/total": "grad_norm",
    "reward_mean": "reward",
    "mean_reward": "reward",
    "reward/mean": "reward",
    "rewards/mean": "reward",
    "reward/std": "reward_std",
    "kl_divergence": "kl",
    "mean_kl": "kl",
    "policy_entropy": "entropy",
}

_EVALUATION = re.compile(r"^(eval|val|valid|validation|test|predict|heldout|val-core|val-aux)[_/]")
_WANDB_RUN = re.compile(r"^.+? - (?=[A-Za-z_])")  # "<run name> - train/loss" in a chart exported from W&B


def tidy(raw: str) -> str:
    """A name without what an exporter put around it: `completions / mean_length` is `completions/mean_length`."""
    name = raw.strip().replace(" / ", "/")
    if " - " in name and not name.endswith(("__MIN", "__MAX")):
        name = _WANDB_RUN.sub("", name)
    return name


def is_evaluation(name: str) -> bool:
    return _EVALUATION.match(name) is not None


def choose_family(names: Iterable[str], families: Iterable[Family]) -> Family | None:
    """The family most of whose signs stand among the names; None if no sign does."""
    tidied = {tidy(name) for name in names}
    best, most = None, 0
    for family in families:
        hits = sum(
            1
            for name in tidied
            if any(name.startswith(s) if s.endswith(("/", "_")) else name == s for s in family.signs)
        )
        if hits > most:
            best, most = family, hits
    return best


def plan(raw_names: Iterable[str], family: Family, step: str | None) -> dict[str, Column]:
    """What becomes of each name of a log.

    Args:
        raw_names: every name that any row has, in order of appearance.
        step: the name that was chosen as the step axis.
    """
    raw_names = list(raw_names)
    columns: dict[str, Column] = {}
    claims: dict[str, list[tuple[int, str]]] = {}  # our name -> (rank of the claim, raw name)
    tidied = {raw: tidy(raw) for raw in raw_names}
    names = set(tidied.values())
    for raw in raw_names:
        kind = _clock_kind(raw, tidied[raw], family, step)
        if kind is not None:
            columns[raw] = Column(raw, kind, raw)
            continue
        ours, rank = translate(tidied[raw], family, names)
        if ours is not None:
            claims.setdefault(ours, []).append((rank, raw))
    for ours, claimants in claims.items():
        _, raw = min(claimants, key=lambda claim: claim[0])
        scale = family.scale.get(tidied[raw], 1.0)
        columns[raw] = Column(raw, "signal", ours, scale, is_evaluation(ours) or is_evaluation(tidied[raw]))
    taken = {column.name for column in columns.values() if column.kind == "signal"}
    for raw in raw_names:
        if raw not in columns:
            own = tidied[raw][:MAX_TEXT] if tidied[raw][:MAX_TEXT] not in taken else raw[:MAX_TEXT]
            again = 1
            while own in taken:
                end = "_again" if again == 1 else f"_again_{again}"
                own = raw[: MAX_TEXT - len(end)] + end
                again += 1
            taken.add(own)
            columns[raw] = Column(raw, "signal", own, 1.0, is_evaluation(own))
    return {raw: columns[raw] for raw in raw_names}


def _clock_kind(raw: str, name: str, family: Family, step: str | None) -> Kind | None:
    lower = name.lower()
    if raw == step:
        return "step"
    if lower in EPOCHS:
        return "epoch"
    if lower in TIMES:
        return "time"
    if lower in STEPS or lower in CLOCKS or name in family.clocks:
        return "clock"
    return None


def translate(name: str, family: Family, names: set[str]) -> tuple[str | None, int]:
    """Our name for one of theirs and how sure that is (0 is surest); (None, …) to keep theirs.

    `names` are all names of the log: some mean one thing beside one name and another beside another.
    """
    order = {alias: i + 1 for i, alias in enumerate(family.aliases)}
    if name in family.aliases:
        return family.aliases[name], order[name]
    if signals.lookup(name) is not None and (name not in COMMON or is_reward_model(names)):
        return name, 0
    for prefix, ours in (("train/", ""), ("training/", ""), ("eval/", "eval_")):
        if name.startswith(prefix):
            inner, rank = translate(name.removeprefix(prefix), family, names)
            if inner is not None and not inner.startswith("eval_"):
                return ours + inner, rank + 1000
            if ours:
                return ours + name.removeprefix(prefix), rank + 1000
    if name.startswith("eval_"):
        inner, rank = translate(name.removeprefix("eval_"), family, names)
        return (f"eval_{inner}", rank) if inner is not None and not inner.startswith("eval_") else (None, 0)
    if name.lower() in COMMON:
        return COMMON[name.lower()], 100 + list(COMMON).index(name.lower())
    bare = name.removeprefix("rewards/")
    if bare != name and "/" not in bare and ("reward" in names or "train/reward" in names):
        return f"rewards/{bare}/mean", 500  # TRL before 0.17: `rewards/<function>` was the mean
    if bare != name and "/" not in bare and "eval_reward" in names:
        return f"rewards/{bare}/mean", 500
    return None, 0


def is_reward_model(names: Iterable[str]) -> bool:
    """Whether these are the metrics of a reward model, whose `mean_reward` is no reward of a policy."""
    bare = {re.sub(r"^(train|training|eval)[/_]", "", name) for name in names}
    return "margin" in bare and bool(bare & {"accuracy", "mean_reward"})


def is_renamed(column: Column) -> bool:
    """Whether a signal has another name here, rather than its own without `train/` and blanks."""
    plain = tidy(column.raw)
    bare = re.sub(r"^(train|training)/", "", plain)
    same = (plain, bare, f"eval_{plain.removeprefix('eval/')}")
    return column.name not in same and not column.name.startswith(f"{plain}_again")


def is_known(column: Column, family: Family) -> bool:
    """Whether a signal is in our table, or a metric of the family that we know of."""
    if signals.lookup(column.name) is not None:
        return True
    names = (
        *family.known,
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "eval_model_preparation_time",
    )
    return any(column.name.startswith(k) if k.endswith(("/", "_")) else column.name == k for k in names)
