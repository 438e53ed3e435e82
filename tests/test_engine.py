"""The engine: the life of a diagnostic, inhibition, budgets, segments, and faults of our own."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Evidence, Finding, Observation, Suggestion, Unknown, change_field
from outspoken.diagnostics.rules.registry import Rule, parameters
from outspoken.diagnostics.view import CAPACITY, RunView


def above(name, limit, message=None):
    """A check that finds something while the newest value of a signal lies above a limit."""

    def check(run, p):
        """Above the limit."""
        value = run.last(name)
        if value is None:
            return Unknown(f"{name} is missing")
        if value <= limit:
            return None
        evidence = [Evidence(name, "value", value, 1, (run.step, run.step), threshold=limit, direction="above")]
        return Finding(message or f"{name} is {value}.", "Consider lowering it.", evidence)

    return check


def make(code, check, **kwargs):
    defaults = {"severity": "warning", "methods": ("sft",), "warm_up": False, "for_": 1, "keep": 2, "params": {}}
    fields = {**defaults, **kwargs}
    return Rule(code, code.lower(), check=check, **fields)


def engine(*rules, **kwargs):
    return Engine(method="sft", config={}, rules={r.code: r for r in rules}, clock=lambda: 0.0, **kwargs)


def feed(e, values, name="x", start=1):
    """Observe values step by step; return [(step, code, state, kind)] of all transitions."""
    events = []
    for i, value in enumerate(values):
        raw = value if isinstance(value, dict) else {name: value}
        for t in e.observe(Observation.from_raw(start + i, raw)):
            events.append((start + i, t.record["code"], t.record["state"], t.kind))
    return events


def states(events):
    return [(step, code, state) for step, code, state, kind in events if kind == "transition"]


class TestLifeCycle:
    def test_waits_for_then_fires_once_then_resolves_after_keep(self):
        e = engine(make("AAA001", above("x", 1), for_=3, keep=2))
        events = feed(e, [2, 2, 2, 2, 2, 0, 0, 0])
        assert states(events) == [(3, "AAA001", "firing"), (7, "AAA001", "resolved")]

    def test_a_gap_starts_the_count_again(self):
        e = engine(make("AAA001", above("x", 1), for_=3))
        assert states(feed(e, [2, 2, 0, 2, 2, 0])) == []
        assert e.diagnostics() == {}

    def test_pending_is_visible_but_no_transition(self):
        e = engine(make("AAA001", above("x", 1), for_=3))
        feed(e, [2, 2])
        assert e.diagnostics()["AAA001"]["state"] == "pending"
        assert e.verdict()["pending"] == [] or e.verdict()["pending"] == ["AAA001"]

    def test_one_clear_evaluation_within_keep_does_not_resolve(self):
        e = engine(make("AAA001", above("x", 1), keep=3))
        assert states(feed(e, [2, 0, 0, 2, 0, 0, 2])) == [(1, "AAA001", "firing")]

    def test_firing_again_is_a_new_episode_with_the_same_fingerprint(self):
        e = engine(make("AAA001", above("x", 1), keep=1))
        feed(e, [2])
        first = e.diagnostics()["AAA001"]
        feed(e, [0, 2], start=2)
        second = e.diagnostics()["AAA001"]
        assert first["fingerprint"] == second["fingerprint"]
        assert first["id"] != second["id"]
        assert (first["fired_step"], second["fired_step"]) == (1, 3)

    def test_lost_sensor_turns_unknown_and_back(self):
        def check(run, p):
            """Doc."""
            last = run.window("x", 1)
            if last is None or last.span[1] != run.step:
                return Unknown("x stopped")
            return above("x", 1)(run, p)

        e = engine(make("AAA001", check, keep=2))
        events = feed(e, [2, {"y": 1}, {"y": 1}, 2, 0, 0])
        assert states(events) == [
            (1, "AAA001", "firing"),
            (3, "AAA001", "unknown"),
            (4, "AAA001", "firing"),
            (6, "AAA001", "resolved"),
        ]

    def test_severity_may_rise_but_is_told_once(self):
        def check(run, p):
            """Doc."""
            value = run.last("x")
            severity = "error" if value > 5 else "warning"
            return Finding("m", "a", [], severity=severity)

        e = engine(make("AAA001", check))
        events = [
            t.record["severity"] for i, v in enumerate((1, 1, 9, 9, 1)) for t in e.observe(Observation(i, {"x": v}))
        ]
        assert events == ["warning", "error"]

    def test_a_new_segment_puts_the_suggestions_of_now_on_record(self):
        e = engine(make("AAA001", above("x", 1)))
        feed(e, [2, 2])
        e.open_segment(2, "change", {"learning_rate": 1})
        again = e.observe(Observation(3, {"x": 2}))
        assert [(t.record["state"], t.shown, t.record["segment"]) for t in again] == [("firing", False, 1)]
        assert e.observe(Observation(4, {"x": 2})) == []

    def test_want_of_data_after_a_change_is_not_unknown_at_once(self):
        def check(run, p):
            """Doc."""
            return above("x", 1)(run, p) if run.has("x") else Unknown("too few")

        e = engine(make("AAA001", check, keep=2))
        feed(e, [2])
        e.open_segment(1, "change")
        events = feed(e, [{"y": 1}] * 25, start=2)
        assert states(events) == [(23, "AAA001", "unknown")]  # 20 points of grace (2..21), then keep=2 evaluations

    def test_count_first_and_last_step(self):
        e = engine(make("AAA001", above("x", 1), for_=2))
        feed(e, [0, 2, 2, 2])
        record = e.diagnostics()["AAA001"]
        assert (record["first_step"], record["fired_step"], record["last_step"], record["count"]) == (2, 3, 4, 3)


class TestInhibition:
    cause = staticmethod(lambda **k: make("AAA001", above("x", 1), **k))
    effect = staticmethod(lambda **k: make("BBB001", above("y", 1), inhibited_by=("AAA001",), **k))

    def test_effect_is_suppressed_while_its_cause_fires(self):
        e = engine(self.cause(), self.effect(for_=2))
        events = states(feed(e, [{"x": 2, "y": 2}] * 3))
        assert events == [(1, "AAA001", "firing"), (2, "BBB001", "suppressed")]
        record = e.diagnostics()["BBB001"]
        assert record["causes"] == [{"code": "AAA001", "relation": "caused_by", "onset_step": 1}]
        assert e.diagnostics()["AAA001"]["inhibits"] == ["BBB001"]

    def test_effect_waits_for_a_pending_cause(self):
        e = engine(self.cause(for_=4), self.effect(for_=1))
        events = states(feed(e, [{"x": 2, "y": 2}] * 6))
        assert events == [(4, "AAA001", "firing"), (5, "BBB001", "suppressed")] or events == [
            (4, "AAA001", "firing"),
            (4, "BBB001", "suppressed"),
        ]

    def test_effect_fires_when_the_cause_is_gone_but_it_is_not(self):
        e = engine(self.cause(keep=1), self.effect())
        events = states(feed(e, [{"x": 2, "y": 2}, {"x": 0, "y": 2}, {"x": 0, "y": 2}]))
        assert events == [
            (1, "AAA001", "firing"),
            (1, "BBB001", "suppressed"),
            (2, "AAA001", "resolved"),
            (2, "BBB001", "firing"),
        ]

    def test_a_firing_effect_is_taken_back_when_its_cause_shows(self):
        e = engine(self.cause(), self.effect())
        events = states(feed(e, [{"x": 0, "y": 2}, {"x": 2, "y": 2}]))
        assert events == [(1, "BBB001", "firing"), (2, "AAA001", "firing"), (2, "BBB001", "suppressed")]

    def test_a_finding_may_name_what_explains_it_in_this_case(self):
        def check(run, p):
            """Doc."""
            return Finding("m", "a", [], explained_by=("AAA001",)) if run.last("y") else None

        e = engine(self.cause(for_=3), make("BBB001", check))
        events = states(feed(e, [{"x": 2, "y": 1}] * 5))
        assert ("BBB001", "firing") not in [(code, state) for _, code, state in events]
        assert ("BBB001", "suppressed") in [(code, state) for _, code, state in events]

    def test_a_cause_that_never_comes_does_not_hold_a_finding_back_for_ever(self):
        def check(run, p):
            """Doc."""
            return Finding("m", "a", [], explained_by=("AAA001",))

        e = engine(self.cause(), make("BBB001", check))
        events = states(feed(e, [{"x": 0}] * 30))
        assert events == [(21, "BBB001", "firing")]  # for_=1, and twenty evaluations of waiting

    def test_suppressed_is_never_shown(self):
        e = engine(self.cause(), self.effect())
        shown = [t for t in e.observe(Observation(1, {"x": 2, "y": 2})) if t.shown]
        assert [t.record["code"] for t in shown] == ["AAA001"]


class TestBudget:
    def test_three_warnings_in_a_hundred_steps_then_a_digest(self):
        rules = [make(f"AAA{i:03d}", above("x", 1)) for i in range(6)]
        e = engine(*rules)
        transitions = e.observe(Observation(1, {"x": 2}))
        assert [t.shown for t in transitions] == [True] * 3 + [False] * 3
        for step in range(2, 103):
            e.observe(Observation(step, {"x": 2}))
        assert e.take_digest() == "3 more diagnostics are recorded but not shown here: AAA003, AAA004, AAA005."
        assert e.take_digest() is None

    def test_errors_are_always_shown(self):
        e = engine(*[make(f"AAA{i:03d}", above("x", 1), severity="error") for i in range(6)])
        assert all(t.shown for t in e.observe(Observation(1, {"x": 2})))

    def test_reminders_come_at_doubling_gaps(self):
        e = engine(make("AAA001", above("x", 1)))
        events = feed(e, [2] * 800)
        reminders = [step for step, _, _, kind in events if kind == "reminder"]
        # fired at 1; 100 steps later, then 200, then 400
        assert reminders == [101, 301, 701]


class TestSegmentsAndWindows:
    def test_a_segment_starts_windows_and_baseline_anew(self):
        e = engine()
        feed(e, [1.0] * 30)
        assert e.view.base("x").median == 1.0
        e.open_segment(30, "change", {"learning_rate": 2})
        assert e.view.base("x") is None and e.view.window("x") is None
        feed(e, [5.0] * 22, start=31)
        assert e.view.base("x").median == 5.0
        assert len(e.view.window("x")) == 22
        assert e.view.segment == 1

    def test_a_step_counter_that_goes_back_opens_a_segment(self):
        e = engine()
        feed(e, [1.0] * 5)
        feed(e, [1.0], start=2)
        assert e.view.segment == 1

    def test_baseline_is_points_3_to_22(self):
        e = engine()
        feed(e, list(range(1, 31)))
        base = e.view.base("x")
        assert base.window == (3, 22) and base.n == 20
        assert base.mean == sum(range(3, 23)) / 20  # 12.5

    def test_memory_is_bounded(self):
        e = engine()
        for step in range(1, 5000):
            e.observe(Observation(step, {"x": float(step), f"name{step}": 1.0}, {"bad": "nan"}))
        assert len(e.view.rings) <= 2000
        assert len(e.view.window("x")) == CAPACITY
        assert len(e.view.blocks("x")) <= 257
        assert len(e.view.nonfinite["bad"]) <= 64

    def test_blocks_keep_the_mean_of_the_whole_run(self):
        e = engine()
        feed(e, list(range(1, 8001)))
        blocks = e.view.blocks("x")
        open_sum, open_n = e.view.rings["x"].pending_block
        assert sum(mean * n for _, mean, n in blocks) + open_sum == pytest.approx(8000 * 8001 / 2)
        assert sum(n for *_, n in blocks) + open_n == 8000

    def test_pooling_uses_counts(self):
        e = engine()
        feed(e, [{"share": 0.5, "share#n": 10}, {"share": 0.0, "share#n": 30}])
        pooled = e.view.pooled("share", min_n=40)
        assert (pooled.k, pooled.n, pooled.span) == (5, 40, (1, 2))
        assert e.view.pooled("share", min_n=41) is None
        assert e.view.pooled("share", min_n=20).n == 30  # the newest step alone is enough


class TestFourStates:
    def view(self, config=None, method="grpo"):
        return Engine(method=method, config=config or {}, rules={})

    def test_value_nonfinite_not_emitted_impossible(self):
        e = self.view({"beta": 0})
        e.observe(Observation.from_raw(1, {"reward": 1.0, "entropy": math.nan}))
        assert e.view.state("reward") == "value"
        assert e.view.state("entropy") == "nonfinite"
        assert e.view.state("grad_norm") == "not_emitted"
        assert e.view.state("kl") == "impossible"  # beta=0: no reference model

    def test_newest_counts(self):
        e = self.view()
        e.observe(Observation.from_raw(1, {"reward": math.inf}))
        e.observe(Observation.from_raw(2, {"reward": 1.0}))
        assert e.view.state("reward") == "value"
        assert e.view.share_nonfinite("reward", 5) == (1, 2)

    def test_a_missing_signal_makes_a_rule_unknown_never_fine(self):
        e = engine(make("AAA001", above("x", 1), needs=("x",)))
        feed(e, [{"y": 1}] * 12)
        assert e.not_checked() == [{"code": "AAA001", "name": "aaa001", "reason": "x is not measured"}]

    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (1, ("signals", 1.0)),
            (True, ("signals", 1.0)),
            ("0.5", ("signals", 0.5)),
            (float("nan"), ("nonfinite", "nan")),
            ("1e400", ("nonfinite", "inf")),
            (-math.inf, ("nonfinite", "-inf")),
            (10**400, ("nonfinite", "inf")),
            ([1, 2], ("unreadable", "[1, 2]")),
            ("high", ("unreadable", "'high'")),
        ],
    )
    def test_raw_values_are_sorted(self, raw, expected):
        where, value = expected
        observation = Observation.from_raw(1, {"x": raw})
        assert getattr(observation, where) == {"x": value}

    def test_none_is_not_emitted(self):
        observation = Observation.from_raw(1, {"x": None})
        assert not observation.signals and not observation.nonfinite and not observation.unreadable


class TestFaultsOfOurs:
    def test_a_rule_that_raises_is_reported_and_switched_off(self):
        calls = []

        def check(run, p):
            """Doc."""
            calls.append(run.step)
            raise ZeroDivisionError("oops")

        e = engine(make("AAA001", check), make("BBB001", above("x", 1)))
        events = states(feed(e, [2] * 10))
        assert events == [(1, "BBB001", "firing")]
        assert len(calls) == 3
        assert e.failed_rules() == {"AAA001": "the rule failed: ZeroDivisionError: oops"}

    def test_unknown_codes_and_parameters_are_refused(self):
        rule = make("AAA001", above("x", 1), params={"limit": 0.2})
        with pytest.raises(ValueError, match="did you mean AAA001"):
            engine(rule, params={"AAA002": {}})
        with pytest.raises(ValueError, match="AAA001 has no parameter 'limits' \\(it has: limit\\)"):
            engine(rule, params={"AAA001": {"limits": 1}})
        with pytest.raises(ValueError, match="must be a number, not 'high'"):
            engine(rule, params={"AAA001": {"limit": "high"}})
        with pytest.raises(ValueError, match="diagnostics_ignore names 'ZZZ999'"):
            engine(rule, ignore=["ZZZ999"])
        assert parameters(rule, {"limit": 0.5}).limit == 0.5

    def test_ignored_rules_are_silent(self):
        e = engine(make("AAA001", above("x", 1)), ignore=["AAA001"])
        assert feed(e, [2, 2]) == []

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.dictionaries(
                st.sampled_from(
                    ["loss", "reward", "entropy", "kl", "grad_norm", "completions/clipped_ratio", "weird"]
                ),
                st.one_of(st.floats(), st.integers(), st.text(max_size=5), st.none(), st.lists(st.integers())),
                max_size=5,
            ),
            max_size=40,
        ),
        st.sampled_from(["grpo", "sft", "dpo", "unknown"]),
    )
    def test_any_metrics_whatever_never_raise(self, rows, method):
        e = Engine(method=method, config={})
        for step, row in enumerate(rows):
            for transition in e.observe(Observation.from_raw(step, row)):
                assert transition.record["state"] in ("firing", "resolved", "suppressed", "unknown")
        e.finish()
        assert e.failed_rules() == {}


def test_what_facts_alone_tell_is_told_before_the_first_step():
    def check(run, p):
        """Doc."""
        return Finding("nothing is trainable", "unfreeze", []) if run.facts["trainable_parameters"] == 0 else None

    e = engine(make("AAA001", check), make("BBB001", above("x", 1), needs=("x",)))
    e.view.facts["trainable_parameters"] = 0
    assert [(t.record["code"], t.record["state"], t.record["fired_step"]) for t in e.begin()] == [
        ("AAA001", "firing", 0)
    ]
    assert feed(e, [0]) == []


def test_messages_are_bounded():
    e = engine(make("AAA001", above("x", 1, message="m" * 10_000)))
    (transition,) = e.observe(Observation(1, {"x": 2}))
    assert len(transition.record["message"]) == 2000


def test_suggestion_patch_begins_with_a_test_of_the_old_value():
    suggestion = Suggestion("X.1", "t", "suggest", "live", change_field("a/b", 1, 2))
    assert suggestion.as_dict()["patch"] == [
        {"op": "test", "path": "/a~1b", "value": 1},
        {"op": "replace", "path": "/a~1b", "value": 2},
    ]


def test_warm_up_counts_the_schedule():
    view = RunView("sft", {"warmup_steps": 0.1}, {})
    view.total_steps, view.points, view.step = 1000, 50, 99
    assert view.warmup_steps == 100 and not view.warmed_up
    view.step = 100
    assert view.warmed_up
