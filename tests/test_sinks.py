"""Sinks: the lines people read, the JSON lines and OpenTelemetry events programs read."""

import io
import json
import sys

import pytest

from outspoken.diagnostics import sinks
from outspoken.diagnostics.engine import Transition


def diagnostic(**more):
    return {
        "schema": "outspoken.diagnostic/1",
        "id": "run-1-RL016-1",
        "code": "RL016",
        "name": "truncation-saturation",
        "doc": "docs/rules/RL016.md",
        "severity": "warning",
        "state": "firing",
        "confidence": "high",
        "category": "online_rl",
        "step": 210,
        "first_step": 206,
        "fired_step": 210,
        "count": 3,
        "run": "run-1",
        "segment": 0,
        "time": 1_700_000_000.5,
        "message": "31% of the last 512 completions reached max_completion_length=2048 (limit 20%).",
        "advice": "Consider raising max_completion_length from 2048 to 3072.",
        "evidence": [{"signal": "completions/clipped_ratio", "value": 0.31}],
        **more,
    }


def change(state="applied", **more):
    return {
        "schema": "outspoken.change/1",
        "id": "c1",
        "state": state,
        "step": 212,
        "time": 1_700_000_001.0,
        "actor": "demo-agent",
        "fields": {"max_completion_length": {"old": 8, "new": 24}},
        "reason": "",
        "run": "run-1",
        **more,
    }


def verdict(state="improving", **more):
    reason = "reward went from 0.1 to 0.5 (T=9.0)."
    return {"state": state, "confidence": "medium", "step": 120, "reason": reason, "run": "run-1", **more}


@pytest.fixture
def console():
    stream = io.StringIO()
    return sinks.ConsoleSink(stream, colour=False), stream


def test_a_warning_is_exactly_the_promised_line(console):
    sink, stream = console
    sink.transition(Transition(diagnostic(), shown=True))
    assert stream.getvalue() == (
        "[outspoken] WARNING RL016 step 210: 31% of the last 512 completions reached max_completion_length=2048 "
        "(limit 20%). Consider raising max_completion_length from 2048 to 3072.\n"
    )


def test_what_is_not_shown_is_not_printed(console):
    sink, stream = console
    sink.transition(Transition(diagnostic(), shown=False))
    sink.observation(3, {"reward": 1.0})
    sink.close()
    assert stream.getvalue() == ""


def test_resolved_and_reminder(console):
    sink, stream = console
    sink.transition(Transition(diagnostic(step=310), shown=True, kind="reminder"))
    sink.transition(Transition(diagnostic(state="resolved", step=340), shown=True))
    still, resolved = stream.getvalue().splitlines()
    assert still.startswith("[outspoken] WARNING RL016 step 310: (still) 31% of")
    assert resolved == (
        "[outspoken] RESOLVED RL016 step 340: truncation-saturation, which fired at step 210, is over."
    )


def test_changes(console):
    sink, stream = console
    sink.change(change("requested"))
    sink.change(change("applied", reason="taken"))
    sink.change(change("verified", step=240, reason="completions/clipped_ratio is 0.01 (promised: below 0.1)"))
    sink.change(change("failed", step=240, reason="NUM001 fired after the change"))
    sink.change(change("rolled_back", step=241, reason="NUM001 fired after the change"))
    sink.change(change("rejected", fields={}, actor=None, reason="learning_rate is above its maximum 1.0"))
    assert stream.getvalue().splitlines() == [
        "[outspoken] CHANGE applied step 212: max_completion_length 8 -> 24 (asked by demo-agent)",
        "[outspoken] CHANGE verified step 240: max_completion_length 8 -> 24 (asked by demo-agent): "
        "completions/clipped_ratio is 0.01 (promised: below 0.1)",
        "[outspoken] CHANGE failed step 240: max_completion_length 8 -> 24 (asked by demo-agent): "
        "NUM001 fired after the change",
        "[outspoken] CHANGE rolled_back step 241: max_completion_length 24 -> 8 (asked by demo-agent): "
        "NUM001 fired after the change",
        "[outspoken] CHANGE rejected step 212: nothing (asked by unknown): learning_rate is above its maximum 1.0",
    ]


