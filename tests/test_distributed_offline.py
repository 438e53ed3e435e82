"""Two processes on the CPU, over gloo: what one process does with a batch, two do with half of it each.

Every way to spread a model is launched once, for all methods (tests/distributed_worker.py); the tests compare what it
left behind with what one process left.
"""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from outspoken.cli.env import accelerate_config

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")
METHODS = ("sft", "reward", "dpo", "kto", "kto-apo", "sft-lora", "dpo-lora")
BATCH, STEPS = 4, 4
# How a model is spread -> the accelerate config that comes with the package. Accelerate itself shards over accelerators
# only, so the worker lets it take the CPU for one; what loads and moves weights for GPUs is switched off.
SPREAD = {"ddp": "ddp_cpu", "fsdp1": "fsdp1", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # where `make test-all` puts it, beside the environment
TIMES = ("runtime", "per_second", "total_flos")


def launch(spread, folder, model_dir):
    """Train everything in one process (`spread` None) or two."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTSPOKEN_LOG": "off", "TOKENIZERS_PARALLELISM": "false"}
    arguments = [str(WORKER), str(folder), str(BATCH), model_dir, *METHODS]
    if spread is None:
        command = [sys.executable, *arguments]
    else:
        config = yaml.safe_load(accelerate_config(SPREAD[spread]).read_text())
        config |= {"num_processes": 2, "mixed_precision": "no"}
        for option in ("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"):
            if option in config.get("fsdp_config", {}):
                config["fsdp_config"][option] = False
        file = folder / "accelerate.yaml"
        file.write_text(yaml.safe_dump(config))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
        command = [sys.executable, *launcher, *arguments]
        if spread.startswith("zero"):
            environment["DS_ACCELERATOR"] = "cpu"
            if DEEPSPEED.is_dir():
                environment["PYTHONPATH"] = os.pathsep.join([str(DEEPSPEED), environment.get("PYTHONPATH", "")])
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=1500)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="session")
def ran(once, tiny_model_dir):
    """`ran(spread, method)`: the folder that a method's run left."""

    def find(spread, method):
        folder = once(f"distributed-{spread}", lambda folder: launch(spread, folder, tiny_model_dir))
        found = folder / method
        if not (found / "result.json").exists():
            told = "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("*/error-*.txt")))
            pytest.fail(f"{method} left no result. {told or (folder / 'log.txt').read_text()[-2000:]}")
        return found

    return find


@pytest.fixture(params=SPREAD)
def spread(request):
    if request.param.startswith("zero") and not (DEEPSPEED.is_dir() or find_spec("deepspeed")):
        pytest.skip("deepspeed is not installed; `make test-all` installs it where it can")
    return request.param


def skip_saved_adapters(spread, method):
    if spread == "fsdp1" and method.endswith("-lora"):
        pytest.skip("FSDP1 gathers an adapter with its full state, which fails on a CPU")


def weights(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    assert found, f"no weights in {folder}"
    return found


def assert_same_weights(actual, expected, tolerance):
    actual, expected = weights(actual), weights(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def history(folder):
    entries = json.loads((folder / "result.json").read_text())["history"]
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in entries]


def lines(folder, name):
    return [json.loads(line) for line in (folder / "outspoken" / name).read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
class TestTwoProcesses:
    def test_are_like_one(self, ran, spread, method):
        """Same losses, same metrics (so those of both processes were gathered), same weights at the end."""
        one, two = ran(None, method), ran(spread, method)
        result = json.loads((two / "result.json").read_text())
        kind = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero": "DEEPSPEED"}[spread.rstrip("123")]
        assert (result["world"], result["kind"]) == (2, f"DistributedType.{kind}")
        expected, found = history(one), history(two)
        assert len(expected) == len(found) >= STEPS + 2
        for entry, other in zip(expected, found):
            assert entry.keys() == other.keys()
            for key, value in entry.items():
                # Log-probabilities of answers are sums of numbers of both signs around 50.
                assert other[key] == pytest.approx(value, rel=5e-5, abs=5e-5), (entry["step"], key)
        losses = [entry["loss"] for entry in expected if "loss" in entry]
        assert len(losses) == STEPS and max(losses) - min(losses) > 0.1  # it did train
        skip_saved_adapters(spread, method)
        assert_same_weights(two / "model", one / "model", 1e-5)

    def test_one_of_them_writes(self, ran, spread, method):
        two = ran(spread, method)
        assert json.loads((two / "result.json").read_text())["wrote"] == [1, 0]
        run = json.loads((two / "outspoken" / "run.json").read_text())
        assert run["world_size"] == 2 and run["status"] == "finished"
        trained = [line["step"] for line in lines(two, "metrics.jsonl") if "loss" in line["signals"]]
        assert trained == [1, 2, 3, 4]  # a second writer would have written them twice

    def test_the_run_directory_has_the_signals_of_both(self, ran, spread, method):
        one, two = (lines(ran(how, method), "metrics.jsonl") for how in (None, spread))
        for expected, found in zip(one, two, strict=True):
            for name, value in expected["signals"].items():
                if name.startswith(("time/", "memory/")) or any(t in name for t in TIMES):
                    continue
                if name.startswith(("grad/", "grad_norm_clipped")) and spread != "ddp":
                    assert name not in found["signals"]  # a process has a share of the gradients, or none
                    continue
                if expected["step"] == 1 and name == "rewards/length_correlation":
                    continue  # of rewards that are zero but for rounding
                assert found["signals"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (expected["step"], name)

    def test_resumed_from_a_checkpoint_ends_the_same(self, ran, spread, method):
        skip_saved_adapters(spread, method)
        through, resumed = ran(spread, method), ran(spread, f"{method}-resumed")
        assert_same_weights(resumed / "model", through / "model", 1e-7)
        for entry, again in zip(
            history(through)[:-1], history(resumed)[:-1], strict=True
        ):  # the last: this call's mean
            assert again == pytest.approx(entry, rel=1e-6)


class TestCallbacks:
    def test_completions(self, ran, spread):
        """The processes share the prompts out, and sample with whatever share of the weights they have."""
        one, two = (json.loads((ran(how, "sft") / "result.json").read_text())["completions"] for how in (None, spread))
        assert len(one) == 3 and len({prompt for _, prompt, _ in one}) == 3
        assert two == one

    def test_averaged_weights(self, ran, spread):
        one, two = ran(None, "sft"), ran(spread, "sft")
        assert_same_weights(two / "bema", one / "bema", 1e-5)
        assert_same_weights(ran(spread, "sft-resumed") / "bema", two / "bema", 1e-7)
        average, last = weights(one / "bema"), weights(one / "model")
        assert max(float((average[name] - last[name]).abs().max()) for name in last) > 1e-3

    def test_the_moving_reference(self, ran, spread):
        one, two = ran(None, "dpo"), ran(spread, "dpo")
        assert_same_weights(two / "reference", one / "reference", 1e-5)
        assert_same_weights(ran(spread, "dpo-resumed") / "reference", two / "reference", 1e-7)
        moved, policy = weights(one / "reference"), weights(one / "model")
        assert max(float((moved[name] - policy[name]).abs().max()) for name in policy) > 1e-3


def test_the_model_card_of_two_processes(ran, spread):
    card = (ran(spread, "dpo") / "README.md").read_text()
    assert "| processes | 2 |" in card and "**Verdict" in card
