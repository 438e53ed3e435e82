"""Where diagnostics, changes and verdicts go: lines for people, JSON lines for programs, OpenTelemetry.

A sink takes events and prints or sends them; it judges nothing. What an event says may hold text from outside (a
model's completion, a metric's name), so whatever is shown is escaped and bounded.
"""

import json
import math
import os
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from outspoken.diagnostics import signals as signal_table

if TYPE_CHECKING:  # the engine loads numpy, which who only reads a run does not need
    from outspoken.diagnostics.engine import Transition

MAX_SHOWN = 1000  # characters of one text within a line
MAX_METRICS = 500  # signals that become OpenTelemetry metrics
CLOSE_SECONDS = 5  # how long the last OpenTelemetry export may take

PREFIX = "[outspoken]"
_SEVERITY_NUMBER = {"error": 17, "warning": 13, "info": 9}  # OpenTelemetry's ERROR, WARN, INFO
_COLOURS = {"error": "1;31", "warning": "1;33", "info": "36", "good": "32", "bad": "1;31", "plain": "0", "dim": "2"}
_VERDICT_COLOURS = {
    "improving": "good",
    "converged": "good",
    "broken": "bad",
    "collapsing": "bad",
    "over_optimising": "warning",
    "stalled_no_signal": "warning",
    "drifting": "warning",
}


