"""GRPO and RLOO in two processes on the CPU, over gloo: like one process, without a hang, and with changes in flight.

Every way to spread a model is launched once for what is compared with one process, and once for what goes wrong in one
process only (tests/distributed_online.py); the tests look at what was left behind.
"""

import json
import math
import shutil

import pytest

pytestmark = pytest.mark.slow

WORKER = "distributed_online.py"
SCRIPTED = (
    "grpo", "grpo-lora", "off-policy", "per-completion", "entropy", "gspo", "returns", "dynamic", "plain-prompts",
    "conversations", "stream", "rloo", "rloo-clipped",
)  # fmt: skip
SAMPLED = ("sampled", "sampled-rloo")
TROUBLE = ("uneven", "one-resamples", "one-replays", "seeded", "raises", "hangs", "turn-fails")
# What is launched together -> its cases.
LAUNCHES = {"same": (*SCRIPTED, *SAMPLED, "layerwise", "live"), "trouble": TROUBLE}
STEPS, SAVED = 6, 3
TIMES = ("runtime", "per_second", "total_flos", "step_time", "latency", "seconds")


@pytest.fixture(scope="session")
def ran(once, launch, left_by, tiny_model_dir):
    """`ran(spread, case)`: the folder that a case left."""

    def find(spread, case):
        kind = "trouble" if case in TROUBLE else "same"
        folder = once(
            f"online-{kind}-{spread}", lambda folder: launch(WORKER, spread, folder, tiny_model_dir, *LAUNCHES[kind])
        )
        return left_by(folder, case)

    return find


def result(folder):
    return json.loads((folder / "result.json").read_text())


def history(folder):
    entries = result(folder)["history"]
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in entries]


def trained(folder):
    return [entry for entry in history(folder) if "loss" in entry]


