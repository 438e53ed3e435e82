"""Nothing that a user leans on changes unnoticed: names, arguments, config fields and their defaults."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def surface():
    spec = importlib.util.spec_from_file_location("make_surface", ROOT / "docs" / "make_surface.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_public_surface_is_the_recorded_one(surface):
    recorded = json.loads(surface.FILE.read_text(encoding="utf-8"))
    now = json.loads(surface.as_text())
    changed = [name for name in sorted({*recorded, *now}) if recorded.get(name) != now.get(name)]
    assert not changed, (
        f"the public surface of {', '.join(changed)} changed: if docs/stability.md allows it, run `make surface` and "
        "say so in CHANGELOG.md"
    )


def test_the_record_sees_names_arguments_defaults_and_live_fields(surface):
    now = surface.surface()
    assert {"SFTTrainer", "SFTConfig", "Run", "DiagnosticsCallback"} <= {*now}
    assert now["SFTTrainer"]["constructor"][:3] == ["model", "args=None", "data_collator=None"]
    fields = now["SFTConfig"]["fields"]
    assert fields["loss_type"] == "'nll' (live)"
    assert fields["max_length"] == "1024"
    assert fields["learning_rate"] == "2e-05 (live)"
    assert "weight_decay" not in fields  # declared by transformers
    assert "compute_loss" in now["SFTTrainer"]["methods"]


def test_what_the_record_would_catch(surface):
    def before(model, beta=0.1, *, seed=0):
        """Two arguments, one of them by keyword only."""

    def after(model, beta=0.2, *, seed=0):
        """A default is another."""

    assert surface.arguments(before) == ["model", "beta=0.1", "*", "seed=0"]
    assert surface.arguments(before) != surface.arguments(after)
