"""DAT003: rows without labels, from the prepared data set and from the steps."""

import jsonpatch
import pytest

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rules.registry import PAGE_SECTIONS, all_rules

RULE = all_rules()["DAT003"]
CONFIG = {"max_length": 1024}


def watch(shares, n=16, facts=None, config=CONFIG, method="sft"):
    """The engine after one step per share of rows without labels (None: not measured), n rows each."""
    engine = Engine(method=method, config=config, facts=facts or {}, rules={"DAT003": RULE})
    transitions = []
    for step, share in enumerate(shares, start=1):
        signals = {"loss": 1.0}
        if share is not None:
            signals |= {"samples/no_supervised": share, "samples/no_supervised#n": float(n)}
        transitions += engine.observe(Observation(step, signals))
    assert engine.failed_rules() == {}
    return engine, [t.record for t in transitions if t.kind == "transition"]


def test_page():
    assert [line[3:] for line in RULE.page.splitlines() if line.startswith("## ")] == list(PAGE_SECTIONS)


def test_the_data_set_before_training():
    facts = {"data/no_supervised_share": 0.3, "data/rows": 1000.0, "data/longest": 3000.0, "data/p99_length": 1500.0}
    _, (record,) = watch([0.0] * 3, facts=facts)
    assert (record["step"], record["severity"]) == (1, "error")
    assert record["message"] == "30.0% of the 1,000 rows have no token that carries loss (limit 1%)."
    assert record["advice"] == (
        "If these rows are cut before their answer, consider raising max_length from 1024 to 1536; else check the "
        "response template and the columns that mark what is trained, and drop such rows."
    )  # 1500 up to a multiple of 64 is 1536, less than 2*1024
    assert jsonpatch.apply_patch(dict(CONFIG), record["suggestions"][0]["patch"]) == {"max_length": 1536}
    assert record["suggestions"][1]["applicability"] == "template"


@pytest.mark.parametrize(("share", "severity"), [(0.2001, "error"), (0.2, "warning"), (0.011, "warning")])
def test_severity_by_share(share, severity):
    _, (record,) = watch([None], facts={"data/no_supervised_share": share})
    assert record["severity"] == severity


@pytest.mark.parametrize("share", [0.0, 0.005, 0.01, float("nan"), True])
def test_a_few_cut_rows_are_fine(share):
    assert watch([0.0] * 5, facts={"data/no_supervised_share": share})[1] == []


def test_no_longer_rows_when_none_is_cut():
    facts = {"data/no_supervised_share": 0.5, "data/longest": 900.0}
    _, (record,) = watch([None], facts=facts)
    assert [s["patch"] for s in record["suggestions"]] == [[]]
    assert record["advice"].startswith("Check the response template")


def test_a_step_without_any_label_and_three_of_them():
    _, records = watch([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], n=2)
    assert [(r["step"], r["severity"]) for r in records] == [(2, "warning"), (6, "error")]
    assert records[1]["message"] == "no row had a token that carries loss in 3 of the last 6 steps (last: step 6)."


def test_shares_are_pooled_over_rows():
    """4 of 64 rows: P(X >= 4 | 64, 1 %) = 0.0040, not enough; 6 of 64: 0.00005, enough for 1 % but not for 20 %."""
    one_row = 1 / 16
    assert watch([one_row, one_row, one_row, one_row])[1] == []
    _, records = watch([2 * one_row, 2 * one_row, one_row, one_row])
    assert [(r["step"], r["severity"]) for r in records] == [(3, "warning")]
    # At step 3: 5 of 48 rows, 10.4 %; P(X >= 5 | 48, 1 %) = 0.0001.
    assert records[0]["message"] == "10.4% of the last 48 rows have no token that carries loss (limit 1%)."


def test_half_of_the_rows_is_an_error():
    _, records = watch([0.5] * 4)
    assert (records[0]["step"], records[0]["severity"]) == (3, "error")


def test_one_odd_row_in_a_while_is_fine():
    """1 row of 16 every 25 steps: 0.25 %."""
    assert watch([1 / 16 if i % 25 == 0 else 0.0 for i in range(300)])[1] == []


def test_what_cannot_be_known():
    engine, records = watch([None] * 5)
    assert records == []
    assert engine.not_checked()[0]["reason"].startswith("samples/no_supervised and data/no_supervised_share")
    assert watch([1.0] * 5, method="grpo")[0].diagnostics() == {}
