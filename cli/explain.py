"""`outspoken explain`: the page of a rule or a signal."""

import difflib
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outspoken.cli.common import SEVERITY_STYLES, CommandError, JsonFlag, print_json, show

if TYPE_CHECKING:
    from outspoken.diagnostics.rules.registry import Rule
    from outspoken.diagnostics.signals import Signal


def explain(
    what: Annotated[str, typer.Argument(metavar="CODE|SIGNAL", help="A rule (RL016) or a signal (reward_std).")],
    json: JsonFlag = False,
) -> None:
    """Explain a rule: why it hurts, how it is decided, when it is fine, what to change. Or a signal."""
    from outspoken.cli.rules import rule_record
    from outspoken.diagnostics import signals
    from outspoken.diagnostics.rules.registry import all_rules

    rules = all_rules()
    rule = next((r for r in rules.values() if what.upper() == r.code or what.lower() == r.name), None)
    if rule is not None:
        print_json(rule_record(rule)) if json else _print_rule(rule)
        return
    signal = signals.lookup(what)
    if signal is None:
        known = [*rules, *(r.name for r in rules.values()), *signals.SIGNALS]
        near = difflib.get_close_matches(what, known, n=1) or difflib.get_close_matches(what.upper(), rules, n=1)
        hint = f"did you mean {near[0]}?" if near else "`outspoken rules` lists the rules."
        raise CommandError(f"{what!r} is neither a rule nor a signal; {hint}")
    record = signal_record(signal, rules)
    own = {method: row for (method, name), row in signals.OF_METHOD.items() if name == signal.name}
    record["of_method"] = {method: signal_record(row, rules) for method, row in own.items()}
    if json:
        print_json(record)
        return
    _print_signal(record)
    for method, row in record["of_method"].items():
        show("", f"in {method} it is something else:")
        _print_signal(row)


def signal_record(signal: "Signal", rules: "dict[str, Rule]") -> dict[str, Any]:
    """A signal as a JSON object, with the rules that need it."""
    return {
        "signal": signal.name,
        "unit": signal.unit,
        "low": signal.low if math.isfinite(signal.low) else None,
        "high": signal.high if math.isfinite(signal.high) else None,
        "meaning": signal.meaning,
        "methods": list(signal.methods),
        "weight": signal.weight,
        "impossible_when": signal.impossible_when or None,
        "rules": [
            rule.code for rule in rules.values() if signal.name in rule.needs and {*signal.methods} & {*rule.methods}
        ],
    }


def _print_rule(rule: "Rule") -> None:
    from rich.markdown import Markdown
    from rich.text import Text

    from outspoken.cli.rules import short_methods

    title = Text.assemble(
        (rule.code, "bold"), f" {rule.name}  ", (rule.severity, SEVERITY_STYLES[rule.severity]), "  methods: "
    )
    lines: list[Any] = [title.append(short_methods(rule.methods))]
    if rule.needs:
        lines.append(Text(f"needs: {', '.join(rule.needs)}", "dim"))
    if rule.params:
        values = ", ".join(f"{name}={value:g}" for name, value in rule.params.items())
        lines.append(Text(f"parameters: {values}", "dim"))
    show(*lines, Text(), Markdown(rule.page), width=110)


def _print_signal(record: dict[str, Any]) -> None:
    low, high = record["low"], record["high"]
    bounds = f"{'-∞' if low is None else f'{low:g}'} to {'∞' if high is None else f'{high:g}'}"
    lines = [f"{record['signal']}: {record['meaning']}", f"unit: {record['unit']}, range: {bounds}"]
    lines.append(f"emitted by: {', '.join(m for m in record['methods'] if m != 'unknown')}")
    if record["impossible_when"]:
        lines.append(f"cannot exist with {record['impossible_when']}")
    if record["weight"]:
        lines.append(f"a share; counted by: {record['weight']}")
    if record["rules"]:
        lines.append(f"needed by: {', '.join(record['rules'])}")
    print("\n".join(lines))
