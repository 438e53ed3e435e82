"""Imports point one way: cli -> agent_api -> diagnostics -> schemas, and cli -> trainers -> diagnostics."""

import ast
from pathlib import Path

import pytest

import outspoken

ROOT = Path(outspoken.__file__).parent
LAYERS = ("trainers", "diagnostics", "schemas", "agent_api", "cli")

# What each layer may import of the others. `outspoken` itself (the lazy public names) may be imported by all.
ALLOWED = {
    "schemas": set(),
    "diagnostics": {"schemas"},
    "agent_api": {"diagnostics", "schemas"},
    "trainers": {"diagnostics", "schemas"},
    "cli": {"trainers", "diagnostics", "schemas", "agent_api"},
}

# Of the layers that read runs, only these may load the training stack.
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "trl", "deepspeed", "vllm"}
MAY_BE_HEAVY = {"diagnostics/callback.py", "diagnostics/torch_probes.py"}


def imported(source: str, package: str) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it; `package` resolves relative imports.

    `from a import b` gives both `a` and `a.b`, since b may be a module. `import_module("x")` counts too.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            first = node.args[0]
            if name in ("import_module", "__import__"):
                # An f-string counts by its constant beginning.
                if isinstance(first, ast.JoinedStr) and first.values:
                    first = first.values[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    names.add(first.value.rstrip("."))
    return names


def files(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    package = ".".join(["outspoken", *path.relative_to(ROOT).parent.parts])
    return imported(path.read_text(encoding="utf-8"), package)


def crossings(layer: str, names: set[str]) -> set[str]:
    """The layers among imported names that this layer must not know."""
    targets = {name.split(".")[1] for name in names if name.startswith("outspoken.")}
    return (targets & set(LAYERS)) - ALLOWED[layer] - {layer}


def test_the_reader_of_imports_sees_every_kind():
    source = (
        "import torch.nn as nn\n"
        "from outspoken.trainers import sft\n"
        "from . import sibling\n"
        "from ..cli.main import app\n"
        "def f():\n"
        "    import_module('outspoken.agent_api')\n"
        "    importlib.import_module(f'outspoken.schemas.{x}')\n"
    )
    names = imported(source, "outspoken.diagnostics")
    assert {"torch.nn", "outspoken.trainers.sft", "outspoken.diagnostics.sibling"} <= names
    assert {"outspoken.cli.main.app", "outspoken.agent_api", "outspoken.schemas"} <= names
    assert crossings("diagnostics", names) == {"trainers", "cli", "agent_api"}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    paths = files(layer)
    assert paths, f"no files in {layer}"
    wrong = {str(p.relative_to(ROOT)): crossed for p in paths if (crossed := crossings(layer, imports_of(p)))}
    assert not wrong


@pytest.mark.parametrize("layer", ["diagnostics", "schemas", "agent_api"])
def test_only_two_modules_of_the_reading_layers_load_the_training_stack(layer):
    wrong = {}
    for path in files(layer):
        relative = path.relative_to(ROOT).as_posix()
        heavy = {name for name in imports_of(path) if name.split(".")[0] in HEAVY}
        if heavy and relative not in MAY_BE_HEAVY:
            wrong[relative] = heavy
    assert not wrong


def test_the_two_modules_are_not_imported_by_their_neighbours():
    """Whoever imports the callback loads torch, so nothing that reads runs may."""
    heavy = {"outspoken.diagnostics.callback", "outspoken.diagnostics.torch_probes"}
    wrong = {
        path.relative_to(ROOT).as_posix(): names
        for layer in ("diagnostics", "schemas", "agent_api")
        for path in files(layer)
        if path.relative_to(ROOT).as_posix() not in MAY_BE_HEAVY and (names := imports_of(path) & heavy)
    }
    assert not wrong


def test_the_package_itself_never_imports_trl():
    """TRL is what the tests compare with."""
    for layer in LAYERS:
        for path in files(layer):
            assert not {n for n in imports_of(path) if n.split(".")[0] == "trl"}, path


def test_trainers_do_not_inherit_from_each_other():
    """Each trainer is readable by itself: its only base with a training loop is transformers.Trainer."""
    for path in files("trainers"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
                bases = {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}
                assert {b for b in bases if b.endswith("Trainer")} <= {"Trainer"}, f"{path}: {node.name}"
