"""Two processes on the CPU, over gloo: what one process does with a batch, two do with half of it each.

Every way to spread a model is launched once, for all methods (tests/distributed_worker.py); the tests compare what it
left behind with what one process left.
"""

import json

import pytest

pytestmark = pytest.mark.slow

METHODS = ("sft", "reward", "dpo", "kto", "kto-apo", "sft-lora", "dpo-lora")
BATCH, STEPS = 4, 4
TIMES = ("runtime", "per_second", "total_flos")


@pytest.fixture(scope="session")
def ran(once, launch, left_by, tiny_model_dir):
    """`ran(spread, method)`: the folder that a method's run left."""

    def train(spread, folder):
        launch("distributed_worker.py", spread, folder, str(BATCH), tiny_model_dir, *METHODS, seconds=1500)

    return lambda spread, method: left_by(once(f"distributed-{spread}", lambda folder: train(spread, folder)), method)


def skip_saved_adapters(spread, method):
    if spread == "fsdp1" and method.endswith("-lora"):
        pytest.skip("FSDP1 gathers an adapter with its full state, which fails on a CPU")


def history(folder):
    entries = json.loads((folder / "result.json").read_text())["history"]
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in entries]


def lines(folder, name):
    return [json.loads(line) for line in (folder / "outspoken" / name).read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
class TestTwoProcesses:
    def test_are_like_one(self, ran, spread, method, assert_same_weights):
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

    def test_resumed_from_a_checkpoint_ends_the_same(self, ran, spread, method, assert_same_weights):
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

    def test_averaged_weights(self, ran, spread, saved_weights, assert_same_weights):
        one, two = ran(None, "sft"), ran(spread, "sft")
        assert_same_weights(two / "bema", one / "bema", 1e-5)
        assert_same_weights(ran(spread, "sft-resumed") / "bema", two / "bema", 1e-7)
        average, last = saved_weights(one / "bema"), saved_weights(one / "model")
        assert max(float((average[name] - last[name]).abs().max()) for name in last) > 1e-3

    def test_the_moving_reference(self, ran, spread, saved_weights, assert_same_weights):
        one, two = ran(None, "dpo"), ran(spread, "dpo")
        assert_same_weights(two / "reference", one / "reference", 1e-5)
        assert_same_weights(ran(spread, "dpo-resumed") / "reference", two / "reference", 1e-7)
        moved, policy = saved_weights(one / "reference"), saved_weights(one / "model")
        assert max(float((moved[name] - policy[name]).abs().max()) for name in policy) > 1e-3


def test_the_model_card_of_two_processes(ran, spread):
    card = (ran(spread, "dpo") / "README.md").read_text()
    assert "| processes | 2 |" in card and "**Verdict" in card
