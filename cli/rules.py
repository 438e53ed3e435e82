"""`outspoken rules`: what is checked."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from outspoken.cli.common import SEVERITY_STYLES, CommandError, JsonFlag, print_json, show

if TYPE_CHECKING:
    from outspoken.diagnostics.rules.registry import Rule


def rules(
    method: Annotated[str | None, typer.Option(help="Only rules for this method: grpo, sft, dpo …")] = None,
    json: JsonFlag = False,
) -> None:
    """List the rules: code, name, severity, methods, and what each looks for."""
    from outspoken.diagnostics.rules.registry import ANY_METHOD, all_rules

    if method is not None and method not in ANY_METHOD:
        raise CommandError(f"method {method!r} is not known; choose one of {', '.join(ANY_METHOD)}.")
    found = [rule for rule in all_rules().values() if method is None or method in rule.methods]
    if json:
        print_json([rule_record(rule) for rule in found])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("code", "name", "severity", "methods"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it says")
    for rule in found:
        table.add_row(
            rule.code,
            rule.name,
            Text(rule.severity, SEVERITY_STYLES[rule.severity]),
            short_methods(rule.methods),
            Text(rule.summary.replace("`", "")),
        )
    show(table)


def rule_record(rule: "Rule") -> dict[str, Any]:
    """A rule as a JSON object."""
    return {
        "code": rule.code,
        "name": rule.name,
        "severity": rule.severity,
        "category": rule.category,
        "methods": list(rule.methods),
        "needs": list(rule.needs),
        "params": dict(rule.params),
        "inhibited_by": list(rule.inhibited_by),
        "live_only": rule.live_only,
        "summary": rule.summary,
        "page": rule.page,
    }


def short_methods(methods: tuple[str, ...]) -> str:
    """The methods in few words: families by name."""
    from outspoken.diagnostics.rules import registry

    if set(methods) >= set(registry.ANY_METHOD):
        return "any"
    names, rest = [], list(methods)
    for name, family in (
        ("online RL", registry.ONLINE_RL),
        ("preference", registry.PREFERENCE),
        ("supervised", registry.SUPERVISED),
        ("distillation", registry.DISTILLATION),
    ):
        if set(family) <= set(rest):
            names.append(name)
            rest = [m for m in rest if m not in family]
    return ", ".join(names + rest)