def signals(folder):
    lines = (folder / "outspoken" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_numbers(found, expected, tolerance, where, skip=lambda name: False):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not skip(name):
            assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (where, name)


def skip_saved_adapters(spread, case):
    if spread == "fsdp1" and case.endswith("-lora"):
        pytest.skip("FSDP1 gathers an adapter with its full state, which fails on a CPU")


def of_other_completions(case, name):
    """Whether a number is of what went through the model: completions without advantage do not, but one on each process.

    (Where something samples that knows entropies, that of all completions is known.)
    """
    few = case not in ("grpo", "grpo-lora", "off-policy", "entropy", "live")
    return few and (name == "entropy" or name.startswith(("log_ratio/", "ratio/", "policy/")))


@pytest.mark.parametrize("case", SCRIPTED)
class TestTwoProcesses:
    def test_are_like_one(self, ran, spread, case, saved_weights, assert_same_weights):
        """Same losses, same metrics (so those of both processes were gathered), same weights at the end."""
        one, two = ran(None, case), ran(spread, case)
        kind = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero": "DEEPSPEED"}[spread.rstrip("123")]
        assert (result(two)["world"], result(two)["kind"]) == (2, f"DistributedType.{kind}")
        expected, found = history(one), history(two)
        assert len(expected) == len(found)
        for entry, other in zip(expected, found):
            assert_same_numbers(other, entry, 5e-5, entry["step"], lambda name: of_other_completions(case, name))
        rows = trained(one)
        assert len(rows) == STEPS and sum(row["grad_norm"] > 0.1 for row in rows) >= 4  # it did train
        assert any("eval_reward" in row for row in found) == (case == "grpo")
        skip_saved_adapters(spread, case)
        assert_same_weights(two / "model", one / "model", 1e-5)
        last, before = saved_weights(one / "model"), saved_weights(one / f"checkpoint-{SAVED}")
        assert max(float((last[name] - before[name]).abs().max()) for name in last) > 1e-3

    def test_one_of_them_writes(self, ran, spread, case):
        two = ran(spread, case)
        assert result(two)["wrote"] == [1, 0]
        run = json.loads((two / "outspoken" / "run.json").read_text())
        assert run["world_size"] == 2 and run["status"] == "finished"
        assert [line["step"] for line in signals(two) if "loss" in line["signals"]] == [1, 2, 3, 4, 5, 6]

    def test_the_run_directory_has_the_signals_of_both(self, ran, spread, case):
        one, two = signals(ran(None, case)), signals(ran(spread, case))
        for expected, found in zip(one, two, strict=True):
            for name, value in expected["signals"].items():
                if name.startswith(("time/", "memory/")) or any(t in name for t in TIMES):
                    continue
                if name.startswith(("grad/", "grad_norm_clipped")) and spread != "ddp":
                    continue  # a process has a share of the gradients, or none
                if of_other_completions(case, name):
                    continue
                assert found["signals"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (expected["step"], name)

    def test_resumed_from_a_checkpoint_ends_the_same(self, ran, spread, case, assert_same_weights):
        skip_saved_adapters(spread, case)
        through, resumed = ran(spread, case), ran(spread, f"{case}-resumed")
        assert_same_weights(resumed / "model", through / "model", 1e-7)
        for entry, again in zip(trained(through), trained(resumed), strict=True):
            assert_same_numbers(again, entry, 1e-6, entry["step"])


def test_the_cases_test_what_they_are_for(ran):
    """One process is enough: two do the same."""
    rows = {case: trained(ran(None, case)) for case in SCRIPTED}
    for case in ("off-policy", "gspo", "rloo-clipped"):
        assert max(row["clip_ratio/region_mean"] for row in rows[case]) > 0.1
    assert all("kl" in row for case in ("grpo", "off-policy", "rloo", "plain-prompts") for row in rows[case])
    assert len({row["entropy_coef"] for row in rows["entropy"]}) > 2
    policy_losses = [row["policy_loss"] - row["loss"] for row in rows["entropy"]]
    assert policy_losses[0] == pytest.approx(0, abs=1e-6) and max(policy_losses) > 0.1  # a bonus from step 2 on
    assert max(row.get("dynamic_sampling/rounds", 0) for row in rows["dynamic"]) >= 1
    assert max(row["tools/call_frequency"] for row in rows["conversations"]) > 0.5


class TestSampling:
    @pytest.mark.parametrize("case", SAMPLED)
    def test_processes_draw_different_completions(self, ran, spread, case):
        """Also those that have the same prompt: the middle group stands on both."""
        first, second = result(ran(spread, case))["seen"]
        assert len(first) == len(second) >= 12
        drawn = [tuple(ids) for _, _, ids in first + second if len(ids) > 4]
        assert len({*drawn}) == len(drawn) > 20
        if case == "sampled":
            shared = {(step, prompt) for step, prompt, _ in first} & {(step, prompt) for step, prompt, _ in second}
            assert shared

    @pytest.mark.parametrize("case", SAMPLED)
    def test_however_the_model_is_spread_the_same_is_sampled(self, ran, spread, case):
        assert result(ran(spread, case))["seen"] == result(ran("ddp", case))["seen"]

    def test_layer_by_layer(self, ran, spread, assert_same_weights):
        one, other = ran(spread, "sampled"), ran(spread, "layerwise")
        assert result(one)["seen"] == result(other)["seen"]
        assert_same_weights(other / "model", one / "model", 1e-6)

    @pytest.mark.parametrize("case", (*SAMPLED, "layerwise"))
    def test_resumed_from_a_checkpoint_samples_the_same(self, ran, spread, case, assert_same_weights):
        through, resumed = ran(spread, case), ran(spread, f"{case}-resumed")
        for before, after in zip(result(through)["seen"], result(resumed)["seen"], strict=True):
            assert after == [row for row in before if row[0] >= SAVED] and after
        assert_same_weights(resumed / "model", through / "model", 1e-7)
        for entry, again in zip(trained(through), trained(resumed), strict=True):
            assert_same_numbers(again, entry, 1e-6, entry["step"])


# -------------------------------------------------------------------------------------------- changes in flight

BEFORE = {"beta": 0.1, "epsilon": 0.05, "temperature": 1.0, "entropy_coef": 0.0, "max_completion_length": 8}
AFTER = {"beta": 0.4, "epsilon": 0.01, "temperature": 0.5, "entropy_coef": 0.2, "max_completion_length": 5}


class TestAnAgentsChange:
    def test_takes_effect_at_the_next_step_of_all_processes(self, ran, spread):
        """The change was asked for after step 2; the batch of steps 3 and 4 is sampled with it."""
        folder = ran(spread, "live")
        used = result(folder)["used"]
        assert len(used) == 2
        for process in used:
            for step in range(1, STEPS + 1):
                now = process[str(step)]
                expected = BEFORE if step <= 2 else AFTER
                peak = 0.003 if step <= 2 else 0.01
                rate = now.pop("learning_rate")
                assert rate == pytest.approx(peak * (1 - (step - 1) / STEPS)), step  # linear down to 0
                if step % 2:  # one generation batch for two steps
                    assert now.pop("sampled") == [expected["temperature"], expected["max_completion_length"]]
                assert now == expected, step
        lines = [json.loads(line) for line in (folder / "outspoken" / "changes.jsonl").read_text().splitlines()]
        applied = next(line for line in lines if line["state"] == "applied")
        assert applied["step"] == 2 and applied["fields"].keys() == {*AFTER, "learning_rate"}

    def test_has_the_same_effect_as_in_one_process(self, ran, spread, assert_same_weights):
        one, two = ran(None, "live"), ran(spread, "live")
        for entry, other in zip(trained(one), trained(two), strict=True):
            assert_same_numbers(other, entry, 5e-5, entry["step"])
        rows = trained(two)
        longest = [row["completions/max_length"] for row in rows if "reward" in row]
        assert longest[0] == 8 and max(longest[1:]) == 5
        assert ["policy_loss" in row for row in rows] == [False] * 2 + [True] * 4  # which a bonus is taken off
        assert_same_weights(two / "model", one / "model", 1e-5)


# -------------------------------------------------------------------------------------------- what one process meets


@pytest.mark.parametrize("spread", ["ddp", "fsdp2", "zero3"], indirect=True)
class TestOneProcessAlone:
    def test_ends_its_completions_earlier(self, ran, spread):
        folder = ran(spread, "uneven")
        lengths = [{len(ids) for _, _, ids in process} for process in result(folder)["seen"]]
        assert max(lengths[0]) == 16 and max(lengths[1]) == 2
        rows = trained(folder)
        assert len(rows) == STEPS and all(math.isfinite(row["loss"]) for row in rows)
        # What was sampled is what is trained on, on both: the sampler's log-probabilities are the training pass's.
        gaps = [line["signals"]["sampling/abs_max"] for line in signals(folder) if "loss" in line["signals"]]
        assert len(gaps) == STEPS and max(gaps) < 1e-4

    def test_samples_groups_anew(self, ran, spread):
        """Its one group is all alike at every other call of its reward function."""
        folder = ran(spread, "one-resamples")
        rows = trained(folder)
        assert len(rows) == STEPS
        assert rows[0]["dynamic_sampling/rounds"] == 0
        for row in rows[1:]:
            assert row["dynamic_sampling/rounds"] == row["dynamic_sampling/replaced_groups"] == 1
            assert row["dynamic_sampling/left_share"] == 0 and row["frac_reward_zero_std"] == 0.5
        # Every step has a group of 4 on each process; on the second one, four more from step 2 on.
        counts = [len(process) for process in result(folder)["seen"]]
        assert counts == [4 * STEPS, 4 * STEPS + 4 * (STEPS - 1)]

    def test_replays_a_group(self, ran, spread):
        rows = trained(ran(spread, "one-replays"))
        # The second process keeps its informative group of steps 1, 3, 5 and has it at steps 2, 4, 6; the first keeps all.
        assert [row["replay/replaced_groups"] for row in rows] == [0, 1, 0, 1, 0, 1]
        assert [row["replay/buffered_groups"] for row in rows] == [2, 2, 4, 4, 5, 4]
        assert [row["frac_reward_zero_std"] for row in rows] == [0, 0.5] * 3

    def test_has_a_seed_of_its_own(self, ran, spread):
        """Completions of one group on both, sampled with generation_kwargs={"seed": 7}, and at each step others."""
        folder = ran(spread, "seeded")
        first, second = result(folder)["seen"]
        assert {(step, prompt) for step, prompt, _ in first} == {(step, prompt) for step, prompt, _ in second}
        drawn = [tuple(ids[:3]) for _, _, ids in first + second if len(ids) > 2]
        assert len(drawn) > 20 and len({*drawn}) > len(drawn) - 3
        assert result(folder)["seen"] == result(ran("ddp", "seeded"))["seen"]

    @pytest.mark.parametrize(
        "case, error",
        [
            ("raises", "Reward function 'judge' raised KeyError: 'no such answer'; fix it"),
            ("hangs", "Reward function 'judge' did not return within reward_timeout=1 seconds"),
        ],
    )
    def test_has_a_reward_function_that_fails(self, ran, spread, case, error):
        """Both stop, and leave the last finished step behind, from which the run goes on."""
        folder = ran(spread, case)
        told = result(folder)
        assert told["told"][0].startswith(
            "RuntimeError: Process 1 failed, so this one stops too. There: RuntimeError: "
        )
        assert told["told"][1].startswith(f"RuntimeError: {error}") and error in told["told"][0]
        for text in told["told"]:
            assert text.splitlines()[1] == (
                f"The run is saved up to step 1 in {folder}/checkpoint-1; resume from there."
            )
        assert told["seconds"] < 60  # the function would have taken 600, and a broken connection is found after 1800
        assert told["left"] == ["checkpoint-1"]
        # The second generation batch failed at micro-batch 3, in the middle of step 2. Its micro-batch 2 is still there.
        assert told["sampled_at"] == [3, 6, 9]
        assert [row["step"] for row in trained(folder)] == [1, 2, 3, 4, 5, 6]
        assert all(row["grad_norm"] > 0 for row in trained(folder))

    def test_fails_while_the_other_is_in_a_conversation(self, ran, spread):
        told = result(ran(spread, "turn-fails"))
        assert told["told"][1] == "RuntimeError: The line went dead"
        assert told["told"][0].endswith("There: RuntimeError: The line went dead")
        assert told["seconds"] < 60


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_killed_and_resumed(tmp_path, tiny_model_dir, how, launch, left_by, assert_same_weights):
    """One process is killed with SIGKILL while it samples for step 5; resumed, the run is what it would have been."""
    code = launch(WORKER, how, tmp_path, tiny_model_dir, "went-through", "killed", seconds=300)
    assert code != 0 and not (tmp_path / "killed" / "result.json").exists()
    assert launch(WORKER, how, tmp_path, tiny_model_dir, "killed", seconds=300) == 0
    through, killed = left_by(tmp_path, "went-through"), left_by(tmp_path, "killed")
    for before, after in zip(result(through)["seen"], result(killed)["seen"], strict=True):
        assert after == [row for row in before if row[0] >= 4] and after
    assert trained(killed) == trained(through)
    assert_same_weights(killed / "model", through / "model", 0)


def test_resumed_by_another_number_of_processes(tmp_path, tiny_model_dir, launch, left_by):
    """What is left of a generation batch is of two processes; one samples it anew and goes on, and two after it."""

    def drop_after(step):
        """Leave the run as if it had been killed after that step, in the middle of a generation cycle."""
        for path in run.glob("checkpoint-*"):
            if int(path.name.rpartition("-")[2]) > step:
                shutil.rmtree(path)
        (run / "result.json").unlink(missing_ok=True)

    run = tmp_path / "killed"
    assert launch(WORKER, "ddp", tmp_path, tiny_model_dir, "went-through", seconds=300) == 0
    shutil.copytree(tmp_path / "went-through", run)
    for step, how, told in ((3, None, "is of 2 process(es) (there are 1 now)"), (5, "ddp", "is of 1 process(es)")):
        drop_after(step)
        assert launch(WORKER, how, tmp_path, tiny_model_dir, "killed", seconds=300) == 0
        assert [row["step"] for row in trained(run)] == [1, 2, 3, 4, 5, 6]
        sampled_at = {row[0] for process in result(left_by(tmp_path, "killed"))["seen"] for row in process}
        assert min(sampled_at) == step  # at once
        assert told in (tmp_path / "log.txt").read_text()
