"""Device memory: too much of it idle, or nearly none left."""

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from outspoken.diagnostics.records import Evidence, Expectation, Finding, Suggestion, Unknown, change_field
from outspoken.diagnostics.rules.fixes import consider, round_up, set_field
from outspoken.diagnostics.rules.registry import ONLINE_RL, Params, rule
from outspoken.diagnostics.view import RunView

# Method -> fields that lower memory, as far as the config has them.
LIGER = (*ONLINE_RL, "dpo", "kto")


@dataclass(frozen=True)
class Memory:
    """Device memory in GiB.

    Attributes:
        total: of the device. usable: of that, what training may take.
        peak: most that this process held, over the segment. static: allocated between steps (weights, gradients,
            optimizer state); 0 if it is not measured, which makes each forecast a cautious one.
    """

    total: float
    usable: float
    peak: float
    static: float
    static_known: bool
    signal: str
    points: int
    span: tuple[int, int]


def _memory(run: RunView, points: int = 512) -> Memory | None:
    """What is known of the device's memory, from the newest `points` points; None without a device."""
    total = run.last("memory/device_total") or _fact(run, "memory/device_total")
    if not total:
        return None
    name = "memory/peak_reserved" if run.has("memory/peak_reserved") else "memory/device_used"
    window = run.window(name, points)
    if window is None:
        return None
    usable = min(total, _fact(run, "memory/cap") or total)
    if run.config.get("use_vllm") and run.config.get("vllm_mode") == "colocate":
        usable *= 1 - (run.number("vllm_gpu_memory_utilization") or 0.3)
    peak = float(window.values.max())
    static = run.last("memory/static")
    return Memory(total, usable, peak, min(static or 0.0, peak), static is not None, name, len(window), window.span)


def _fact(run: RunView, name: str) -> float | None:
    value = run.facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def _length_growth(run: RunView) -> float | None:
    """How many times longer than the longest sequence seen the longest allowed one is; None if unknown.

    In RL by completion lengths, as if the prompt grew along: an upper bound. Elsewhere from the lengths of the data
    set: after 300 rows one of the longest hundredth has been seen in 95 % of runs.
    """
    if run.method in ONLINE_RL:
        cap, window = run.number("max_completion_length"), run.window("completions/max_length")
        if not cap or window is None:
            return None
        return max(1.0, cap / max(1.0, float(window.values.max())))
    if run.config.get("packing") is True:
        return 1.0
    longest, p99, cap = _fact(run, "data/longest"), _fact(run, "data/p99_length"), run.number("max_length")
    rows = (run.number("per_device_train_batch_size") or 0) * (run.number("gradient_accumulation_steps") or 0)
    if longest is None or p99 is None or rows * (run.step - run.segment_start) < 300:
        return None
    if cap is not None:
        longest, p99 = min(longest, cap), min(p99, cap)
    return longest / p99


def largest_batch(
    static: float, peak: float, batch: int, usable: float, growth: float = 1.0, fill: float = 0.9
) -> int:
    """The largest micro-batch that fits, from M(b) = S + a*b with a = (peak - S)/b * growth.

    b_max = floor((fill * usable - S)/a), in GiB. On 80 GiB with a peak of 27.2 at b=4: S=18 gives a=2.3 and 23;
    S=4 gives a=5.8 and 11.

    >>> largest_batch(18, 27.2, 4, 80), largest_batch(4, 27.2, 4, 80)
    (23, 11)
    """
    per_row = (peak - static) / batch * growth
    if per_row <= 0:
        return 64 * batch
    return max(0, math.floor((fill * usable - static) / per_row + 1e-9))


