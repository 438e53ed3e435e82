"""What GRPOTrainer does beyond TRL's: advantages of other papers, resampling, replay, prompts computed once, completions
left out, and errors that lose nothing."""

import contextlib
import itertools
import math
import os

import pandas as pd
import pytest
import torch
from datasets import Dataset

from outspoken.trainers import advantages as formulas
from outspoken.trainers import completion_scores, group_prompts
from outspoken.trainers.grpo import GRPOConfig, GRPOTrainer
from outspoken.trainers.rollouts.batch import RolloutBatch, sampled_from_ids
from outspoken.trainers.rollouts.environments import Episodes
from outspoken.trainers.rollouts.replay import ReplayBuffer, join
from outspoken.trainers.rollouts.sampler import more_prompts

PROMPTS = ["The sky", "What is 2 + 2?", "green grass", "the quick brown fox", "It is", "dog"]


def spread(completion_ids, **_):
    return [(sum(ids) % 17) / 4 for ids in completion_ids]


@pytest.fixture
def build(tmp_path, tiny_tokenizer_factory, tiny_model_factory, short_run):
    """`build(reward_funcs, <trainer arguments>, **settings)`."""

    def trainer(reward_funcs=spread, model=None, callbacks=None, prompts=PROMPTS, peft_config=None, **settings):
        args = GRPOConfig(
            **{
                "output_dir": str(tmp_path / "run"),
                **short_run,
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 6,
                "max_steps": 2,
                "diagnose": False,
                **settings,
            }
        )
        return GRPOTrainer(
            model=tiny_model_factory() if model is None else model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": prompts, "label": list(range(len(prompts)))}),
            processing_class=tiny_tokenizer_factory(),
            callbacks=callbacks,
            peft_config=peft_config,
        )

    return trainer


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def script(trainer, completions):
    """Let the trainer get these completions, over and over, in place of its own."""
    stream = itertools.cycle(completions)
    ends = trainer.rollouts.end_ids
    trainer.rollouts.generate = lambda prompt_ids, params, **_: sampled_from_ids(
        [next(stream) for _ in prompt_ids], ends
    )


# Advantages

REWARDS = [1.0, 0.0, 3.0, 0.0, 2.0, 2.0, 2.0, 5.0]


@pytest.mark.parametrize(
    "kind, settings, expected",
    [
        ("rloo", {}, lambda r, n: [r[i] - (sum(r[g(i)]) - r[i]) / 3 for i in range(8)]),
        ("opo", {}, lambda r, n: [r[i] - dot(r[g(i)], n[g(i)]) / sum(n[g(i)]) for i in range(8)]),
        ("gpg", {}, lambda r, n: [r[i] - sum(r[g(i)]) / 4 for i in range(8)]),
        ("best_of_group", {}, lambda r, n: [0, 0, 2, 0, 0, 0, 0, 3]),
        (
            "reinforce++_baseline",
            {},
            lambda r, n: standardised([r[i] - sum(r[g(i)]) / 4 for i in range(8)], n),
        ),
        ("reinforce++", {}, lambda r, n: standardised(r, n)),
        # 3 of 4 fail for pass@2: q = C(3,2)/C(4,2) = 1/2, std 1/2: 1 to the one, (1/2 - 2/3) / (1/2) to the others.
        (
            "pass_at_k",
            {"pass_at_k": 2, "pass_reward": 3.0},
            lambda r, n: [-1 / 3, -1 / 3, 1, -1 / 3] + [-1 / 3] * 3 + [1],
        ),
    ],
)
def test_advantages_of_other_papers(build, kind, settings, expected):
    """What reaches the loss is the paper's number for the rewards and lengths at hand."""
    lengths = [1, 2, 3, 4, 1, 1, 2, 5]
    run = build(lambda completion_ids, **_: REWARDS, advantage_estimator=kind, max_steps=1, **settings)
    script(run, [[10] * length for length in lengths])
    seen = []
    loss = run.compute_loss
    run.compute_loss = lambda model, batch, **k: seen.append(batch) or loss(model, batch, **k)
    run.train()
    (batch,) = seen
    found = batch.advantages if batch.advantages.ndim == 1 else batch.advantages[:, 0]
    by_length = sorted(zip(batch.loss_mask.sum(1).tolist(), found.tolist()))
    wanted = sorted(zip(lengths, expected(REWARDS, lengths)))
    assert [n for n, _ in by_length] == [n for n, _ in wanted]
    for (_, ours), (_, theirs) in zip(sorted(by_length), sorted(wanted)):
        assert ours == pytest.approx(theirs, abs=1e-5)


