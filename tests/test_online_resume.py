"""A run that is killed and resumed is the run that was not: prompts, completions, buffers, random numbers, metrics.

Killed by an exception that nothing catches, at a random place of a random step; and, in tests marked slow, by SIGKILL.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from outspoken import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from outspoken.trainers.rollouts import checkpoint

STEPS = 8
TIMES = ("runtime", "per_second", "total_flos", "step_time")
PROMPTS = ["The sky", "What is 2 + 2?", "green grass", "the quick brown fox", "It is", "dog", "What color is the sky?"]
ROWS = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]


def graded(completion_ids, **_):
    return [(sum(ids) % 11 - 5) / 4 for ids in completion_ids]


def two_worded(completion_ids, **_):
    """Two values only, so that many groups are all alike."""
    return [float(sum(ids) % 5 == 0) for ids in completion_ids]


# Case -> trainer, reward functions, settings. A checkpoint follows every update step, so most of them fall inside of what
# one generation batch serves; and 7 prompts make an epoch end within the run.
BATCHES = {"per_device_train_batch_size": 2, "num_generations": 2}
CASES = {
    "off-policy": (
        GRPOTrainer,
        [graded],
        {**BATCHES, "steps_per_generation": 3, "gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1},
    ),
    "dynamic": (
        GRPOTrainer,
        [two_worded, graded],
        {
            **BATCHES,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 1,
            "dynamic_sampling": True,
            "reward_weights": [1.0, 0.0],
        },
    ),
    "replay": (
        GRPOTrainer,
        [two_worded],
        {**BATCHES, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "replay_buffer_size": 5},
    ),
    "entropy": (
        GRPOTrainer,
        [graded],
        {
            **BATCHES,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 1,
            "use_adaptive_entropy": True,
            "entropy_target": 5.6,
            "entropy_coef": 0.05,
            "dropout": True,
        },
    ),
    "evaluated": (
        RLOOTrainer,
        [graded],
        {
            **BATCHES,
            "steps_per_generation": 3,
            "gradient_accumulation_steps": 1,
            "loss_type": "clipped",
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
    ),
    "stream": (GRPOTrainer, [graded], {**BATCHES, "steps_per_generation": 3, "stream": True}),
    "seldom-logged": (GRPOTrainer, [graded], {**BATCHES, "steps_per_generation": 3, "logging_steps": 4}),
    "seeded": (
        GRPOTrainer,
        [graded],
        {**BATCHES, "steps_per_generation": 2, "num_iterations": 2, "generation_kwargs": {"seed": 5}},
    ),
}


def build(case, folder, model, tokenizer, steps=STEPS):
    kind, rewards, settings = CASES[case]
    settings = dict(settings)
    if settings.pop("dropout", False):
        model.config.attention_dropout = 0.2
    rows = Dataset.from_list(ROWS)
    if settings.pop("stream", False):
        # Longer than the run, which has no epochs.
        rows = IterableDataset.from_generator(lambda: ({"prompt": f"{row['prompt']} {i}", "number": i}
                                                       for i in range(9) for row in ROWS))  # fmt: skip
    trainer = kind(
        model=model,
        reward_funcs=rewards,
        args={GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind](
            str(folder),
            **{
                "max_steps": steps,
                "per_device_eval_batch_size": 2,
                "max_completion_length": 6,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": 1,
                "report_to": [],
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "seed": 11,
                **settings,
            },
        ),
        train_dataset=rows,
        eval_dataset=Dataset.from_list(ROWS[:2]) if "eval_steps" in settings else None,
        processing_class=tokenizer,
    )
    trainer.seen, trainer.trained_on = [], []
    score, compute_loss = trainer.rewards.score, trainer.compute_loss

    def scored(prompts, completions, completion_ids, *args, **kwargs):
        mode = "train" if trainer.model.training else "eval"
        trainer.seen.append([mode, trainer.state.global_step, list(prompts), completion_ids])
        return score(prompts, completions, completion_ids, *args, **kwargs)

    def loss_of(model, batch, *args, **kwargs):
        if model.training:
            micro_batch = [batch.completion_ids.tolist(), batch.advantages.tolist(), batch.versions.tolist()]
            trainer.trained_on.append([trainer.state.global_step, *micro_batch])
        return compute_loss(model, batch, *args, **kwargs)

    trainer.rewards.score, trainer.compute_loss = scored, loss_of
    return trainer


def history(trainer):
    entries = [
        {k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in trainer.state.log_history
    ]
    return [entry for entry in entries if "train_loss" not in entry]  # the mean loss of one call of `train`


def assert_is_the_rest_of(resumed, whole, start):
    """Whether a run resumed after step `start` is what the whole run was from there on."""
    assert start > 0 and resumed.trained_on
    for found, expected in ((resumed.seen, whole.seen), (resumed.trained_on, whole.trained_on)):
        place = 1 if found is resumed.seen else 0
        # At the step of the checkpoint it has been evaluated before it is saved.
        rest = [x for x in expected if x[place] >= start and not (x[0] == "eval" and x[place] == start)]
        assert found == rest
    skip = set()
    if resumed.args.logging_steps > 1:
        skip = {"loss"}  # of the steps since the checkpoint only, as transformers has it
    left = [[{k: v for k, v in e.items() if k not in skip} for e in history(run)] for run in (resumed, whole)]
    assert left[0] == left[1]
    for (name, mine), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(mine, theirs), name
    for kept in ("entropy_coef", "_last_entropy"):
        assert getattr(resumed, kept, None) == getattr(whole, kept, None)
    if resumed.args.to_dict().get("replay_buffer_size"):
        buffers = [[(score, g.completion_ids.tolist()) for score, g in run.replay.groups] for run in (resumed, whole)]
        assert buffers[0] == buffers[1] and buffers[0]


# ------------------------------------------------------------------------------------------------- in this process


class Killed(BaseException):
    pass


@pytest.fixture
def make(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    """`make(case, folder)`: a trainer; its model does not depend on what was random before."""
    return lambda case, folder: build(case, tmp_path / folder, tiny_model_factory(), tiny_tokenizer_factory())


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.fixture
def whole(whole_runs, make, tmp_path_factory, tiny_model_factory, tiny_tokenizer_factory):
    """`whole(case)`: a run that nothing stopped."""

    def find(case):
        if case not in whole_runs:
            folder = tmp_path_factory.mktemp(f"whole-{case}")
            run = build(case, folder, tiny_model_factory(), tiny_tokenizer_factory())
            run.train()
            whole_runs[case] = run
        return whole_runs[case]

    return find


def kill_at(trainer, place, step):
    """Let the trainer be killed at a place once it has finished `step` update steps."""
    owner, name = {
        "sampling": (trainer.rollouts, "generate"),
        "scoring": (trainer.rewards, "score"),
        "training": (trainer, "compute_loss"),
        "saving": (trainer, "_save_rng_state"),  # the weights are written, the trainer's state is not
        "before the optimizer's step": (trainer.accelerator, "clip_grad_norm_"),
    }[place]
    original = getattr(owner, name)

    def killed(*args, **kwargs):
        if trainer.state.global_step >= step:
            raise Killed
        return original(*args, **kwargs)

    setattr(owner, name, killed)


PLACES = ("sampling", "scoring", "training", "saving", "before the optimizer's step")


@pytest.mark.parametrize("case", ["off-policy", "dynamic", "replay", "entropy"])
def test_a_resumed_run_is_the_run(make, whole, case):
    drawn = random.Random(case)
    place, step = drawn.choice(PLACES), drawn.randrange(2, 5)  # in each case it samples once more after that
    first = make(case, "run")
    kill_at(first, place, step)
    with pytest.raises(Killed):
        first.train()
    last = checkpoint.last_whole(first.args.output_dir)
    start = int(last.rpartition("-")[2])
    assert start >= step - (place == "saving")
    resumed = make(case, "run")
    resumed.train(resume_from_checkpoint=True)
    assert_is_the_rest_of(resumed, whole(case), start)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_wherever_it_is_killed(make, whole, case, place):
    for step in (2, 4):
        first = make(case, f"run-{step}")
        kill_at(first, place, step)
        with pytest.raises(Killed):
            first.train()
        start = int(checkpoint.last_whole(first.args.output_dir).rpartition("-")[2])
        resumed = make(case, f"run-{step}")
        resumed.train(resume_from_checkpoint=True)
        assert_is_the_rest_of(resumed, whole(case), start)


@pytest.mark.slow
def test_the_cases_test_what_they_are_for(whole):
    cycle = CASES["off-policy"][2]
    assert (2 * cycle["gradient_accumulation_steps"]) % (cycle["steps_per_generation"] * cycle["num_iterations"]) != 0
    assert any(row.get("dynamic_sampling/rounds", 0) > 0 for row in history(whole("dynamic")))
    assert any(row.get("replay/replaced_groups", 0) > 0 for row in history(whole("replay")))
    assert any(max(versions) < step for step, _, _, versions in whole("replay").trained_on)
    assert len({row["entropy_coef"] for row in history(whole("entropy"))}) > 3
    assert sum("eval_reward" in row for row in history(whole("evaluated"))) == STEPS / 2
    for case in ("off-policy", "dynamic", "evaluated"):
        prompts = [prompt for mode, _, batch, _ in whole(case).seen if mode == "train" for prompt in batch]
        assert len({*prompts}) > 4
    numbers = [tuple(ids) for _, _, _, batch in whole("seeded").seen for ids in batch if len(ids) > 2]
    assert len({*numbers}) == len(numbers)


# ------------------------------------------------------------------------------------------------- what fails or is lost


def test_a_checkpoint_whose_writing_was_cut_short_is_passed_over(tmp_path):
    assert checkpoint.last_whole(str(tmp_path)) is None and checkpoint.last_whole(str(tmp_path / "no")) is None
    for step, text in ((8, '{"global_step": 8}'), (9, '{"global'), (10, None), (11, "[]")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-12.txt").write_text("")
    (tmp_path / "old-checkpoint-x").mkdir()
    assert checkpoint.last_whole(str(tmp_path)) == str(tmp_path / "checkpoint-8")


@pytest.mark.parametrize("what", ["missing", "torn", "of two processes"])
def test_without_what_was_sampled_the_batch_is_sampled_anew(make, whole, tmp_path, what, caplog):
    """The prompts are the same as before; what is said names the reason."""
    folder = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(Path(whole("off-policy").args.output_dir) / "checkpoint-4", folder)
    file = folder / "rollouts_0.pt"
    if what == "missing":
        file.unlink()
    elif what == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        checkpoint.save_state(str(folder), 0, checkpoint.load_state(str(folder), 0) | {"processes": 2})
    resumed = make("off-policy", "run")
    steps, sample = [], resumed._sample_and_score
    resumed._sample_and_score = lambda rows: steps.append(resumed._step) or sample(rows)
    resumed.train(resume_from_checkpoint=str(folder))
    assert steps == [8, 12]  # 4 steps of 2 micro-batches; a batch serves 6
    reason = "is of 2 process(es)" if what == "of two processes" else "is not there or cannot be read"
    assert sum(reason in message for message in caplog.messages) == 1


def failing(make, fails, case="off-policy"):
    """A run whose reward function fails where `fails(trainer)` is true, and what it said."""
    run = make(case, "run")
    name, judge = next(iter(run.rewards.functions.items()))

    def broken(**given):
        if fails(run):
            raise KeyError("gone")
        return judge(**given)

    run.rewards.functions[name] = run.rewards.calls.functions[name] = broken
    run.args.save_steps = run.state.save_steps = 100
    with pytest.raises(RuntimeError, match="raised KeyError: 'gone'") as caught:
        run.train()
    return run, "\n".join(caught.value.__notes__)


def test_a_failure_within_an_update_step_keeps_what_that_step_still_needs(make):
    """Batches of 3 micro-batches, steps of 2: the second batch fails in the middle of step 2."""
    CASES["mid-step"] = (GRPOTrainer, [graded], {**BATCHES, "steps_per_generation": 3, "gradient_accumulation_steps": 2,
                                                 "save_steps": 100})  # fmt: skip
    run, note = failing(make, lambda run: run._step == 3, "mid-step")
    folder = f"{run.args.output_dir}/checkpoint-1"
    assert note == f"The run is saved up to step 1 in {folder}; resume from there."
    resumed = make("mid-step", "run")
    steps, sample = [], resumed._sample_and_score
    resumed._sample_and_score = lambda rows: steps.append(resumed._step) or sample(rows)
    resumed.train(resume_from_checkpoint=True)
    assert steps == [3, 6, 9, 12, 15]
    assert resumed.trained_on[0][1:] == run.trained_on[2][1:]  # the third micro-batch of the first batch
    assert [entry["step"] for entry in history(resumed)] == [1, 2, 3, 4, 5, 6, 7, 8]
    del CASES["mid-step"]


def test_a_failure_in_evaluation_leaves_a_checkpoint(make):
    run, note = failing(make, lambda run: not run.model.training, "evaluated")
    assert note == f"The run is saved up to step 2 in {run.args.output_dir}/checkpoint-2; resume from there."
    resumed = make("evaluated", "run")
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in history(resumed) if "eval_reward" in entry] == [4, 6, 8]


# ------------------------------------------------------------------------------------------------- by SIGKILL


def state_of(run):
    """What can be compared, as JSON has it."""
    parameters = {name: p.detach().double().sum().item() for name, p in run.model.named_parameters()}
    return json.loads(json.dumps([run.seen, run.trained_on, history(run), parameters]))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["off-policy", "dynamic", "replay", "entropy"])
def test_killed_from_outside(tmp_path, tiny_model_dir, case):
    """SIGKILL at a random moment after a random step, in the middle of whatever it does then; three times in one run."""
    drawn = random.Random(f"{case} {time.time()}")

    def start(folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTSPOKEN_LOG": "off"}
        command = [sys.executable, __file__, str(tmp_path / folder), tiny_model_dir, case]
        with open(tmp_path / f"{folder}.txt", "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    assert start("whole").wait(timeout=120) == 0
    waits = []
    for _ in range(3):
        process = start("run")
        lines, began = tmp_path / "run" / "outspoken" / "metrics.jsonl", time.monotonic()
        before = len(lines.read_text().splitlines()) if lines.exists() else 0
        more, wait = drawn.randrange(1, 6), drawn.uniform(0, 0.15)
        try:
            while process.poll() is None and time.monotonic() - began < 120:
                if lines.exists() and len(lines.read_text().splitlines()) >= before + more:
                    break
                time.sleep(0.005)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait(timeout=30)
        waits.append((before, more, wait))
    assert start("run").wait(timeout=120) == 0, waits
    whole, run = (json.loads((tmp_path / f"{folder}.json").read_text()) for folder in ("whole", "run"))
    for found, expected in zip(run[:2], whole[:2]):
        assert found == expected[len(expected) - len(found) :], waits
    assert run[2:] == whole[2:], waits


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model_dir, case = sys.argv[1:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    run = build(case, folder, model, tokenizer, steps=30)
    run.train(resume_from_checkpoint=checkpoint.last_whole(folder))
    Path(f"{folder}.json").write_text(json.dumps(state_of(run)))
