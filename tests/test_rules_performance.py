"""The rules on device memory: the arithmetic by hand, the guards, and what they cannot know."""

import doctest

import jsonpatch
import pytest

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rules import performance
from outspoken.diagnostics.rules.performance import largest_batch
from outspoken.diagnostics.rules.registry import PAGE_SECTIONS, all_rules

MINE = {code: rule for code, rule in all_rules().items() if rule.category == "performance"}

# Effective batch 4 * 9 = 36; 80 GiB, peak 27.2, static 4: a = (27.2 - 4)/4 = 5.8, b_max = floor((72 - 4)/5.8) = 11.
# The largest divisor of 36 up to min(11, 16) is 9, with 36/9 = 4 accumulation steps.
CONFIG = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 9,
    "gradient_checkpointing": False,
    "packing": True,
}
ROW = {
    "loss": 1.0,
    "memory/device_total": 80.0,
    "memory/peak_reserved": 27.2,
    "memory/peak_allocated": 26.0,
    "memory/static": 4.0,
    "time/step": 2.0,
}


def watch(row, steps=130, method="sft", config=CONFIG, facts=None, codes=tuple(MINE)):
    """The engine after `steps` steps of `row` (or of row(step)), and its transitions without reminders."""
    rules = {code: MINE[code] for code in codes}
    engine = Engine(method=method, config=config, facts=facts or {}, rules=rules)
    transitions = []
    for step in range(1, steps + 1):
        transitions += engine.observe(Observation(step, dict(row(step) if callable(row) else row)))
    assert engine.failed_rules() == {}
    return engine, [t.record for t in transitions if t.kind == "transition"]


def without(row, *names, **more):
    return {**{k: v for k, v in row.items() if k not in names}, **more}


def reason(engine, code):
    return {r["code"]: r["reason"] for r in engine.not_checked()}.get(code)


def applied(record, config=CONFIG, i=0):
    return jsonpatch.apply_patch(dict(config), record["suggestions"][i]["patch"])


@pytest.mark.parametrize("code", MINE)
def test_pages_have_their_sections(code):
    assert [line[3:] for line in MINE[code].page.splitlines() if line.startswith("## ")] == list(PAGE_SECTIONS)


def test_the_docstring_example_holds():
    assert doctest.testmod(performance).failed == 0


# ---------------------------------------------------------------------------------------------------- PERF001


@pytest.mark.parametrize(
    ("static", "peak", "batch", "usable", "growth", "expected"),
    [
        (18.0, 27.2, 4, 80.0, 1.0, 23),  # a = 2.3; (72 - 18)/2.3 = 23.5
        (4.0, 27.2, 4, 80.0, 1.0, 11),  # a = 5.8; (72 - 4)/5.8 = 11.7: 16 would not fit
        (0.0, 27.2, 4, 80.0, 1.0, 10),  # a = 6.8; 72/6.8 = 10.6: nothing known of the static part
        (4.0, 27.2, 4, 80.0, 2.0, 5),  # a = 11.6; 68/11.6 = 5.9
        (10.0, 20.0, 10, 20.0, 1.0, 8),  # a = 1; 18 - 10 = 8 exactly
        (75.0, 76.0, 1, 80.0, 1.0, 0),
    ],
)
def test_the_largest_batch_that_fits(static, peak, batch, usable, growth, expected):
    assert largest_batch(static, peak, batch, usable, growth) == expected


def test_idle_memory_is_filled_at_the_same_effective_batch():
    engine, records = watch(ROW)
    (record,) = [r for r in records if r["state"] == "firing"]
    assert (record["code"], record["severity"], record["confidence"]) == ("PERF001", "info", "medium")
    # Every 20 observations, from step 50 on, at the third evaluation.
    assert 90 < record["step"] <= 110
    assert record["message"] == "VRAM utilization at 34% (peak 27.2 of 80.0 GiB, limit 60%)."
    assert record["advice"] == (
        "Consider raising per_device_train_batch_size from 4 to 9 and lowering gradient_accumulation_steps from 9 to 4 "
        "(the effective batch stays 36 per device)."
    )
    after = applied(record)
    assert (after["per_device_train_batch_size"], after["gradient_accumulation_steps"]) == (9, 4)
    suggestion = record["suggestions"][0]
    assert (suggestion["applicability"], suggestion["when"]) == ("suggest", "checkpoint")
    assert suggestion["inputs"] == {
        "static": 4.0,
        "peak": 27.2,
        "usable": 80.0,
        "batch": 4,
        "length_growth": 1.0,
        "b_max": 11,
    }
    assert suggestion["expect"] == {
        "signal": "time/step",
        "direction": "below",
        "value": 1.9,  # 5 % below 2 s
        "within_steps": 30,
        "min_n": 5,
    }
    assert engine.diagnostics().keys() == {"PERF001"}


def test_at_most_four_times_the_batch():
    """S = 18 leaves room for 23, of which the divisors of 64 up to 16 give 16."""
    config = {**CONFIG, "gradient_accumulation_steps": 16}
    _, records = watch(without(ROW, **{"memory/static": 18.0}), config=config)
    after = applied(records[0], config)
    assert (after["per_device_train_batch_size"], after["gradient_accumulation_steps"]) == (16, 4)