def _batch_change(run: RunView, new: int) -> list[tuple[str, Any, Any]] | None:
    """The changes (field, old, new) to micro-batch `new` at the same effective batch; None if it does not divide.

    `steps_per_generation` changes along, which keeps the generation batch and so its divisibility by
    `num_generations`.
    """
    old, steps = run.config.get("per_device_train_batch_size"), run.config.get("gradient_accumulation_steps")
    if not _count(old) or not _count(steps) or (old * steps) % new:
        return None
    changes = [
        ("per_device_train_batch_size", old, new),
        ("gradient_accumulation_steps", steps, old * steps // new),
    ]
    per_generation = run.config.get("steps_per_generation")
    if _count(per_generation):
        if (old * per_generation) % new:
            return None
        changes.append(("steps_per_generation", per_generation, old * per_generation // new))
    return [c for c in changes if c[1] != c[2]]


def _count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _patch(changes: list[tuple[str, Any, Any]]) -> list[dict[str, Any]]:
    return [op for name, old, new in changes for op in change_field(name, old, new)]


def generation_share(run: RunView, points: int = 30) -> float | None:
    """Share of the wall-clock that sampling completions took, over the newest points; None if it is not measured."""
    generate, step = run.window("time/generate", points), run.window("time/step", points)
    if generate is None or step is None or step.mean <= 0:
        return None
    return min(1.0, generate.mean / step.mean)


@rule(
    "PERF001",
    "vram-underuse",
    severity="info",
    every=20,
    for_=3,
    keep=2,
    inhibited_by=("NUM001", "PERF002"),
    params={"limit": 0.60, "fill": 0.90, "min_steps": 50, "max_factor": 4, "generation": 0.60},
)
def vram_underuse(run: RunView, p: Params) -> Finding | Unknown | None:
    """Much of the device's memory is never used.

    ## Why it hurts

    A larger micro-batch fills the device's arithmetic units better, so the same training takes less time.

    ## How it is decided

    The peak of reserved memory over the segment is below 60 % of what training may use, at 3 evaluations 20
    observations apart, after at least 50 steps. What training may use is the device's memory, less vLLM's share where
    it lives on the same device. The forecast is M(b) = S + a*b: S is what stays allocated between steps, a = (peak -
    S)/b, times the longest allowed over the longest seen sequence. The proposal is the largest b' that divides b times
    `gradient_accumulation_steps`, is at most 4b, and keeps S + a*b' within 90 %.

    ## When it is fine

    Where generation takes more than 60 % of the step a larger training batch hardly helps: not judged. Memory may rise
    later (evaluation, longer completions), so the longest allowed length is reckoned with; where the longest sequence
    is not known the finding says so. On a CPU it is never evaluated.

    ## What to change

    - `per_device_train_batch_size` b -> b' with `gradient_accumulation_steps` lowered to match: the effective batch stays
      as it is. Risk: out of memory on a rare long batch.
    - Without accumulation the effective batch cannot be kept: b to a multiple of b, with the learning it changes.
    - `gradient_checkpointing` True -> False: no recomputation, more memory per row by an amount not known here.

    ## Sources

    The linear model and the limits are *judgement*; a utilisation of 34 % alone tells nothing of how far the batch may
    grow (4 to 11, or to 23, on 80 GiB, depending on S).
    """
    memory = _memory(run)
    if memory is None:
        return Unknown("no device memory is measured")
    if run.step - run.segment_start < p.min_steps:
        return Unknown(f"fewer than {p.min_steps:.0f} steps in this segment")
    used = memory.peak / memory.usable
    if used >= p.limit:
        return None
    share = generation_share(run)
    if share is not None and share > p.generation:
        return Unknown(f"generation takes {share:.0%} of the step: a larger training batch would hardly help")

    growth = _length_growth(run)
    batch = run.config.get("per_device_train_batch_size")
    not_checked = ["model FLOPs utilisation: not measured"]
    if growth is None:
        not_checked.append("longest sequence seen against the longest allowed: not known")
    if not memory.static_known:
        not_checked.append("memory/static: not measured, taken as 0")
    evidence = [
        Evidence(memory.signal, "max", memory.peak, memory.points, memory.span, baseline=memory.usable,
                 threshold=p.limit * memory.usable, direction="below"),
    ]  # fmt: skip
    message = (
        f"VRAM utilization at {used:.0%} (peak {memory.peak:.1f} of {memory.usable:.1f} GiB, limit {p.limit:.0%})."
    )
    impact = "the device could do more work at a time"
    if not _count(batch):
        return Finding(
            message,
            "Consider raising per_device_train_batch_size and lowering gradient_accumulation_steps by the same factor.",
            evidence,
            confidence="low",
            impact=impact,
            not_checked=(*not_checked, "per_device_train_batch_size: not in the config"),
        )

    fits = largest_batch(memory.static, memory.peak, batch, memory.usable, growth or 1.0, p.fill)
    most = min(fits, int(p.max_factor * batch))
    inputs = {
        "static": round(memory.static, 3),
        "peak": round(memory.peak, 3),
        "usable": round(memory.usable, 3),
        "batch": batch,
        "length_growth": round(growth or 1.0, 3),
        "b_max": fits,
    }
    suggestions, advice = [], ""
    for new in range(most, batch, -1):
        changes = _batch_change(run, new)
        if changes is not None:
            suggestions.append(_raise_batch(run, "PERF001.1", changes, inputs, memory, p.fill, kept=True))
            total = batch * run.config["gradient_accumulation_steps"]
            also = " and ".join(f"lowering {name} from {old} to {becomes}" for name, old, becomes in changes[1:])
            advice = f"Consider raising per_device_train_batch_size from {batch} to {new} and {also} "
            advice += f"(the effective batch stays {total} per device)."
            break
    else:
        new = most // batch * batch
        if new > batch and run.config.get("gradient_accumulation_steps", 1) == 1:
            only = [("per_device_train_batch_size", batch, new)]
            suggestions.append(_raise_batch(run, "PERF001.1", only, inputs, memory, p.fill, kept=False))
            advice = f"Consider raising per_device_train_batch_size from {batch} to {new} "
            advice += f"(the effective batch grows {new // batch}-fold, which changes learning)."
    if run.config.get("gradient_checkpointing") is True:
        suggestions.append(
            set_field(
                run,
                "PERF001.2",
                "gradient_checkpointing",
                False,
                when="checkpoint",
                preconditions=("activations without checkpointing fit: not forecast here",),
                side_effects=("more memory per row",),
                risk="high",
                expect=_faster(run),
            )
        )
        if not advice:
            advice = consider(suggestions[-1])
    if not suggestions:
        return None  # nothing that would use it
    return Finding(
        message,
        advice,
        evidence,
        suggestions=suggestions,
        confidence="medium" if growth is not None and memory.static_known else "low",
        impact=impact,
        not_checked=not_checked,
    )


def _raise_batch(
    run: RunView,
    id: str,
    changes: list[tuple[str, Any, Any]],
    inputs: dict[str, Any],
    memory: Memory,
    fill: float,
    kept: bool,
) -> Suggestion:
    loss = run.config.get("loss_type")
    effects = ["more memory per step"]
    if kept and loss in ("grpo", "bnpo"):
        effects.append(f"loss_type={loss} averages per micro-batch, so the loss changes slightly")
    if not kept:
        effects.append("a larger effective batch: fewer, less noisy steps per epoch")
    return Suggestion(
        id,
        "Raise the micro-batch" + (" at the same effective batch" if kept else ""),
        "suggest",
        "checkpoint",
        patch=_patch(changes),
        formula=f"b_max = floor(({fill:g}*usable - static)/((peak - static)/batch*length_growth)); the largest divisor "
        "of the effective batch up to min(b_max, 4*batch)"
        if kept
        else f"b_max = floor(({fill:g}*usable - static)/((peak - static)/batch*length_growth)); the largest multiple of "
        "batch up to min(b_max, 4*batch)",
        inputs=inputs,
        preconditions=("no batch longer than those reckoned with",),
        side_effects=effects,
        risk="medium",
        expect=_faster(run) if kept else Expectation("memory/utilization", "below", 0.92, within_steps=30),
    )


def _faster(run: RunView) -> Expectation:
    """A step at least 5 % shorter, or, where steps are not timed, memory within bounds."""
    step = run.median("time/step", 10)
    if step is None:
        return Expectation("memory/utilization", "below", 0.92, within_steps=30)
    return Expectation("time/step", "below", float(f"{0.95 * step:.4g}"), within_steps=30)


@rule(
    "PERF002",
    "near-oom",
    severity="warning",
    every=10,
    for_=1,
    keep=5,
    warm_up=False,
    inhibited_by=("NUM001",),
    params={
        "reserved": 0.95,
        "allocated": 0.90,
        "windows": 2,
        "of": 5,
        "window": 10,
        "forecast": 0.98,
        "max_growth": 2,
    },
)
def near_oom(run: RunView, p: Params) -> Finding | Unknown | None:
    """Device memory is nearly used up: the next long batch will fail.

    ## Why it hurts

    An out-of-memory error ends the run, often hours in, at the first batch that is a little longer.

    ## How it is decided

    In 2 of the last 5 windows of 10 steps the peak of reserved memory (or of all that is used on the device) is
    above 95 % of the device, and what is really allocated above 90 %; or allocations succeeded only after the cache was
    flushed (`memory/alloc_retries` grew within the last 50 points). As information: the longest allowed sequence is at
    most twice the longest seen, and S + a*b for it would exceed 98 %.

    ## When it is fine

    Reserved memory alone may sit high for ever: the allocator keeps what it once had. Hence the second condition.

    ## What to change

    - `per_device_train_batch_size` b -> b*0.9*(usable - S)/(peak - S), rounded down to a divisor of the effective
      batch, which `gradient_accumulation_steps` keeps. Slower, safe.
    - `gradient_checkpointing` False -> True; `use_liger_kernel` False -> True in the RL and preference trainers of TRL
      (ours never build the full logits); `max_completion_length` down to 1.1 times the 99th percentile of completions
      that ended.

    ## Sources

    TRL's guide to reducing memory use; GRPO's logits alone take batch*group*tokens*vocabulary*2 bytes (axolotl's
    documentation). The limits are *judgement*.
    """
    memory = _memory(run, int(p.of * p.window))
    if memory is None:
        return Unknown("no device memory is measured")
    size = int(p.window)
    reserved = run.window("memory/peak_reserved", int(p.of) * size)
    device = run.window("memory/device_used", int(p.of) * size)
    allocated = run.window("memory/peak_allocated", int(p.of) * size)

    others = 0.0  # what is used on the device by anything but this process's allocator
    if device is not None and reserved is not None:
        others = max(0.0, float(device.values[-1] - reserved.values[-1]))
    tightest = device if reserved is None else reserved
    assert tightest is not None  # _memory found one of them
    high = tightest.steps[tightest.values + others > p.reserved * memory.total]
    full = len(np.unique(high // size)) if len(high) else 0
    retries = run.window("memory/alloc_retries", 50)
    retried = retries is not None and retries.values[-1] > retries.values[0]
    held = float(allocated.values.max()) + others if allocated is not None else None
    needed = (p.allocated - 0.03 if run.is_firing else p.allocated) * memory.total
    tight = full >= p.windows and held is not None and held > needed

    growth = _length_growth(run)
    forecast = None
    if growth is not None and 1 < growth <= p.max_growth and allocated is not None and memory.static_known:
        top = float(allocated.values.max())
        forecast = memory.static + (top - memory.static) * growth + others
        if forecast <= p.forecast * memory.total:
            forecast = None
    if not tight and not retried and forecast is None:
        return None

    share = (memory.peak + others) / memory.total
    evidence = [
        Evidence(memory.signal, "max", memory.peak + others, memory.points, memory.span, baseline=memory.total,
                 threshold=p.reserved * memory.total, direction="above"),
    ]  # fmt: skip
    message = f"VRAM utilization at {share:.0%} (peak {memory.peak + others:.1f} of {memory.total:.1f} GiB)"
    if tight and held is not None:
        message += f", {held / memory.total:.0%} of it really in use (limit {p.allocated:.0%})"
    if retried and retries is not None:
        new = retries.values[-1] - retries.values[0]
        message += f"; {new:.0f} allocations of the last {len(retries)} points needed a flushed cache"
        evidence.append(retries.evidence("growth", float(new), threshold=0, direction="above"))
    if forecast is not None and growth is not None:
        message += (
            f"; the longest allowed sequence is {growth:.2g} times the longest seen and would take {forecast:.1f} GiB"
        )
    suggestions, advice = _less_memory(run, memory)
    return Finding(
        message + ".",
        advice,
        evidence,
        suggestions=suggestions,
        severity="warning" if tight or retried else "info",
        confidence="high" if tight and retried else ("medium" if tight or retried else "low"),
        impact="the next long batch may end the run",
        not_checked=() if memory.static_known else ("memory/static: not measured, taken as 0",),
    )


def _less_memory(run: RunView, memory: Memory) -> tuple[list[Suggestion], str]:
    """The settings that would lower the peak, the micro-batch first, and the advice in words."""
    config, suggestions, advice = run.config, [], ""
    below = Expectation("memory/utilization", "below", 0.90, within_steps=50)
    batch = config.get("per_device_train_batch_size")
    if _count(batch) and batch > 1 and _count(config.get("gradient_accumulation_steps")):
        wanted = math.floor(batch * 0.9 * (memory.usable - memory.static) / max(memory.peak - memory.static, 1e-9))
        for new in range(min(wanted, batch - 1), 0, -1):
            changes = _batch_change(run, new)
            if changes is None:
                continue
            also = " and ".join(f"raising {name} from {old} to {becomes}" for name, old, becomes in changes[1:])
            advice = f"Consider lowering per_device_train_batch_size from {batch} to {new} and {also} (same effective batch)."
            suggestions.append(
                Suggestion(
                    "PERF002.1",
                    "Lower the micro-batch at the same effective batch",
                    "suggest",
                    "checkpoint",
                    patch=_patch(changes),
                    formula="floor(batch*0.9*(usable - static)/(peak - static)), down to a divisor of the effective batch",
                    inputs={
                        "batch": batch,
                        "usable": round(memory.usable, 3),
                        "static": round(memory.static, 3),
                        "peak": round(memory.peak, 3),
                    },
                    side_effects=("slower steps",),
                    risk="low",
                    expect=below,
                )
            )
            break
    switches: list[tuple[str, Any, str]] = []
    if config.get("gradient_checkpointing") is False:
        switches.append(("gradient_checkpointing", True, "recomputed activations: slower steps"))
    ours = "diagnose" in config  # our trainers refuse Liger's losses: they compute their own
    if run.method in LIGER and config.get("use_liger_kernel") is False and not ours:
        switches.append(("use_liger_kernel", True, "needs liger-kernel and a CUDA device"))
    cap, p99 = run.number("max_completion_length"), run.last("completions/p99_terminated_length")
    if cap is not None and p99:
        lower = round_up(1.1 * p99, 64)
        if lower < cap:
            switches.append(("max_completion_length", lower, "longer answers are cut"))
    for i, (name, new, effect) in enumerate(switches, start=2):
        suggestions.append(
            set_field(
                run,
                f"PERF002.{i}",
                name,
                new,
                when="checkpoint",
                side_effects=(effect,),
                risk="low" if name != "max_completion_length" else "medium",
                expect=below,
            )
        )
    if not advice and suggestions:
        advice = consider(suggestions[0])
    if not advice:
        advice = "Consider a smaller per_device_train_batch_size with more gradient_accumulation_steps, or "
        advice += "gradient_checkpointing."
    return suggestions, advice
