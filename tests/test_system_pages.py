"""The pages on other systems: their tables are those of the readers, and what they tell to type and import exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from outspoken.diagnostics.sources import FAMILIES, FORMATS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in (DOCS / "systems").glob("*.md"))


@pytest.fixture(scope="module")
def make_systems():
    spec = importlib.util.spec_from_file_location("make_systems", DOCS / "make_systems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page):
    return (DOCS / "systems" / page).read_text()


def test_the_pages_are_current(make_systems):
    assert {page: text_of(page) for page in PAGES} == make_systems.pages(), "run `make docs`"


def test_a_stale_table_is_noticed(make_systems):
    written = text_of("verl.md")
    stale = written.replace("`critic/score/mean`", "`critic/rewards/mean`", 1)
    assert stale != written
    assert make_systems.page_text("verl", stale) == written
    with pytest.raises(ValueError, match="lacks the marks"):
        make_systems.page_text("verl", "# veRL\n")


def test_every_system_has_a_page_with_its_table(make_systems):
    shown = {name for names in make_systems.FAMILIES_OF.values() for name in names}
    assert shown == {family.name for family in FAMILIES}
    assert {f"{page}.md" for page, *_ in make_systems.SYSTEMS} == {*PAGES} - {"README.md"}


def test_tables_hold_every_name_of_the_readers(make_systems):
    for page, names in make_systems.FAMILIES_OF.items():
        for name in names:
            family = make_systems.family(name)
            for theirs, ours in (*family.aliases.items(), *family.settings.items()):
                plain = f"`{theirs}`" in text_of(f"{page}.md")
                # a name in which a tracker wrote `_` for `/` is told by the one it was made of
                of_tracker = any(theirs.endswith(o.replace("/", "_")) for o in family.aliases if "/" in o)
                assert plain or of_tracker, (page, theirs)
                assert f"`{ours.rstrip('.')}`" in text_of(f"{page}.md"), (page, ours)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page):
    text = text_of(page)
    assert "outspoken diagnose" in text
    if page not in ("README.md", "tensorboard.md", "wandb.md", "mlflow.md"):
        assert "cannot tell" in text and "## Live" in text
    for name in re.findall(r"`--format (\w+)`", text):
        assert name in FORMATS
    for name in re.findall(r"outspoken\.diagnostics(?:\.\w+)+", text):
        assert importlib.util.find_spec(name), name
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        linked = (DOCS / "systems" / target).resolve()
        assert linked.is_file(), target
        if anchor:
            headings = [line.lstrip("# ").lower() for line in linked.read_text().splitlines() if line.startswith("#")]
            assert anchor in [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]
