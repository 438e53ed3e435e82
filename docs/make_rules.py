"""Write docs/rules/: one page a rule from its docstring, and an index. `make docs` runs it; a test keeps it current."""

from pathlib import Path

from outspoken.diagnostics.rules.registry import Rule, all_rules

FOLDER = Path(__file__).parent / "rules"


def page(rule: Rule) -> str:
    """The rule's page with a head of facts."""
    parameters = ", ".join(f"`{name}` = {value:g}" for name, value in rule.params.items()) or "none"
    needs = ", ".join(f"`{name}`" for name in rule.needs) or "none by itself"
    explained = ", ".join(rule.inhibited_by) or "nothing"
    return (
        f"# {rule.code} {rule.name}\n\n"
        f"{rule.page}\n\n"
        "## In short\n\n"
        f"- Severity: {rule.severity} (a finding may say otherwise)\n"
        f"- Methods: {', '.join(rule.methods)}\n"
        f"- Signals it cannot do without: {needs}\n"
        f"- Evaluated every {rule.every} observation(s); fires after {rule.for_} finding(s) in a row, resolves after "
        f"{rule.keep} without\n"
        f"- Explained by, and then not shown: {explained}\n"
        f"- Parameters (`diagnostics_params`): {parameters}\n"
    )


def index(rules: dict[str, Rule]) -> str:
    rows = "\n".join(f"| [{r.code}]({r.code}.md) | {r.name} | {r.severity} | {r.summary} |" for r in rules.values())
    return (
        "# Rules\n\nThe same pages as `outspoken explain CODE` shows.\n\n"
        f"| code | name | severity | what |\n|---|---|---|---|\n{rows}\n"
    )


def pages() -> dict[str, str]:
    """File name -> text of everything in docs/rules/."""
    rules = all_rules()
    return {"README.md": index(rules), **{f"{code}.md": page(rule) for code, rule in rules.items()}}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