def test_generation_batches_stay_what_they_were():
    """GRPO: 4 rows * 8 steps = 32 completions a generation, in groups of 8. b' must divide 4*9 = 36 and 4*8 = 32."""
    config = {**CONFIG, "steps_per_generation": 8, "num_generations": 8, "max_completion_length": 100}
    row = {**ROW, "completions/max_length": 100.0, "memory/static": 18.0}  # b_max = 23
    _, records = watch(row, config=without(config, "packing"), method="grpo")
    assert records == []  # common divisors of 36 and 32 above 4: none; and 16 = 4*4 would change the batch, see below
    config = {**config, "gradient_accumulation_steps": 8}
    _, records = watch(row, config=without(config, "packing"), method="grpo")
    after = applied(records[0], config)
    assert after["per_device_train_batch_size"] == 16
    assert after["gradient_accumulation_steps"] == after["steps_per_generation"] == 2
    assert 16 * after["steps_per_generation"] == 32
    assert "lowering steps_per_generation from 8 to 2" in records[0]["advice"]


def test_without_accumulation_the_effective_batch_grows_and_it_says_so():
    config = {**CONFIG, "gradient_accumulation_steps": 1}
    _, records = watch(ROW, config=config)
    assert records[0]["advice"] == (
        "Consider raising per_device_train_batch_size from 4 to 8 (the effective batch grows 2-fold, which changes "
        "learning)."
    )  # b_max 11, down to a multiple of 4
    assert applied(records[0], config)["per_device_train_batch_size"] == 8
    assert records[0]["suggestions"][0]["expect"]["signal"] == "memory/utilization"


def test_recomputation_is_offered_as_the_other_way():
    config = {**CONFIG, "gradient_checkpointing": True}
    _, records = watch(ROW, config=config)
    assert applied(records[0], config, i=1)["gradient_checkpointing"] is False
    assert records[0]["suggestions"][1]["risk"] == "high"


def test_longer_sequences_to_come_are_reckoned_with():
    """Seen 100 tokens of 200 allowed: a doubles to 11.6, b_max = 5, and 36 has no divisor of 5."""
    config = without(CONFIG, "packing", max_completion_length=200)
    _, records = watch({**ROW, "completions/max_length": 100.0}, config=config, method="grpo")
    assert records == []
    _, records = watch({**ROW, "completions/max_length": 200.0}, config=config, method="grpo")
    assert applied(records[0], config)["per_device_train_batch_size"] == 9


def test_longer_rows_to_come_are_reckoned_with_in_sft():
    """1000 rows of up to 900 tokens, cut at 800, 99 % up to 640: growth 800/640 = 1.25, a = 7.25, b_max = 9."""
    config = without(CONFIG, "packing", max_length=800)
    facts = {"data/longest": 900.0, "data/p99_length": 640.0, "data/rows": 1000.0}
    _, records = watch(ROW, config=config, facts=facts)
    inputs = records[0]["suggestions"][0]["inputs"]
    assert (inputs["length_growth"], inputs["b_max"]) == (1.25, 9)
    _, records = watch(ROW, config=config)
    assert records[0]["confidence"] == "low" and any("longest" in n for n in records[0]["not_checked"])


@pytest.mark.parametrize("peak", [48.0, 70.0])
def test_a_device_in_use_is_fine(peak):
    assert watch({**ROW, "memory/peak_reserved": peak}, codes=("PERF001",))[1] == []


def test_one_high_peak_counts_for_the_segment():
    def row(step):
        return {**ROW, "memory/peak_reserved": 60.0 if step == 3 else 20.0}

    assert watch(row, codes=("PERF001",))[1] == []


def test_vllm_on_the_same_device_takes_its_share():
    """80 * (1 - 0.5) = 40 GiB are left; 27.2 of them are 68 %."""
    config = {**CONFIG, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5}
    assert watch(ROW, config=config, codes=("PERF001",))[1] == []


def test_a_generation_bound_run_is_not_advised():
    row = {**ROW, "time/generate": 1.4, "completions/max_length": 100.0}  # 70 % of the step
    engine, records = watch(row, method="grpo", config={**CONFIG, "max_completion_length": 100})
    assert records == [] and "generation takes 70% of the step" in reason(engine, "PERF001")


def test_too_few_steps_no_device_no_config():
    engine, records = watch(ROW, steps=45)
    assert records == [] and "fewer than 50 steps" in reason(engine, "PERF001")
    engine, records = watch({"loss": 1.0})
    assert records == []
    assert reason(engine, "PERF001") == reason(engine, "PERF002") == "no device memory is measured"
    _, records = watch(ROW, config={})
    assert records[0]["confidence"] == "low" and records[0]["suggestions"] == []
    assert records[0]["advice"].startswith("Consider raising per_device_train_batch_size and lowering")


