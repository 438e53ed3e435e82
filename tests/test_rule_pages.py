"""Every rule's page is complete, and docs/rules/ is what the docstrings say."""

import importlib.util
from pathlib import Path

import pytest

from outspoken.diagnostics.rules.registry import PAGE_SECTIONS, all_rules

DOCS = Path(__file__).parents[1] / "docs"
REQUIRED = (
    "NUM001 NUM002 NUM004 NUM005 NUM008 NUM009 NUM015 PERF001 PERF002 DAT003 SFT001 RL001 RL002 RL003 RL004 RL005 RL006 "
    "RL007 RL009 RL015 RL016 RL017 RL023 RL031 RL033 SYS012"
).split()


def test_all_rules_are_there():
    assert set(REQUIRED) <= set(all_rules())


@pytest.mark.parametrize("code", sorted(all_rules()))
def test_a_page_has_its_sections_in_order(code):
    page = all_rules()[code].page
    at = [page.find(f"## {section}\n") for section in PAGE_SECTIONS]
    assert -1 not in at and at == sorted(at), code
    summary = page.split("\n\n")[0]
    assert summary and not summary.startswith("#")


def test_docs_are_current():
    spec = importlib.util.spec_from_file_location("make_rules", DOCS / "make_rules.py")
    make_rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_rules)
    written = {p.name: p.read_text() for p in (DOCS / "rules").glob("*.md")}
    assert written == make_rules.pages(), "run `make docs`"


def test_inhibition_has_no_cycle():
    rules = all_rules()

    def reaches(code, target, seen):
        if code == target:
            return True
        return any(reaches(c, target, seen | {code}) for c in rules[code].inhibited_by if c in rules and c not in seen)

    for code, rule in rules.items():
        for cause in rule.inhibited_by:
            if cause in rules:
                assert not reaches(cause, code, set()), f"{code} and {cause} explain each other"