def test_a_verdict_is_told_when_it_changes_and_only_then(console):
    sink, stream = console
    for state in ("warming_up", "improving", "improving", "broken"):
        sink.verdict(verdict(state))
    assert stream.getvalue().splitlines() == [
        "[outspoken] VERDICT improving (medium) step 120: reward went from 0.1 to 0.5 (T=9.0).",
        "[outspoken] VERDICT broken (medium) step 120: reward went from 0.1 to 0.5 (T=9.0).",
    ]


def test_colour_adds_a_second_dim_line_with_the_command(monkeypatch):
    stream = io.StringIO()
    sink = sinks.ConsoleSink(stream, colour=True)
    sink.transition(Transition(diagnostic(), shown=True))
    first, second = stream.getvalue().splitlines()
    assert "\x1b[1;33mWARNING\x1b[0m RL016 step 210: 31%" in first
    assert second.startswith("\x1b[2m") and "why / details: outspoken explain RL016" in second


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("variable", [None, ("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_follows_the_terminal_and_no_color(monkeypatch, variable):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if variable:
        monkeypatch.setenv(*variable)
    stream = Terminal()
    sinks.ConsoleSink(stream).note("hello")
    assert ("\x1b[" in stream.getvalue()) == (variable is None)
    plain = io.StringIO()
    sinks.ConsoleSink(plain).note("hello")
    assert plain.getvalue() == "[outspoken] note: hello\n"


def test_hostile_text_stays_on_one_line_and_is_harmless(console):
    sink, stream = console
    hostile = "a\x1b[2J\x07b\r\nc\u2028d\u202ee\x9b31mf\ud800" + "x" * 5000
    sink.transition(Transition(diagnostic(message=hostile, advice="\x00"), shown=True))
    sink.change(change(actor="evil\n[outspoken] ERROR", reason="\x1b]0;title\x07", state="rejected"))
    sink.verdict(verdict(reason=hostile))
    sink.note(hostile)
    text = stream.getvalue()
    assert len(text.splitlines()) == text.count("\n") == 4
    assert all(char.isprintable() or char == "\n" for char in text)
    assert r"a\x1b[2J\x07b  c d\u202ee\x9b31mf\ud800x" in text
    assert all(len(line) < 2500 for line in text.splitlines())


@pytest.mark.parametrize(
    "text, limit, expected",
    [
        ("plain → text", 50, "plain → text"),
        ("tab\tand\nline", 50, "tab and line"),
        ("\x7f", 50, r"\x7f"),
        ("zero\u200bwidth", 50, r"zero\u200bwidth"),
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abcde…"),
        (None, 50, "None"),
    ],
)
def test_escaped(text, limit, expected):
    assert sinks.escaped(text, limit) == expected


def test_a_stream_that_cannot_encode_gets_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    sinks.ConsoleSink(stream).note("8 → 24")
    assert raw.getvalue() == b"[outspoken] note: 8 \\u2192 24\n"


def test_lines_go_above_a_progress_bar():
    from tqdm import tqdm

    stream = io.StringIO()
    with tqdm(total=10, file=stream, mininterval=0) as bar:
        bar.update(1)
        sinks.ConsoleSink(stream).note("hello")
    text = stream.getvalue()
    # The bar is wiped (carriage return, blanks) before the line, so that the line starts at the margin.
    assert "\r[outspoken] note: hello\n" in text


def test_standard_error_is_looked_up_for_each_line(monkeypatch):
    sink = sinks.ConsoleSink()
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    sink.note("hello")
    assert later.getvalue() == "[outspoken] note: hello\n"


# ---------------------------------------------------------------------- JSON lines


def test_json_lines_hold_the_records():
    stream = io.StringIO()
    sink = sinks.JsonSink(stream)
    sink.transition(Transition(diagnostic(), shown=False))
    sink.transition(Transition(diagnostic(state="resolved"), shown=True))
    sink.change(change("failed"))
    for state in ("improving", "improving", "collapsing"):
        sink.verdict(verdict(state))
    sink.note("hello\nthere")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("outspoken.diagnostic", "warning"),
        ("outspoken.diagnostic", "info"),
        ("outspoken.change", "warning"),
        ("outspoken.verdict", "info"),
        ("outspoken.verdict", "warning"),
        ("outspoken.note", "info"),
    ]
    assert lines[0]["record"] == diagnostic() and lines[0]["shown"] is False and lines[0]["kind"] == "transition"
    assert lines[2]["record"]["fields"] == {"max_completion_length": {"old": 8, "new": 24}}
    assert all(line["timestamp"].endswith("Z") for line in lines)


def test_json_lines_are_strict_json():
    stream = io.StringIO()
    sink = sinks.JsonSink(stream)
    sink.change(
        change(fields={"x": {"old": float("nan"), "new": float("inf")}}, odd={1, 2}, seen=(1.0, float("-inf")))
    )

    def refuse(name):
        raise AssertionError(name)

    (line,) = stream.getvalue().splitlines()
    record = json.loads(line, parse_constant=refuse)["record"]
    assert record["fields"] == {"x": {"old": None, "new": None}}
    assert record["seen"] == [1.0, None]


# ---------------------------------------------------------------------- OpenTelemetry


@pytest.fixture
def otel():
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    exporter, reader = InMemoryLogRecordExporter(), InMemoryMetricReader()
    return sinks.OtelSink(exporter, reader, run_id="run-1"), exporter, reader


def test_events_have_names_severities_and_typed_attributes(otel):
    sink, exporter, _ = otel
    sink.transition(Transition(diagnostic(), shown=True))
    sink.transition(Transition(diagnostic(severity="error"), shown=True))
    sink.transition(Transition(diagnostic(severity="info"), shown=True))
    sink.transition(Transition(diagnostic(severity="error", state="resolved"), shown=True))
    sink.change(change("applied"))
    sink.verdict(verdict("broken"))
    sink.verdict(verdict("broken"))
    sink.note("hello")
    sink.close()
    logs = exporter.get_finished_logs()
    seen = [(r.log_record.event_name, r.log_record.severity_number.value) for r in logs]
    assert seen == [
        ("outspoken.diagnostic", 13),
        ("outspoken.diagnostic", 17),
        ("outspoken.diagnostic", 9),
        ("outspoken.diagnostic", 9),
        ("outspoken.change", 9),
        ("outspoken.verdict", 17),
        ("outspoken.note", 9),
    ]
    first = logs[0].log_record
    assert first.timestamp == 1_700_000_000_500_000_000  # the record's time, in nanoseconds
    assert first.body.startswith("31% of the last 512")
    assert first.attributes["outspoken.code"] == "RL016"
    assert first.attributes["outspoken.state"] == "firing"
    assert first.attributes["outspoken.step"] == 210 and type(first.attributes["outspoken.step"]) is int
    assert first.attributes["outspoken.shown"] is True
    assert first.attributes["outspoken.run.id"] == "run-1"
    applied = logs[4].log_record.attributes
    assert applied["outspoken.change.max_completion_length.old"] == 8
    assert applied["outspoken.change.max_completion_length.new"] == 24
    assert logs[0].resource.attributes["service.name"] == "outspoken"
    assert logs[0].resource.attributes["outspoken.run.id"] == "run-1"


def test_signals_become_gauges_with_units(otel):
    sink, _, reader = otel
    signals = {"reward": 0.5, "memory/peak_reserved": 3.0, "num_completions": 8, "my metric#n": 2.0}
    sink.observation(6, {"reward": 0.1})
    sink.observation(7, {**signals, "loss": float("nan")})
    data = reader.get_metrics_data()
    metrics = {m.name: m for m in data.resource_metrics[0].scope_metrics[0].metrics}
    assert {name: m.data.data_points[0].value for name, m in metrics.items()} == {
        "outspoken.step": 7,
        "outspoken.reward": 0.5,
        "outspoken.memory/peak_reserved": 3.0,
        "outspoken.num_completions": 8,
        "outspoken.my_metric_n": 2.0,
    }
    assert metrics["outspoken.memory/peak_reserved"].unit == "GiBy"
    assert metrics["outspoken.num_completions"].unit == "{completions}"
    sink.close()


def test_a_run_that_invents_metric_names_does_not_grow_without_bound(otel, monkeypatch):
    sink, _, reader = otel
    monkeypatch.setattr(sinks, "MAX_METRICS", 5)
    for i in range(20):
        sink.observation(i, {f"signal{i}": 1.0})
    metrics = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    assert len(metrics) == 5
    sink.close()


def test_the_users_service_name_is_kept(monkeypatch):
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter

    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    exporter = InMemoryLogRecordExporter()
    sink = sinks.OtelSink(exporter)
    sink.note("hello")
    sink.close()
    assert exporter.get_finished_logs()[0].resource.attributes["service.name"] == "mine"


def test_a_collector_that_does_not_answer_is_given_up(monkeypatch):
    import threading

    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter

    release = threading.Event()

    class Hanging(InMemoryLogRecordExporter):
        def export(self, batch):
            release.wait(30)
            return super().export(batch)

    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    sink = sinks.OtelSink(Hanging())
    sink.note("hello")
    closing = threading.Thread(target=sink.close, daemon=True)
    closing.start()
    closing.join(20)  # the exporter would hold it for 30 s
    gave_up = not closing.is_alive()
    release.set()
    assert gave_up


# ---------------------------------------------------------------------- choosing, and not hurting


def kinds(env):
    return [type(s.sink).__name__ for s in sinks.default_sinks(env)]


def test_the_environment_chooses():
    assert kinds({}) == ["ConsoleSink"]
    assert kinds({"OUTSPOKEN_LOG": "console"}) == ["ConsoleSink"]
    assert kinds({"OUTSPOKEN_LOG": "json"}) == ["JsonSink"]
    assert kinds({"OUTSPOKEN_LOG": "OFF"}) == []


def test_an_unknown_mode_is_told(capsys):
    assert kinds({"OUTSPOKEN_LOG": "xml"}) == ["ConsoleSink"]
    assert "OUTSPOKEN_LOG=xml is not known" in capsys.readouterr().err


@pytest.mark.parametrize("which, logs, metrics", [("", True, True), ("LOGS_", True, False), ("METRICS_", False, True)])
def test_an_endpoint_adds_opentelemetry(monkeypatch, which, logs, metrics):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    env = {f"OTEL_EXPORTER_OTLP_{which}ENDPOINT": "http://127.0.0.1:9"}
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.0)
    sink, problem = sinks.otel_sink(env)
    assert problem is None
    assert (sink._log_provider is not None, sink._meter_provider is not None) == (logs, metrics)


def test_a_disabled_sdk_stays_off():
    assert sinks.otel_sink({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}) == (None, None)


def test_a_missing_exporter_is_one_clear_note(monkeypatch, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(sinks, "_import", missing)
    assert kinds({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}) == ["ConsoleSink"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install outspoken[otel]" in err


class Broken:
    def __getattr__(self, name):
        def fail(*args):
            raise OSError("disk\nfull")

        return fail


def test_a_sink_that_raises_does_not_hurt_and_is_reported_once():
    told = []
    sink = sinks.Guarded(Broken(), told.append)
    sink.transition(Transition(diagnostic(), True))
    sink.change(change())
    sink.verdict(verdict())
    sink.note("x")
    sink.observation(1, {})
    sink.close()
    assert told == ["Broken failed and may miss events: OSError: disk full"]


def test_even_a_report_that_fails_does_not_hurt():
    def report(text):
        raise ValueError("closed")

    sinks.Guarded(Broken(), report).note("x")


def test_the_users_sinks_are_guarded_too(capsys):
    from outspoken.diagnostics.callback import DiagnosticsCallback

    callback = DiagnosticsCallback(sinks=[Broken()])
    callback._sinks = callback._make_sinks()  # as at the start of a run
    callback._note("x")
    callback._note("y")
    assert capsys.readouterr().err == ("[outspoken] note: Broken failed and may miss events: OSError: disk full\n")