def test_without_the_static_part_the_forecast_is_cautious():
    """S = 0: a = 6.8, b_max = floor(72/6.8) = 10; the largest divisor of 36 up to 10 is 9. The total may be a fact."""
    row = without(ROW, "memory/static", "memory/device_total")
    _, records = watch(row, facts={"memory/device_total": 80.0})
    assert records[0]["suggestions"][0]["inputs"]["b_max"] == 10
    assert "memory/static: not measured, taken as 0" in records[0]["not_checked"]


# ---------------------------------------------------------------------------------------------------- PERF002

FULL = {**ROW, "memory/peak_reserved": 77.0, "memory/peak_allocated": 74.0, "memory/static": 20.0}


def test_a_full_device_lowers_the_micro_batch():
    """4*0.9*(80 - 20)/(77 - 20) = 3.79, down to a divisor of 36: 3, with 12 accumulation steps."""
    _, records = watch(FULL, steps=40)
    (record,) = records
    assert (record["code"], record["severity"], record["confidence"]) == ("PERF002", "warning", "medium")
    assert record["step"] <= 30
    # 77/80 = 96 %, 74/80 = 92.5 %
    assert record["message"] == (
        "VRAM utilization at 96% (peak 77.0 of 80.0 GiB), 92% of it really in use (limit 90%)."
    )
    assert record["advice"] == (
        "Consider lowering per_device_train_batch_size from 4 to 3 and raising gradient_accumulation_steps from 9 to 12 "
        "(same effective batch)."
    )
    after = applied(record)
    assert (after["per_device_train_batch_size"], after["gradient_accumulation_steps"]) == (3, 12)
    assert applied(record, i=1)["gradient_checkpointing"] is True


def test_reserved_memory_that_is_only_cached_is_fine():
    assert watch({**FULL, "memory/peak_allocated": 50.0}, codes=("PERF002",))[1] == []


def test_one_high_window_of_five_is_fine():
    def row(step):
        return FULL if step in (31, 32) else ROW

    assert watch(row, steps=60, codes=("PERF002",))[1] == []


def test_other_processes_on_the_device_count():
    """This process holds 50, the device 78: with the 28 of others 50 + 28 = 78 are taken."""
    row = {**ROW, "memory/peak_reserved": 50.0, "memory/peak_allocated": 46.0, "memory/device_used": 78.0}
    _, records = watch(row, steps=40, codes=("PERF002",))
    assert records and "peak 78.0 of 80.0" in records[0]["message"]


def test_retried_allocations_need_no_second_sign():
    def row(step):
        return {**FULL, "memory/peak_allocated": 50.0, "memory/alloc_retries": 1.0 + 2.0 * (step > 30)}

    _, records = watch(row, steps=60, codes=("PERF002",))
    assert records[0]["step"] > 30 and "2 allocations of the last" in records[0]["message"]
    steady = {**FULL, "memory/peak_allocated": 50.0, "memory/alloc_retries": 3.0}  # they happened before this segment
    assert watch(steady, steps=60, codes=("PERF002",))[1] == []


def test_a_forecast_is_information():
    """S + (60 - 20)*1.6 = 84 GiB for completions of 160 tokens where 100 were seen."""
    row = {**ROW, "memory/peak_reserved": 62.0, "memory/peak_allocated": 60.0, "memory/static": 20.0}
    row["completions/max_length"] = 100.0
    config = without(CONFIG, "packing", max_completion_length=160)
    _, records = watch(row, steps=40, config=config, method="grpo", codes=("PERF002",))
    assert (records[0]["severity"], records[0]["confidence"]) == ("info", "low")
    assert "1.6 times the longest seen and would take 84.0 GiB" in records[0]["message"]
    far = {**config, "max_completion_length": 4096}  # no basis to forecast so far out
    assert watch(row, steps=40, config=far, method="grpo", codes=("PERF002",))[1] == []


def test_other_ways_to_save_memory():
    config = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
        "use_liger_kernel": False,
        "max_completion_length": 1024,
    }
    _, records = watch({**FULL, "completions/p99_terminated_length": 500.0}, steps=40, config=config, method="grpo")
    changed = [s["patch"][1] for s in records[0]["suggestions"]]
    # 1.1 * 500 = 550, up to a multiple of 64: 576
    assert [(op["path"], op["value"]) for op in changed] == [
        ("/use_liger_kernel", True),
        ("/max_completion_length", 576),
    ]
    assert records[0]["advice"] == "Consider setting use_liger_kernel from False to True."


def test_our_own_trainers_are_not_told_to_use_liger():
    config = {**CONFIG, "per_device_train_batch_size": 1, "gradient_checkpointing": True, "use_liger_kernel": False}
    _, records = watch(FULL, steps=40, config=config | {"diagnose": True}, method="grpo")
    assert records[0]["suggestions"] == []
    _, records = watch(FULL, steps=40, config=config, method="grpo")
    assert applied(records[0], config)["use_liger_kernel"] is True


def test_never_both_at_once():
    for peak in range(4, 80, 4):
        row = {**ROW, "memory/peak_reserved": float(peak), "memory/peak_allocated": peak * 0.98, "memory/static": 2.0}
        engine, _ = watch(row, steps=120)
        assert len(engine.diagnostics()) <= 1