def g(i):
    return slice(0, 4) if i < 4 else slice(4, 8)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def standardised(values, lengths):
    tokens = [v for v, n in zip(values, lengths) for _ in range(n)]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((t - mean) ** 2 for t in tokens) / len(tokens))
    return [(v - mean) / std for v in values]


def test_remax_takes_the_reward_of_the_likeliest_completion(build):
    """The greedy completion is [7]: its reward is 1, and that of [7, 8, 9], which is sampled, 3."""
    run = build(
        lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        advantage_estimator="remax",
        max_steps=1,
    )
    asked = []

    def generate(prompt_ids, params, **_):
        asked.append((params.temperature, len(prompt_ids)))
        return sampled_from_ids([[7] if params.temperature == 0 else [7, 8, 9] for _ in prompt_ids], [0])

    run.rollouts.generate = generate
    seen = []
    loss = run.compute_loss
    run.compute_loss = lambda model, batch, **k: seen.append(batch.advantages.tolist()) or loss(model, batch, **k)
    run.train()
    assert asked == [(1.0, 8), (0.0, 2)] and seen == [[2.0] * 8]


def test_reinforce_pp_has_the_penalty_in_the_reward_and_not_in_the_loss(build):
    run = build(advantage_estimator="reinforce++", beta=0.5, max_steps=3)
    seen = []
    advantages = formulas.reinforce_plus_plus
    run.train()
    assert all("kl" in entry for entry in logs_of(run))
    batch = run._sample_and_score([{"prompt": PROMPTS[0]}] * 8)
    kl = batch.old_logps - batch.ref_logps
    rewards = torch.tensor(
        spread([ids[: int(n)].tolist() for ids, n in zip(batch.completion_ids, batch.loss_mask.sum(1))])
    )
    expected = advantages(rewards, kl, batch.loss_mask, 0.5)
    torch.testing.assert_close(batch.advantages, expected, atol=1e-5, rtol=1e-5)
    assert kl.abs().max() > 1e-3 and not seen


# Which completions


def test_dynamic_sampling_replaces_groups_without_spread(build):
    """A prompt scores 0 for all of its completions unless it is 'dog'; so every group becomes one of 'dog'."""

    def judge(prompts, completion_ids, **_):
        return [float(len(ids) % 3) if prompt == "dog" else 0.0 for prompt, ids in zip(prompts, completion_ids)]

    seen = []
    run = build(judge, dynamic_sampling=True, dynamic_sampling_max_rounds=60, max_steps=2, seed=3)
    lengths = [[10] * n for n in (1, 2, 3, 4, 5)]
    script(run, lengths)
    batch_of = run._sample_and_score
    run._sample_and_score = lambda rows: seen.append(batch_of(rows)) or seen[-1]
    run.train()
    dog = run.processing_class("dog")["input_ids"]
    for batch in seen:
        assert [ids[mask.bool()].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)] == [dog] * 8
        assert (batch.advantages.view(2, 4).abs().sum(1) > 0).all()
    log = logs_of(run)[0]
    assert log["dynamic_sampling/left_share"] == 0 and log["dynamic_sampling/rounds"] >= 1
    assert log["dynamic_sampling/sampled_per_trained"] == 1 + log["dynamic_sampling/replaced_groups"] / 2
    # Rewards are those of what was drawn first, not of what is left of it: they say how good the policy is.
    assert log["reward"] < 1.0


