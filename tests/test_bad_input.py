"""Wrong input gets one sentence, before the weights are loaded; the page in the docs is what the trainers say."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "make_bad_input", Path(__file__).parent.parent / "docs" / "make_bad_input.py"
)
bad_input = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bad_input)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose weights are unreadable: whoever loads them fails with another error than ours."""
    return bad_input.model_without_weights(str(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("wrong", "trainer", "rows", "settings"),
    [*bad_input.DATA, *bad_input.SETTINGS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_one_sentence_before_the_weights_load(wrong, trainer, rows, settings, model, tmp_path):
    said = bad_input.sentence(trainer, rows, settings, model, str(tmp_path))
    assert "\n" not in said
    assert said.endswith(".")
    assert len(said) < 350
    for setting in settings:
        if setting not in ("max_steps", "loss_type"):
            assert setting in said, f"the sentence does not name {setting}"
    # The page is written by `make docs`.
    row = f"| {wrong} | {trainer} | {said.replace('|', chr(92) + '|')} |"
    assert row in bad_input.PAGE.read_text(encoding="utf-8").splitlines(), "run `make docs`"


def test_the_table_is_long_enough_and_the_page_has_nothing_else():
    cases = len(bad_input.DATA) + len(bad_input.SETTINGS)
    assert cases >= 30
    rows = [line for line in bad_input.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == cases + 2  # and the headings