class Sink(Protocol):
    """What a sink does. Records are those of docs/architecture.md."""

    def transition(self, transition: "Transition") -> None: ...

    def change(self, record: Mapping[str, Any]) -> None: ...

    def verdict(self, record: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def observation(self, step: int, signals: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------- text that is safe to show


def escaped(text: Any, limit: int = MAX_SHOWN) -> str:
    """The text on one line, at most `limit` characters, without anything a terminal would obey.

    White space of every kind becomes a space; control characters, ANSI sequences, characters that change the
    direction of writing and lone surrogates become visible escapes.

    >>> escaped("a" + chr(27) + "[31m" + chr(10) + "b")
    'a\\\\x1b[31m b'
    """
    kept = []
    for char in str(text)[: limit + 1]:
        if char.isprintable():
            kept.append(char)
        elif char.isspace() and unicodedata.category(char) != "Cf":
            kept.append(" ")
        else:
            kept.append(char.encode("unicode_escape").decode("ascii"))
    line = "".join(kept)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def value_text(value: Any) -> str:
    """A config value as it stands in a line: numbers short, strings quoted only where they need it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value and not any(c.isspace() for c in value):
        return escaped(value, 80)
    return escaped(json.dumps(value, default=str), 80)


def transition_line(record: Mapping[str, Any], still: bool = False) -> str:
    """One line about a diagnostic, without prefix: `WARNING RL016 step 210: message advice`."""
    code, step, state = escaped(record.get("code"), 20), escaped(record.get("step"), 20), record.get("state")
    if state == "resolved":
        since = record.get("fired_step")
        fired = f", which fired at step {escaped(since, 20)}," if since is not None else ""
        return f"RESOLVED {code} step {step}: {escaped(record.get('name'), 80)}{fired} is over."
    said = f"{escaped(record.get('message', ''))} {escaped(record.get('advice', ''))}".strip()
    if state in ("suppressed", "unknown"):
        word = {"suppressed": "explained by another diagnostic", "unknown": "can no longer be judged"}[state]
        said = f"({word}) {said}"
    elif state == "pending":
        said = f"(not for long enough to be sure) {said}"
    elif still:
        said = f"(still) {said}"
    return f"{escaped(record.get('severity', 'info'), 20).upper()} {code} step {step}: {said}"


def change_line(record: Mapping[str, Any]) -> str:
    """One line about a change: `CHANGE applied step 212: max_completion_length 8 -> 24 (asked by demo-agent)`."""
    state = record.get("state")
    undone = state == "rolled_back"
    arrows = []
    for name, values in dict(record.get("fields") or {}).items():
        old, new = values.get("old"), values.get("new")
        first, second = (new, old) if undone else (old, new)
        arrows.append(f"{escaped(name, 80)} {value_text(first)} -> {value_text(second)}")
    what = ", ".join(arrows) or "nothing"
    line = (
        f"CHANGE {state} step {record.get('step')}: {what} (asked by {escaped(record.get('actor') or 'unknown', 80)})"
    )
    reason = record.get("reason")
    return f"{line}: {escaped(reason)}" if reason and state not in ("applied", "requested") else line


def verdict_line(record: Mapping[str, Any]) -> str:
    """One line about the run's state: `VERDICT improving (medium) step 120: reason`."""
    state, confidence = escaped(record.get("state"), 40), escaped(record.get("confidence"), 20)
    step = escaped(record.get("step"), 20)
    return f"VERDICT {state} ({confidence}) step {step}: {escaped(record.get('reason', ''))}"


# ---------------------------------------------------------------------- for people


class ConsoleSink:
    """One line for each event that a person should see.

    Args:
        stream: where to write; standard error by default, looked up anew for each line.
        colour: whether to use colour and the second, dim line; None: on a terminal, unless NO_COLOR is set.
    """

    def __init__(self, stream: TextIO | None = None, colour: bool | None = None):
        self._stream = stream
        self._colour = colour
        self._state = "warming_up"

    def transition(self, transition: "Transition") -> None:
        if not transition.shown:
            return
        record = transition.record
        resolved = record.get("state") == "resolved"
        still = transition.kind == "reminder"
        self._say(transition_line(record, still), "good" if resolved else str(record.get("severity")))
        if self._colourful() and not resolved and not still:
            _write(self._out(), _paint(f"            why / details: outspoken explain {record.get('code')}", "dim"))

    def change(self, record: Mapping[str, Any]) -> None:
        state = record.get("state")
        if state != "requested":  # applied or rejected follows at once
            colours = {"verified": "good", "failed": "bad", "rejected": "bad", "rolled_back": "warning"}
            self._say(change_line(record), colours.get(str(state), "info"))

    def verdict(self, record: Mapping[str, Any]) -> None:
        state = str(record.get("state"))
        if state != self._state:
            self._state = state
            self._say(verdict_line(record), _VERDICT_COLOURS.get(state, "info"))

    def note(self, text: str) -> None:
        self._say(f"note: {escaped(text)}", "plain")

    def observation(self, step: int, signals: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass

    def _say(self, line: str, colour: str) -> None:
        out = self._out()
        if self._colourful():
            word, _, rest = line.partition(" ")
            _write(out, f"{_paint(PREFIX, 'dim')} {_paint(word, colour)} {rest}")
        else:
            _write(out, f"{PREFIX} {line}")

    def _out(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    def _colourful(self) -> bool:
        if self._colour is not None:
            return self._colour
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return bool(getattr(self._out(), "isatty", lambda: False)())


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS.get(colour, '0')}m{text}\x1b[0m"


def _write(stream: TextIO, line: str) -> None:
    """Write a line whole, above a progress bar if there is one, whatever the stream can encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    bars = sys.modules.get("tqdm")
    if bars is not None:
        bars.tqdm.write(line, file=stream)
    else:
        stream.write(line + "\n")
    stream.flush()


# ---------------------------------------------------------------------- for programs


class JsonSink:
    """Every event as one line of strict JSON, through structlog.

    `event` is `outspoken.diagnostic`, `outspoken.change`, `outspoken.verdict` or `outspoken.note`; the record stands
    under `record`, and a diagnostic tells with `shown` and `kind` what a person would have seen.

    Args:
        stream: where to write; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None):
        import structlog

        self._stream = stream
        self._log = structlog.wrap_logger(
            _LineLogger(lambda: sys.stdout if self._stream is None else self._stream),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(serializer=strict_json),
            ],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )
        self._state = ""

    def transition(self, transition: "Transition") -> None:
        record = transition.record
        level = str(record.get("severity")) if record.get("state") == "firing" else "info"
        say = getattr(self._log, level if level in _SEVERITY_NUMBER else "info")
        say("outspoken.diagnostic", kind=transition.kind, shown=transition.shown, record=record)

    def change(self, record: Mapping[str, Any]) -> None:
        bad = record.get("state") in ("failed", "rejected", "rolled_back")
        (self._log.warning if bad else self._log.info)("outspoken.change", record=record)

    def verdict(self, record: Mapping[str, Any]) -> None:
        state = str(record.get("state"))
        if state != self._state:
            self._state = state
            bad = _VERDICT_COLOURS.get(state) in ("bad", "warning")
            (self._log.warning if bad else self._log.info)("outspoken.verdict", record=record)

    def note(self, text: str) -> None:
        self._log.info("outspoken.note", text=str(text)[:MAX_SHOWN])

    def observation(self, step: int, signals: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _LineLogger:
    """What structlog hands its rendered lines to."""

    def __init__(self, stream: Callable[[], TextIO]):
        self._stream = stream

    def msg(self, line: str) -> None:
        _write(self._stream(), line)

    info = warning = error = msg


def strict_json(value: Any, **_: Any) -> str:
    """JSON without NaN or infinities (they become null); anything unknown as text."""
    try:
        return json.dumps(value, allow_nan=False, default=_jsonable)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=_jsonable)


def _jsonable(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


# ---------------------------------------------------------------------- OpenTelemetry


class OtelSink:
    """Events as OpenTelemetry log events, signals as gauges.

    Event names are `outspoken.diagnostic`, `outspoken.change`, `outspoken.verdict` and `outspoken.note`; metrics are
    called `outspoken.<signal>`, and `outspoken.step` is the step they belong to.

    Args:
        log_exporter: an OpenTelemetry log record exporter, or None to send no events.
        metric_reader: an OpenTelemetry metric reader, or None to send no metrics.
        run_id: becomes the resource attribute `outspoken.run.id`.
    """

    def __init__(self, log_exporter: Any = None, metric_reader: Any = None, run_id: str | None = None):
        from opentelemetry.sdk.resources import Resource

        named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        attributes: dict[str, str] = {} if named else {"service.name": "outspoken"}
        if run_id is not None:
            attributes["outspoken.run.id"] = run_id
        resource = Resource.create(attributes)
        self._state = ""
        self._gauges: dict[str, Any] = {}
        self._log_provider: Any = None
        self._meter_provider: Any = None
        if log_exporter is not None:
            from opentelemetry.sdk._logs import LoggerProvider
            from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

            self._log_provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
            self._log_provider.add_log_record_processor(BatchLogRecordProcessor(log_exporter))
            self._logger = self._log_provider.get_logger("outspoken")
        if metric_reader is not None:
            from opentelemetry.sdk.metrics import MeterProvider

            self._meter_provider = MeterProvider([metric_reader], resource=resource, shutdown_on_exit=False)
            self._meter = self._meter_provider.get_meter("outspoken")

    def transition(self, transition: "Transition") -> None:
        record = transition.record
        severity = str(record.get("severity")) if record.get("state") == "firing" else "info"
        keys = ("code", "name", "severity", "state", "confidence", "category", "step", "first_step", "fired_step")
        more = {"kind": transition.kind, "shown": transition.shown, "doc": record.get("doc")}
        attributes = self._attributes(record, (*keys, "count", "segment"), **more)
        body = f"{record.get('message', '')} {record.get('advice', '')}".strip()
        self._emit("outspoken.diagnostic", severity, body, attributes, record.get("time"))

    def change(self, record: Mapping[str, Any]) -> None:
        severity = "warning" if record.get("state") in ("failed", "rejected", "rolled_back") else "info"
        attributes = self._attributes(record, ("id", "state", "step", "actor", "reason", "diagnostic", "segment"))
        for name, values in dict(record.get("fields") or {}).items():
            attributes[f"outspoken.change.{name}.old"] = _attribute(values.get("old"))
            attributes[f"outspoken.change.{name}.new"] = _attribute(values.get("new"))
        self._emit("outspoken.change", severity, change_line(record), attributes, record.get("time"))

    def verdict(self, record: Mapping[str, Any]) -> None:
        state = str(record.get("state"))
        if state == self._state:
            return
        self._state = state
        colour = _VERDICT_COLOURS.get(state)
        severity = {"bad": "error", "warning": "warning"}.get(str(colour), "info")
        attributes = self._attributes(record, ("state", "confidence", "step", "segment", "runner_up"))
        self._emit("outspoken.verdict", severity, str(record.get("reason", "")), attributes, record.get("time"))

    def note(self, text: str) -> None:
        self._emit("outspoken.note", "info", str(text)[:MAX_SHOWN], {}, None)

    def observation(self, step: int, signals: Mapping[str, float]) -> None:
        if self._meter_provider is None:
            return
        for name, value in (("step", step), *signals.items()):
            if math.isfinite(value):
                gauge = self._gauge(name)
                if gauge is not None:
                    gauge.set(float(value))

    def close(self) -> None:
        """Send what is left; a collector that does not answer is given up after `CLOSE_SECONDS`."""
        ends = [provider.shutdown for provider in (self._log_provider, self._meter_provider) if provider is not None]
        threads = [threading.Thread(target=end, daemon=True) for end in ends]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            if len(self._gauges) >= MAX_METRICS:
                return None
            row = signal_table.lookup(name)
            # A metric's name may hold letters, digits and _ . - / only, its unit no spaces.
            metric = re.sub(r"[^A-Za-z0-9_./-]", "_", f"outspoken.{name}")[:255]
            unit = _UNITS.get(row.unit, f"{{{row.unit.replace(' ', '_')}}}"[:63]) if row is not None else ""
            self._gauges[name] = self._meter.create_gauge(metric, unit, row.meaning if row is not None else "")
        return self._gauges[name]

    def _attributes(self, record: Mapping[str, Any], keys: tuple[str, ...], **more: Any) -> dict[str, Any]:
        values = {key: record.get(key) for key in keys} | more | {"run.id": record.get("run")}
        return {f"outspoken.{key}": _attribute(value) for key, value in values.items() if value is not None}

    def _emit(self, event: str, severity: str, body: str, attributes: Mapping[str, Any], at: float | None) -> None:
        if self._log_provider is None:
            return
        from opentelemetry._logs import LogRecord, SeverityNumber

        self._logger.emit(
            LogRecord(
                event_name=event,
                timestamp=int(at * 1e9) if at is not None else None,
                severity_number=SeverityNumber(_SEVERITY_NUMBER.get(severity, 9)),
                severity_text=severity.upper(),
                body=body,
                attributes=dict(attributes),
            )
        )


_UNITS = {"1": "1", "s": "s", "GiB": "GiBy"}


def _attribute(value: Any) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else json.dumps(value, default=str)


def otel_sink(env: Mapping[str, str], run_id: str | None = None) -> tuple[OtelSink | None, str | None]:
    """The OpenTelemetry sink that the environment asks for, and a note if it asks for one that cannot be made.

    It is asked for by `OTEL_EXPORTER_OTLP_ENDPOINT`, or for one kind by `OTEL_EXPORTER_OTLP_LOGS_ENDPOINT` and
    `OTEL_EXPORTER_OTLP_METRICS_ENDPOINT`; the exporters read these and the other OTEL variables themselves.
    """
    common = env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    logs = common or env.get("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT")
    metrics = common or env.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    if not (logs or metrics) or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None, None
    grpc = env.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").lower() == "grpc"
    package = f"opentelemetry-exporter-otlp-proto-{'grpc' if grpc else 'http'}"
    install = f"pip install {package}" if grpc else "pip install outspoken[otel]"
    try:
        log_exporter = metric_reader = None
        if logs:
            log_exporter = _import(
                f"opentelemetry.exporter.otlp.proto.{_flavour(grpc)}._log_exporter"
            ).OTLPLogExporter()
        if metrics:
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

            exporters = _import(f"opentelemetry.exporter.otlp.proto.{_flavour(grpc)}.metric_exporter")
            metric_reader = PeriodicExportingMetricReader(exporters.OTLPMetricExporter())
        return OtelSink(log_exporter, metric_reader, run_id), None
    except ImportError:
        return None, (
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but {package} is not installed, so nothing is sent; "
            f"install it with `{install}`."
        )
    except Exception as error:  # a wrong endpoint, header or timeout in the environment
        return None, f"OpenTelemetry export is off: {type(error).__name__}: {error}"


def _flavour(grpc: bool) -> str:
    return "grpc" if grpc else "http"


def _import(name: str) -> Any:
    from importlib import import_module

    return import_module(name)


# ---------------------------------------------------------------------- several sinks, none of which may hurt


class Guarded:
    """A sink that cannot hurt: what it raises is caught, and reported once by `report`."""

    def __init__(self, sink: Sink, report: Callable[[str], None] | None = None):
        self.sink = sink
        self._report = report or _report_on_stderr
        self._reported = False

    def transition(self, transition: "Transition") -> None:
        self._call(lambda: self.sink.transition(transition))

    def change(self, record: Mapping[str, Any]) -> None:
        self._call(lambda: self.sink.change(record))

    def verdict(self, record: Mapping[str, Any]) -> None:
        self._call(lambda: self.sink.verdict(record))

    def note(self, text: str) -> None:
        self._call(lambda: self.sink.note(text))

    def observation(self, step: int, signals: Mapping[str, float]) -> None:
        self._call(lambda: self.sink.observation(step, signals))

    def close(self) -> None:
        self._call(self.sink.close)

    def _call(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:
            if not self._reported:
                self._reported = True
                name = type(self.sink).__name__
                try:
                    self._report(f"{name} failed and may miss events: {type(error).__name__}: {escaped(error, 300)}")
                except Exception:  # nowhere left to say it
                    return


def _report_on_stderr(text: str) -> None:
    sys.stderr.write(f"{PREFIX} note: {text}\n")


def default_sinks(env: Mapping[str, str] | None = None, run_id: str | None = None) -> list[Guarded]:
    """The sinks that the environment asks for, each guarded.

    `OUTSPOKEN_LOG=json` writes JSON lines instead of lines for people, `OUTSPOKEN_LOG=off` neither. OpenTelemetry is
    added when an OTLP endpoint is set (see `otel_sink`).
    """
    env = os.environ if env is None else env
    mode = env.get("OUTSPOKEN_LOG", "").strip().lower()
    sinks: list[Guarded] = []
    if mode == "json":
        sinks.append(Guarded(JsonSink()))
    elif mode not in ("off", "none", "0"):
        sinks.append(Guarded(ConsoleSink()))
    if mode not in ("", "console", "json", "off", "none", "0"):
        sinks[0].note(f"OUTSPOKEN_LOG={mode} is not known (json, console or off); lines for people are written.")
    otel, problem = otel_sink(env, run_id)
    if otel is not None:
        sinks.append(Guarded(otel))
    if problem is not None:
        for sink in sinks[:1] or [Guarded(ConsoleSink())]:
            sink.note(problem)
    return sinks