@pytest.mark.parametrize("settings", [{"dynamic_sampling": True}, {"advantage_estimator": "remax"}])
def test_what_rewards_log_belongs_to_the_completions_that_are_trained_on(build, settings):
    """Functions are called again for groups that are sampled anew, and for the likeliest completions."""
    calls = []

    def judge(completions, log_extra, log_metric, **_):
        calls.append(len(completions))
        log_extra("call", [len(calls)] * len(completions))
        if len(calls) == 2:
            log_extra("second", ["anew"] * len(completions))
        log_metric("judge/calls", len(calls))
        # The first group has no spread when it is drawn first.
        return [float(i % 2) if i >= 4 or len(calls) > 1 else 1.0 for i in range(len(completions))]

    run = build(judge, log_completions=True, num_completions_to_print=0, max_steps=1, **settings)
    run.train()
    table = pd.read_parquet(f"{run.args.output_dir}/completions/completions_00001.parquet")
    if "dynamic_sampling" in settings:
        assert calls == [8, 4] and table["call"].tolist() == [2] * 4 + [1] * 4
        assert table["second"].tolist()[:4] == ["anew"] * 4 and table["second"][4:].isna().all()
    else:
        assert calls == [8, 2] and table["call"].tolist() == [1] * 8 and "second" not in table
    assert logs_of(run)[0]["judge/calls"] == 1


def test_dynamic_sampling_is_bounded(build):
    run = build(
        lambda completions, **_: [1.0] * len(completions), dynamic_sampling=True, dynamic_sampling_max_rounds=2
    )
    calls = []
    sample = run.rollouts.sample
    run.rollouts.sample = lambda rows, *a: calls.append(len(rows)) or sample(rows, *a)
    run.train()
    log = logs_of(run)[-1]
    assert calls == [8, 8, 8] * 2
    assert log["dynamic_sampling/rounds"] == 2 and log["dynamic_sampling/left_share"] == 1
    assert log["dynamic_sampling/replaced_groups"] == 4 and log["grad_norm"] == 0.0


def test_further_prompts_are_the_same_after_a_resume():
    assert more_prompts(10, 4, 0, 3, 1) == more_prompts(10, 4, 0, 3, 1)
    assert more_prompts(10, 4, 0, 3, 1) != more_prompts(10, 4, 0, 3, 2) != more_prompts(10, 4, 0, 4, 1)
    assert sorted(more_prompts(3, 6, 0, 0, 1)) == [0, 0, 1, 1, 2, 2]


def a_batch(values, width=2):
    n = len(values)
    column = torch.tensor(values).view(n, 1).expand(n, width).contiguous()
    ones = torch.ones_like(column)
    return RolloutBatch(
        prompt_ids=column, prompt_mask=ones, completion_ids=column, completion_mask=ones, loss_mask=ones,
        advantages=torch.tensor(values, dtype=torch.float32), active_tokens=torch.tensor(n), temperature=1.0,
        max_completion_length=9, versions=torch.zeros(n), old_logps=column.float(),
    )  # fmt: skip


def test_replay_puts_the_most_informative_group_in_place_of_an_empty_one():
    buffer = ReplayBuffer(size=2, group_size=2)
    batch, replaced = buffer.exchange(a_batch([1, 1, 2, 2, 3, 3]), torch.tensor([0.5, 2.0, 1.0]))
    assert replaced == 0 and batch.advantages.tolist() == [1, 1, 2, 2, 3, 3] and len(buffer) == 2
    batch, replaced = buffer.exchange(a_batch([4, 4, 5, 5, 6, 6], width=3), torch.tensor([0.0, 1.0, 0.0]))
    assert replaced == 2 and batch.advantages.tolist() == [2, 2, 5, 5, 3, 3]
    assert batch.completion_ids[0].tolist() == [2, 2, 0] and batch.completion_mask[0].tolist() == [1, 1, 0]
    # What was replayed is gone; what is new is kept.
    assert [group.advantages.tolist() for _, group in buffer.groups] == [[5, 5]]
    again = ReplayBuffer(2, 2)
    again.restore(buffer.state(), "cpu")
    assert again.groups[0][0] == 1.0 and len(again) == 1


