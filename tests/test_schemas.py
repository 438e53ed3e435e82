"""The schemas: valid records of every kind pass and survive JSON, mutated ones are refused in one clear sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from outspoken import schemas
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Evidence, Expectation, Finding, Observation, Suggestion, change_field
from outspoken.diagnostics.rules.registry import Rule
from outspoken.diagnostics.verdict import STATES

# -- strategies: what a record may hold, written down apart from the schemas

number = st.floats(allow_nan=False, allow_infinity=False)
step = st.integers(0, 2**40)
word = st.text(min_size=1, max_size=20)
text = st.text(max_size=60)
code = st.from_regex(r"\A[A-Z]{2,5}[0-9]{3}\Z")
json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3),
    max_leaves=5,
)
json_object = st.dictionaries(word, json_value, max_size=3)


def few(strategy):
    return st.lists(strategy, max_size=2)


def maybe(strategy):
    return st.none() | strategy


operation = st.fixed_dictionaries(
    {"op": st.sampled_from(["test", "replace", "add"]), "path": word.map("/".__add__), "value": json_value}
)
patch = few(operation)
expectation = st.fixed_dictionaries(
    {
        "signal": word,
        "direction": st.sampled_from(["below", "above"]),
        "value": number,
        "within_steps": st.integers(1, 1000),
    },
    optional={"min_n": st.integers(1, 500)},
)
evidence = st.fixed_dictionaries(
    {
        "signal": word,
        "statistic": word,
        "value": maybe(number),
        "n": step,
        "window": st.lists(step, min_size=2, max_size=2),
    },
    optional={"baseline": number, "threshold": number, "direction": st.sampled_from(["above", "below"])},
)
severity = st.sampled_from(["error", "warning", "info"])
confidence = st.sampled_from(["low", "medium", "high"])
request_id = st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}\Z")

suggestion = st.fixed_dictionaries(
    {
        "id": word,
        "title": text,
        "applicability": st.sampled_from(["auto", "suggest", "template", "inspect"]),
        "when": st.sampled_from(["live", "checkpoint", "earlier_checkpoint", "code"]),
        "patch": patch,
        "formula": text,
        "inputs": json_object,
        "preconditions": few(text),
        "side_effects": few(text),
        "risk": confidence,
        "expect": maybe(expectation),
        "on_failure": text,
    }
)


def record(name, /, **fields):
    return st.fixed_dictionaries({"schema": st.just(f"outspoken.{name}/1"), **fields})


observation = record(
    "observation",
    step=step,
    time=maybe(number),
    epoch=maybe(number),
    segment=step,
    signals=st.dictionaries(text, maybe(number), max_size=4),
    nonfinite=st.dictionaries(text, st.sampled_from(["nan", "inf", "-inf"]), max_size=2),
    unreadable=st.dictionaries(text, text, max_size=2),
)
diagnostic = record(
    "diagnostic",
    id=word,
    fingerprint=word,
    code=code,
    name=text,
    doc=text,
    severity=severity,
    state=st.sampled_from(["pending", "firing", "resolved", "unknown", "suppressed"]),
    confidence=confidence,
    category=text,
    step=step,
    first_step=step,
    fired_step=maybe(step),
    onset_step=maybe(step),
    last_step=step,
    count=step,
    run=maybe(word),
    segment=step,
    config_rev=maybe(text),
    time=maybe(number),
    message=text,
    advice=text,
    evidence=few(evidence),
    not_checked=few(text),
    impact=text,
    causes=few(st.fixed_dictionaries({"code": code, "relation": text, "onset_step": maybe(step)})),
    inhibits=few(code),
    suggestions=few(suggestion),
)
request = record(
    "request",
    id=request_id,
    kind=st.just("apply"),
    actor=word,
    patch=st.lists(operation, min_size=1, max_size=2),
    suggestion=maybe(word),
    diagnostic=maybe(word),
    expect=maybe(expectation),
    rollback_on_failure=st.booleans(),
    restore=st.booleans(),
    time=number,
)
change = record(
    "change",
    id=word,
    state=st.sampled_from(["requested", "applied", "verified", "failed", "rejected", "rolled_back"]),
    step=step,
    time=number,
    actor=maybe(text),
    patch=patch,
    fields=st.dictionaries(word, st.fixed_dictionaries({"old": json_value, "new": json_value}), max_size=2),
    reason=text,
    suggestion=maybe(word),
    diagnostic=maybe(word),
    segment=step,
    config_rev=maybe(text),
    expect=maybe(expectation),
    observed=maybe(json_object | number),
    rollback_on_failure=st.booleans(),
    run=maybe(word),
)
verdict = record(
    "verdict",
    state=st.sampled_from(STATES),
    confidence=confidence,
    step=step,
    since_step=maybe(step),
    time=maybe(number),
    run=maybe(word),
    segment=step,
    reason=text,
    evidence=few(evidence),
    runner_up=maybe(st.sampled_from(STATES)),
    would_change=text,
    firing=few(code),
    suppressed=few(code),
    pending=few(code),
)
run = record(
    "run",
    id=word,
    parent=maybe(word),
    method=text,
    trainer=maybe(text),
    status=st.sampled_from(["running", "finished", "failed", "interrupted"]),
    started=number,
    heartbeat=number,
    step=step,
    total_steps=maybe(step),
    config=json_object,
    live=st.dictionaries(
        word,
        st.fixed_dictionaries(
            {"minimum": maybe(number), "maximum": maybe(number), "choices": maybe(few(json_value))},
            optional={"type": st.sampled_from(["int", "float"])},
        ),
        max_size=2,
    ),
    config_rev=maybe(text),
    versions=st.dictionaries(word, maybe(text), max_size=2),
    hardware=json_object,
    world_size=st.integers(1, 4096),
    dataset=maybe(json_object | text),
    facts=json_object,
    segment=step,
    verdict=maybe(verdict),
    process=st.fixed_dictionaries({"host": text, "pid": st.integers(1, 2**22), "created": maybe(number)}),
)
report = record(
    "report",
    source=st.fixed_dictionaries(
        {
            "path": text,
            "format": text,
            "rows": step,
            "first_step": maybe(step),
            "last_step": maybe(step),
            "signals": few(text),
            "notes": few(text),
        }
    ),
    run=maybe(word),
    method=text,
    config_known=st.booleans(),
    verdict=verdict,
    diagnostics=few(diagnostic),
    not_checked=few(st.fixed_dictionaries({"code": code, "name": text, "reason": text})),
    notes=few(text),
)

RECORDS = {
    "observation": observation,
    "diagnostic": diagnostic,
    "suggestion": suggestion,
    "request": request,
    "change": change,
    "run": run,
    "verdict": verdict,
    "report": report,
}
OPTIONAL = {("verdict", "suppressed"), ("run", "process"), ("request", "restore")}
quick = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def test_there_is_a_schema_for_every_record_and_each_is_a_schema():
    assert set(schemas.names()) == set(RECORDS)
    for name in (*schemas.names(), "common"):
        loaded = schemas.schema(name)
        Draft202012Validator.check_schema(loaded)
        assert loaded["$id"] == f"outspoken.{name}/1"
        assert loaded["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    with pytest.raises(KeyError, match="no record is called 'metrics'"):
        schemas.schema("metrics")


def test_a_schema_handed_out_is_a_copy():
    schemas.schema("run")["properties"].clear()
    assert schemas.schema("run")["properties"]


def test_fields_are_those_of_the_architecture_page():
    page = (Path(schemas.__file__).parent.parent / "docs" / "architecture.md").read_text()
    for name in schemas.names():
        line = re.search(rf"^- {name}\b.*?: `\{{(.*)\}}`", page, re.MULTILINE).group(1)
        while (flat := re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", line)) != line:
            line = flat
        written = {re.split(r"[|:]", part)[0].strip() for part in line.split(",")}
        assert written == set(schemas.schema(name)["properties"]), name


def test_verdict_states_are_those_of_the_engine():
    assert tuple(schemas.schema("common")["$defs"]["verdict_state"]["enum"]) == STATES


@pytest.mark.parametrize("name", RECORDS)
@quick
@given(data=st.data())
def test_valid_records_pass_and_survive_json(name, data):
    made = data.draw(RECORDS[name])
    schemas.validate(made, name)
    read = json.loads(json.dumps(made, allow_nan=False))
    assert read == made
    schemas.validate(read, name)
    schemas.validate({**read, "a_field_of_a_later_version": [1]}, name)


@pytest.mark.parametrize("name", RECORDS)
@quick
@given(data=st.data())
def test_mutated_records_are_refused(name, data):
    made = data.draw(RECORDS[name])
    key = data.draw(st.sampled_from(sorted(made)))
    without = {k: v for k, v in made.items() if k != key}
    if (name, key) in OPTIONAL:
        schemas.validate(without, name)
    else:
        with pytest.raises(schemas.InvalidRecord, match=key if key != "schema" else "schema None"):
            schemas.validate(without, name)
    with pytest.raises(schemas.InvalidRecord) as refused:  # no field holds a list with an empty list in it
        schemas.validate({**made, key: [[]]}, name)
    assert key in str(refused.value) and name in str(refused.value)


ENUMS = [
    ("diagnostic", "state", "fired"),
    ("diagnostic", "severity", "Error"),
    ("diagnostic", "confidence", "certain"),
    ("diagnostic", "code", "rl16"),
    ("suggestion", "applicability", "maybe"),
    ("suggestion", "when", "CKPT"),
    ("request", "kind", "stop"),
    ("request", "id", "../../etc/passwd"),
    ("request", "patch", []),
    ("change", "state", "done"),
    ("verdict", "state", "collapse"),
    ("verdict", "runner_up", "good"),
    ("run", "status", "dead"),
    ("run", "world_size", 0),
    ("run", "live", {"beta": {"minimum": "0", "maximum": None, "choices": None}}),
    ("observation", "nonfinite", {"loss": "NaN"}),
    ("observation", "signals", {"loss": "0.5"}),
    ("observation", "signals", {"loss": True}),
    ("observation", "signals", {"loss": float("nan")}),
    ("observation", "signals", {"loss": float("inf")}),
    ("observation", "signals", {"loss": 10**400}),
    ("observation", "step", -1),
    ("observation", "step", 1.5),
    ("observation", "step", True),
    ("observation", "time", float("-inf")),
    ("diagnostic", "message", "x" * 2001),
    ("diagnostic", "evidence", [{"signal": "loss", "statistic": "value", "value": 1.0, "n": 1, "window": [1]}]),
    ("run", "config", {"learning_rate": float("nan")}),
    ("run", "config", {"betas": (0.9, 0.99)}),  # a tuple is not JSON: read back, it would be another value
    ("suggestion", "patch", [{"op": "remove", "path": "/beta", "value": 1}]),
    ("suggestion", "patch", [{"op": "replace", "path": "beta", "value": 1}]),
    ("suggestion", "expect", {"signal": "kl", "direction": "down", "value": 1.0, "within_steps": 5}),
    ("change", "expect", {"signal": "kl", "direction": "below", "value": 1.0, "within_steps": 0}),
]


@pytest.mark.parametrize(("name", "key", "bad"), ENUMS)
def test_bad_values_are_refused_in_one_sentence(name, key, bad):
    made = VALID[name]
    schemas.validate(made, name)
    with pytest.raises(schemas.InvalidRecord) as refused:
        schemas.validate({**made, key: bad}, name)
    said = str(refused.value)
    assert said.startswith(f"{name} record: {key}") and "\n" not in said and len(said) < 400


_EVIDENCE = {"signal": "kl", "statistic": "median", "value": 0.3, "n": 10, "window": [1, 10]}
_VERDICT = {
    "schema": "outspoken.verdict/1",
    "state": "improving",
    "confidence": "high",
    "step": 10,
    "since_step": 5,
    "time": 1.0,
    "run": "r",
    "segment": 0,
    "reason": "The reward rises.",
    "evidence": [_EVIDENCE],
    "runner_up": None,
    "would_change": "",
    "firing": ["RL016"],
    "pending": [],
}
_SUGGESTION = {
    "id": "RL016.1",
    "title": "Raise the cap",
    "applicability": "suggest",
    "when": "live",
    "patch": change_field("max_completion_length", 2048, 3072),
    "formula": "",
    "inputs": {},
    "preconditions": [],
    "side_effects": [],
    "risk": "low",
    "expect": None,
    "on_failure": "revert",
}
VALID = {
    "observation": {
        "schema": "outspoken.observation/1",
        "step": 1,
        "time": 1.0,
        "epoch": None,
        "segment": 0,
        "signals": {"loss": None, "kl": 0.1},
        "nonfinite": {"loss": "nan"},
        "unreadable": {},
    },
    "suggestion": _SUGGESTION,
    "verdict": _VERDICT,
    "diagnostic": {
        "schema": "outspoken.diagnostic/1",
        **dict.fromkeys(("name", "doc", "category", "message", "advice", "impact"), "text"),
        **dict.fromkeys(("step", "first_step", "last_step", "count", "segment"), 3),
        **dict.fromkeys(("fired_step", "onset_step", "run", "config_rev", "time"), None),
        "id": "a",
        "fingerprint": "f",
        "code": "RL016",
        "severity": "error",
        "state": "firing",
        "confidence": "low",
        "evidence": [_EVIDENCE],
        "not_checked": [],
        "causes": [],
        "inhibits": [],
        "suggestions": [_SUGGESTION],
    },
    "request": {
        "schema": "outspoken.request/1",
        "id": "a",
        "kind": "apply",
        "actor": "me",
        "patch": change_field("beta", 0.1, 0.2),
        "suggestion": None,
        "diagnostic": None,
        "expect": None,
        "rollback_on_failure": True,
        "time": 1,
    },
    "change": {
        "schema": "outspoken.change/1",
        "id": "a",
        "state": "applied",
        "step": 3,
        "time": 1.0,
        "actor": "me",
        "patch": change_field("beta", 0.1, 0.2),
        "fields": {"beta": {"old": 0.1, "new": 0.2}},
        "reason": "",
        "suggestion": None,
        "diagnostic": None,
        "segment": 1,
        "config_rev": "sha256:0",
        "expect": None,
        "observed": {},
        "rollback_on_failure": False,
        "run": "r",
    },
    "run": {
        "schema": "outspoken.run/1",
        "id": "r",
        "parent": None,
        "method": "grpo",
        "trainer": "T",
        "status": "running",
        "started": 1.0,
        "heartbeat": 1.0,
        "step": 0,
        "total_steps": 10,
        "config": {"beta": 0.1},
        "config_rev": "x",
        "live": {"beta": {"minimum": 0.0, "maximum": None, "choices": None}},
        "versions": {"torch": "2"},
        "hardware": {},
        "world_size": 1,
        "dataset": None,
        "facts": {},
        "segment": 0,
        "verdict": _VERDICT,
    },
}


def test_the_message_names_record_path_value_and_problem():
    made = {**VALID["diagnostic"], "suggestions": [{**_SUGGESTION, "risk": "tiny"}]}
    with pytest.raises(schemas.InvalidRecord) as refused:
        schemas.validate(made)
    assert str(refused.value) == (
        'diagnostic record: suggestions/0/risk is \'tiny\' but must be one of "low", "medium", "high"'
    )
    with pytest.raises(schemas.InvalidRecord, match=r"^request record: suggestion is 3 but must be of type string or"):
        schemas.validate({**VALID["request"], "suggestion": 3})
    with pytest.raises(schemas.InvalidRecord, match=r"^run record: it lacks 'id', 'config'$"):
        schemas.validate({k: v for k, v in VALID["run"].items() if k not in ("id", "config")})


@pytest.mark.parametrize("junk", [None, 3, "text", [], [{}], float("nan")])
def test_what_is_no_object_is_refused(junk):
    with pytest.raises(schemas.InvalidRecord, match="must be a JSON object"):
        schemas.validate(junk)


@pytest.mark.parametrize("stamp", [None, "", "outspoken.run", "outspoken.metrics/1", "run/1", "outspoken.run/0", 3])
def test_unknown_stamps_are_refused(stamp):
    with pytest.raises(schemas.InvalidRecord, match="has schema"):
        schemas.validate({**VALID["run"], "schema": stamp})


def test_a_newer_version_is_named_as_such():
    with pytest.raises(schemas.InvalidRecord, match=r"newer than outspoken\.run/1: update outspoken"):
        schemas.validate({**VALID["run"], "schema": "outspoken.run/2"})


def test_huge_and_deep_records_are_refused_briefly():
    deep = []
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(schemas.InvalidRecord, match="nested too deeply"):
        schemas.validate({**VALID["run"], "config": {"a": deep}})
    with pytest.raises(schemas.InvalidRecord) as refused:
        schemas.validate({**VALID["request"], "patch": "x" * 1_000_000})
    assert len(str(refused.value)) < 300


def test_what_the_engine_writes_is_valid():
    def check(view, params):
        return Finding(
            message="31% of the last 512 completions reached max_completion_length=2048 (limit 20%).",
            advice="Consider raising max_completion_length from 2048 to 3072.",
            evidence=[
                Evidence("completions/clipped_ratio", "pooled", 0.31, 512, (1, view.step), threshold=0.2, p=0.0)
            ],
            suggestions=[
                Suggestion(
                    id="RL016.1",
                    title="Raise the cap",
                    applicability="suggest",
                    when="live",
                    patch=change_field("max_completion_length", 2048, 3072),
                    inputs={"p99": float("nan")},
                    expect=Expectation("completions/clipped_ratio", "below", 0.1, 30),
                )
            ],
        )

    rule = Rule("RL016", "truncation-saturation", "warning", ("grpo",), check, for_=1, warm_up=False, params={})
    engine = Engine(method="grpo", config={"max_completion_length": 2048}, rules={"RL016": rule}, run_id="run-1")
    schemas.validate(engine.verdict())
    records = []
    for i in range(1, 30):
        records += [t.record for t in engine.observe(Observation(i, {"reward": i / 30, "kl": 0.1}))]
    engine.finish()
    assert [r["state"] for r in records] == ["firing"]
    for made in (*records, engine.verdict()):
        schemas.validate(made)
        assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_importing_the_schemas_loads_no_validator_and_no_torch():
    source = (
        "import sys; from outspoken import schemas; schemas.names(); schemas.not_readable({}, 'run');"
        "print([m for m in ('jsonschema', 'torch', 'numpy', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
