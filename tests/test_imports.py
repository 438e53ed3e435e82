"""What only reads runs loads neither torch nor transformers nor pandas: it runs on a laptop and answers at once."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "pandas", "datasets", "accelerate", "peft"}
_REPORT = "\nimport json, sys\nsys.stderr.write('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))\n"


def loaded_by(code: str) -> set[str]:
    """Top-level names of the modules in memory after running `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code + _REPORT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run, and a log beside it."""
    from outspoken.diagnostics.records import Observation
    from outspoken.diagnostics.rundir import RunDirectory

    path = tmp_path_factory.mktemp("out")
    writer = RunDirectory(path / "outspoken")
    run = {"schema": "outspoken.run/1", "id": "r", "method": "sft", "status": "finished", "config": {}, "step": 30}
    writer.write_run(run)
    for step in range(1, 31):
        writer.append_observation(Observation(step, {"loss": 1.0}), 0)
    writer.write_verdict({"schema": "outspoken.verdict/1", "state": "plateauing", "step": 30, "reason": "flat"})
    writer.close()
    (path / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, 30)))
    return path


def test_the_package_loads_almost_nothing():
    loaded = loaded_by("import outspoken\ndir(outspoken)\noutspoken.__version__")
    assert not loaded & (HEAVY | {"numpy", "rich", "typer", "yaml"})


def test_public_names_of_the_reading_side_are_light():
    code = "import outspoken, outspoken.agent_api.gate\noutspoken.Run\n"
    assert not loaded_by(code) & (HEAVY | {"numpy"})


def test_every_public_name_resolves():
    import outspoken

    for name in outspoken.__all__:
        assert getattr(outspoken, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainr'"):
        outspoken.GRPOTrainr  # noqa: B018


def test_the_gate_loads_not_even_numpy(run_dir):
    assert not loaded_by(f"from outspoken.cli.main import main\nmain(['gate', {str(run_dir)!r}])") & (
        HEAVY | {"numpy"}
    )


def test_help_of_every_command_is_light():
    """Also that of the training commands, which load torch only when they train."""
    commands = ["sft", "grpo", "demo", "diagnose", "watch", "explain", "rules", "apply", "gate"]
    code = f"from outspoken.cli.main import main\nfor c in {commands!r}: main([c, '--help'])"
    assert not loaded_by(code) & (HEAVY | {"numpy"})


def test_the_commands_that_read_are_light(run_dir):
    """All of them in one interpreter: what one of them loads would show."""
    run, log = str(run_dir), str(run_dir / "log.jsonl")
    calls = [
        ["gate", run, "--fail-on", "RL016,broken"],
        ["gate", run, "--json"],
        ["diagnose", run],
        ["diagnose", run, "--replay", "--json"],
        ["diagnose", log],
        ["watch", run],
        ["watch", run, "--json"],
        ["explain", "RL016"],
        ["explain", "reward", "--json"],
        ["rules"],
        ["apply", run],
        ["apply", run, "--set", "learning_rate=1e-5"],
    ]
    expected = [0] * 11 + [2]  # the run is over, so nothing can be changed
    code = f"from outspoken.cli.main import main\ncodes = [main(c) for c in {calls!r}]\nassert codes == {expected!r}, codes"
    assert not loaded_by(code) & HEAVY