def test_equal_scores_keep_the_newest():
    buffer = ReplayBuffer(size=1, group_size=2)
    buffer.exchange(a_batch([1, 1]), torch.tensor([1.0]))
    buffer.exchange(a_batch([2, 2]), torch.tensor([1.0]))
    assert buffer.groups[0][1].advantages.tolist() == [2, 2]


def test_joined_batches_are_padded():
    joined = join([a_batch([1, 2], 2), a_batch([3], 4)])
    assert joined.prompt_ids.tolist() == [[0, 0, 1, 1], [0, 0, 2, 2], [3, 3, 3, 3]]
    assert joined.completion_ids.tolist() == [[1, 1, 0, 0], [2, 2, 0, 0], [3, 3, 3, 3]]


def test_replay_trains_where_nothing_new_teaches(build):
    """From step 2 on all rewards are 1: only what step 1 left in the buffer gives a gradient, once per group."""

    def judge(completions, trainer_state, **_):
        return [float(i % 2) if trainer_state.global_step == 0 else 1.0 for i in range(len(completions))]

    run = build(judge, replay_buffer_size=3, max_steps=3)
    run.train()
    first, second, third = logs_of(run)
    assert [e["replay/replaced_groups"] for e in (first, second, third)] == [0, 2, 0]
    assert [e["replay/buffered_groups"] for e in (first, second, third)] == [2, 0, 0]
    assert second["grad_norm"] > 0.01 and third["grad_norm"] == 0.0


# The same gradients for less


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"beta": 0.1}, {"loss_type": "grpo"}])
def test_prompts_computed_once_change_nothing(build, settings, tiny_model_dir, monkeypatch, gradient_tape):
    """Completions of one prompt share it: same losses and gradients as each in a row of its own."""
    prompts = [" ".join([prompt] * 8) for prompt in PROMPTS]
    rows = []
    plan = group_prompts.plan_rows
    monkeypatch.setattr(group_prompts, "plan_rows", lambda *a, **k: rows.append(plan(*a, **k)) or rows[-1])
    runs = []
    for share in (True, False):
        tape = gradient_tape()
        run = build(
            model=tiny_model_dir, callbacks=[tape], share_prompts=share, prompts=prompts, max_steps=3, **settings
        )
        script(run, [[20 + i] * (1 + i % 6) for i in range(8)])
        # One order for both: whole groups in a row.
        monkeypatch.setattr(RolloutBatch, "shuffled", lambda self, block=1: self)
        run.train()
        runs.append((run, tape))
    (shared, one), (plain, other) = runs
    assert any(plan is not None for plan in rows)
    for ours, theirs in zip(one.steps, other.steps, strict=True):
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    for ours, theirs in zip(logs_of(shared), logs_of(plain), strict=True):
        for name in {"loss", "entropy", "grad_norm", "reward"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-4)


def test_completions_without_a_gradient_are_left_out(build, monkeypatch, gradient_tape):
    """One of the two groups has no spread: the same gradients and metrics from half of the completions."""

    def judge(completions, **_):
        return [1.0] * 4 + [0.0, 1.0, 2.0, 3.0]

    sizes, runs = [], []
    score = completion_scores.completion_scores
    for leave_out in (True, False):
        tape = gradient_tape()
        run = build(judge, callbacks=[tape], max_steps=3, learning_rate=0.02)
        if not leave_out:
            monkeypatch.setattr(completion_scores, "needed_rows", lambda advantages, mask: torch.arange(len(mask)))
        monkeypatch.setattr(
            completion_scores, "completion_scores", lambda t, m, b, **k: sizes.append(len(b)) or score(t, m, b, **k)
        )
        run.train()
        runs.append((run, tape))
    assert sizes == [4] * 3 + [8] * 3
    (one, ours), (other, theirs) = runs
    for mine, others in zip(ours.steps, theirs.steps, strict=True):
        for name in others:
            torch.testing.assert_close(mine[name], others[name], atol=1e-6, rtol=1e-4)
    for mine, others in zip(logs_of(one), logs_of(other), strict=True):
        for name in ("loss", "entropy", "clip_ratio/region_mean", "reward"):
            assert mine[name] == pytest.approx(others[name], abs=1e-5, rel=1e-4), name


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.1}, {"entropy_coef": 0.01}, {"covariance_control": "kl_cov"}, {"use_adaptive_entropy": True}],
)
def test_nothing_is_left_out_where_something_else_has_a_gradient(build, settings, monkeypatch, tiny_model_dir):
    sizes = []
    score = completion_scores.completion_scores
    monkeypatch.setattr(
        completion_scores, "completion_scores", lambda t, m, b, **k: sizes.append(len(b)) or score(t, m, b, **k)
    )
    build(lambda completions, **_: [1.0] * len(completions), model=tiny_model_dir, max_steps=1, **settings).train()
    assert sizes[-1] == 8


