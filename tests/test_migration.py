"""Scripts written for TRL run here with nothing but the import changed, and train to the same numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "trl_scripts"

# Numbers that measure the machine, or that one library logs in its own way.
NOT_COMPARED = re.compile(r"runtime|per_second|flos|step_time|epoch|step")

DPO_OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "loss_type": "sigmoid",
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "dataset_name": "none",
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
}


def run(name, library, model_dir, tmp_path):
    """Run a script with `trl` replaced by `library`; what it printed last, as JSON."""
    source = (SCRIPTS / f"{name}.py").read_text()
    assert source.count("from trl import") == 1
    assert "trl." not in source
    script = tmp_path / f"{library}_{name}.py"
    script.write_text(source.replace("from trl import", f"from {library} import"))
    out = tmp_path / library
    arguments = [str(model_dir), str(out)]
    if name == "dpo":
        arguments = ["--model_name_or_path", str(model_dir), "--output_dir", str(out)]
        arguments += [part for key, value in DPO_OPTIONS.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"')))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_a_trl_script_trains_to_the_same_numbers(name, tiny_model_dir, tmp_path):
    theirs = run(name, "trl", tiny_model_dir, tmp_path)
    ours = run(name, "outspoken", tiny_model_dir, tmp_path)
    assert len(ours["log"]) == len(theirs["log"])
    for our_row, their_row in zip([*ours["log"], ours["eval"]], [*theirs["log"], theirs["eval"]]):
        compared = [key for key in their_row if not NOT_COMPARED.search(key)]
        assert compared
        assert {key: our_row.get(key) for key in compared} == pytest.approx(
            {key: their_row[key] for key in compared}, rel=2e-4, abs=2e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "grpo", "rloo", "distillation"])
def test_a_trl_script_runs(name, tiny_model_dir, tmp_path):
    # Not compared: KTO shuffles here and cannot in TRL, and samples are drawn in another order.
    logged = run(name, "outspoken", tiny_model_dir, tmp_path)["log"]
    theirs = run(name, "trl", tiny_model_dir, tmp_path)["log"]
    missing = {key for row in theirs for key in row} - {key for row in logged for key in row}
    assert not missing, f"metrics that TRL logs and we do not: {sorted(missing)}"
    assert all(row["loss"] == row["loss"] for row in logged if "loss" in row)
