"""verl: JSON lines of its file logger (`{"step": n, "data": {…}}`) or of its console, old and new key names.

`critic/score` is the raw reward and `critic/rewards` the one after the KL penalty, whatever the algorithm;
`response_length/clip_ratio` counts responses as long as the cap. Its writer (orjson) turns NaN into null.
"""

from collections.abc import Callable

from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources.names import Family

_PHASES = {"gen": "generate", "reward": "score", "testing": "eval", "save_checkpoint": "save", "step": "step"}


def rewards_seen() -> Callable[[Observation], None]:
    """The largest and smallest reward so far, and how far they lie apart.

    Where the smallest is not logged, the smallest mean stands in for the range: it is then a lower bound.
    """
    highest = lowest = smallest_mean = None

    def follow(observation: Observation) -> None:
        nonlocal highest, lowest, smallest_mean
        seen = observation.signals
        top, bottom, mean = (seen.get(f"critic/score/{what}") for what in ("max", "min", "mean"))
        mean = seen.get("reward", mean)
        if top is not None:
            highest = top if highest is None else max(highest, top)
        if bottom is not None:
            lowest = bottom if lowest is None else min(lowest, bottom)
        if mean is not None:
            smallest_mean = mean if smallest_mean is None else min(smallest_mean, mean)
        if highest is None or mean is None:
            return
        added = {"rewards/max_seen": highest}
        if lowest is not None:
            added["rewards/min_seen"] = lowest
        floor = lowest if lowest is not None else smallest_mean
        if floor is not None:
            added["rewards/range"] = highest - floor
        for name, value in added.items():
            seen.setdefault(name, value)  # type: ignore[attr-defined]

    return follow


VERL = Family(
    "verl",
    title="veRL",
    signs=("actor/", "critic/", "response_length/", "prompt_length/", "timing_s/", "rollout_corr/", "val-core/"),
    aliases={
        "critic/score/mean": "reward",
        "actor/entropy": "entropy",
        "actor/entropy_loss": "entropy",
        "actor/kl_loss": "kl",  # k3
        "actor/reward_kl_penalty": "kl",  # k1: the KL as a penalty in the reward
        "critic/kl": "kl",  # the same before 0.3
        "actor/grad_norm": "grad_norm",
        "actor/lr": "learning_rate",
        "actor/lr(1e-4)": "learning_rate",
        "actor/pg_clipfrac": "clip_ratio/region_mean",
        "actor/pg_loss": "loss",
        "response_length/mean": "completions/mean_length",
        "response_length/min": "completions/min_length",
        "response_length/max": "completions/max_length",
        "response_length/clip_ratio": "completions/clipped_ratio",
        **{
            f"{prefix}/{theirs}": f"time/{ours}"
            for theirs, ours in _PHASES.items()
            for prefix in ("timing_s", "timing")
        },
        "perf/max_memory_allocated_gb": "memory/peak_allocated",
        "actor/perf/max_memory_allocated_gb": "memory/peak_allocated",
        "perf/max_memory_reserved_gb": "memory/peak_reserved",
        "actor/perf/max_memory_reserved_gb": "memory/peak_reserved",
    },
    scale={"actor/lr(1e-4)": 1e-4},
    steps=("training/global_step",),
    known=(
        "actor/",
        "critic/",
        "response_length/",
        "response/",
        "prompt_length/",
        "timing/",
        "timing_s/",
        "timing_per_token/",
        "timing_per_token_ms/",
        "perf/",
        "global_seqlen/",
        "val/",
        "val-core/",
        "val-aux/",
        "rollout_corr/",
        "training/",
        "num_turns/",
    ),
    follow=rewards_seen,
    null_is_nan=True,
)