@pytest.mark.parametrize("control", ["clip_cov", "kl_cov"])
def test_covariance_control_trains(build, control):
    run = build(covariance_control=control, clip_cov_ratio=0.2, kl_cov_ratio=0.2, num_iterations=2, max_steps=4)
    plain = build(num_iterations=2, max_steps=4)
    for each in (run, plain):
        script(each, [[20 + i] * (1 + i % 6) for i in range(8)])
        each.train()
    assert all(math.isfinite(entry["loss"]) for entry in logs_of(run))
    assert any(abs(a["grad_norm"] - b["grad_norm"]) > 1e-6 for a, b in zip(logs_of(run), logs_of(plain)))


@pytest.mark.parametrize(
    "settings", [{"loss_type": "gmpo"}, {"loss_type": "gpg"}, {"dual_clip": 1.5}, {"kl_estimator": "k2", "beta": 0.1}]
)
def test_further_objectives_train(build, settings, tiny_model_dir):
    run = build(model=tiny_model_dir, num_iterations=2, max_steps=4, **settings)
    run.train()
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs_of(run))


# Errors that lose nothing


def test_a_reward_that_fails_leaves_a_checkpoint_to_resume_from(build):
    calls = []

    def judge(completions, trainer_state, **_):
        calls.append(trainer_state.global_step)
        if len(calls) == 3:
            raise OSError("the judge is away")
        return [float(i % 3) for i in range(len(completions))]

    run = build(judge, max_steps=4, save_strategy="steps", save_steps=100)
    with pytest.raises(RuntimeError, match="'judge' raised OSError: the judge is away") as error:
        run.train()
    folder = os.path.join(run.args.output_dir, "checkpoint-2")
    assert f"The run is saved up to step 2 in {folder}; resume from there." in error.value.__notes__
    again = build(judge, max_steps=4)
    again.train(resume_from_checkpoint=folder)
    assert again.state.global_step == 4 and calls == [0, 1, 2, 2, 3]


class Pool:
    """Environments without tools, which count how often they are closed."""

    closed = 0

    def start(self, rows):
        return Episodes(environments=[self] * len(rows), prompts=[row["prompt"] for row in rows])

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("fails", [False, True])
def test_environments_are_closed_when_training_ends(build, fails):
    def judge(completions, environments, **_):
        if fails:
            raise OSError("away")
        return [float(i) for i in range(len(environments))]

    run = build(judge)
    run.rollouts.environments = pool = Pool()
    with pytest.raises(RuntimeError, match="away") if fails else contextlib.nullcontext():
        run.train()
    assert pool.closed == 1


def test_a_reward_that_hangs_is_waited_for_in_bounds(build):
    import threading

    gone = threading.Event()

    def judge(completions, trainer_state, **_):
        if trainer_state.global_step == 1 and not gone.is_set():
            gone.wait(20)
        return [float(i % 3) for i in range(len(completions))]

    run = build(judge, max_steps=2, reward_timeout=0.2)
    with pytest.raises(RuntimeError, match=r"'judge'.*0\.2.*reward_timeout"):
        run.train()
    gone.set()


def test_a_reward_that_hangs_once_is_called_again(build):
    import threading

    hung = threading.Event()

    def judge(completions, **_):
        if not hung.is_set():
            hung.set()
            threading.Event().wait(2)
        return [float(i % 3) for i in range(len(completions))]

    run = build(judge, max_steps=2, reward_timeout=0.3, reward_max_retries=1)
    run.train()
    assert run.state.global_step == 2
