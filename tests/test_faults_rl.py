"""Faults planted in GRPO runs that really sample and train: each is found, named as the root, and told what to change.

Without a fault the same run is silent: `test_healthy_run`.
"""

import hashlib
import random

import pytest

FROM_START = 0
# A trend rule may not speak before the warm-up gate of 20 steps, and has to see it three times.
GATE = 23


def ranked(score, group=8):
    """A judge that compares the completions of a prompt: each gets the share of the others that it beats.

    The mean of a group is 1/2 whatever is written, as with all rewards by comparison.
    """

    def judge(completion_ids, **_):
        rewards = []
        for start in range(0, len(completion_ids), group):
            scores = [score(ids) for ids in completion_ids[start : start + group]]
            rewards += [(sum(s > t for t in scores) + (sum(s == t for t in scores) - 1) / 2) / (group - 1)
                        for s in scores]  # fmt: skip
        return rewards

    return judge


def unlearnable_key(answers):
    """A reward for an answer key of other questions: each question has a fixed answer that has nothing to do with it."""

    def wrong_key(prompts, completions, **_):
        key = [int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % answers for prompt in prompts]
        return [float(text.rsplit("=", 1)[-1] == str(right)) for text, right in zip(completions, key)]

    return wrong_key


def finished(ids):
    return ids[-1] == 1  # the end token of the demo's vocabulary


def test_healthy_run(healthy_grpo):
    assert healthy_grpo.fired() == {}
    assert healthy_grpo.verdict["state"] == "improving"
    rewards = [value for _, value in healthy_grpo.series("reward")]
    assert sum(rewards[-20:]) / 20 > sum(rewards[:10]) / 10 + 0.2


# ------------------------------------------------------------------------------------------- groups without signal


def test_a_cap_that_cuts_every_answer(sums):
    run = sums.grpo(steps=26, max_completion_length=8)
    record = run.root("RL016", planted=FROM_START, within=GATE, severity="error", effects=["RL001", "RL003"])
    assert "of the last 128 completions reached max_completion_length=8 (limit 20%)" in record["message"]
    assert "max_completion_length from 8 to 16" in record["advice"]
    changes = run.changes(record)
    assert changes["max_completion_length"] == (8, 16)
    assert run.verdict["state"] == "stalled_no_signal"


def test_a_reward_function_that_never_matches(sums):
    """It looks for '#### 16', and this model writes '=16'."""

    def graded(completions, answer, **_):
        return [float(f"#### {right}" in text) for text, right in zip(completions, answer)]

    run = sums.grpo(graded, steps=32)
    record = run.root("RL004", planted=FROM_START, within=GATE, severity="error", effects=["RL001", "RL003", "NUM008"])
    assert record["message"].startswith("graded gave 0 to every completion for 22 steps, 1408 completions")
    assert "checking graded on an answer known to be right" in record["advice"]
    assert run.changes(record) == {}  # code, no setting
    assert run.verdict["state"] == "broken"


def test_a_reward_that_looks_at_the_prompt_only(sums):
    """The reward reads the wrong argument: all completions of a prompt get the same."""

    def by_prompt(prompts, **_):
        return [float(int(prompt[0]) % 2) for prompt in prompts]

    run = sums.grpo(by_prompt, steps=32)
    record = run.root("RL001", planted=FROM_START, within=GATE, severity="error", effects=["NUM008"])
    assert "100% of the last 80 groups had equal rewards" in record["message"]
    assert "limit 60%" in record["message"] and "failed as a whole" in record["message"]
    assert run.verdict["state"] == "stalled_no_signal"


@pytest.mark.slow
def test_prompts_that_are_solved(sums):
    """The reward asks for a sum at all, which 99 % of the completions are from the start."""

    def a_sum(completions, **_):
        return [float("=" in text and text[-1].isdigit()) for text in completions]

    run = sums.grpo(a_sum, steps=32)
    record = run.root("RL002", planted=FROM_START, within=GATE, severity="info", effects=["RL001"])
    assert "of the last 64 groups got the full reward (1, the largest seen)" in record["message"]
    assert "stopping here" in record["advice"]


@pytest.mark.slow
def test_an_answer_key_of_other_questions(sums):
    """A few guesses are right, and nothing can be learned."""
    run = sums.grpo(unlearnable_key(60), steps=115)
    # At once where more than 95 % of 128 groups fail, else after 100 steps without a rise.
    record = run.root("RL003", planted=FROM_START, within=105, severity="error", effects=["RL001"])
    assert record["message"].startswith("Every completion failed (reward 0) in 9")
    assert "limit 60%" in record["message"]
    assert "the reward does not rise" in record["message"]
    for suggestion in record["suggestions"]:
        if suggestion["patch"]:
            old, new = run.changes(record)["num_generations"]
            assert old == 8 and new in (16, 32, 64)
    assert run.verdict["state"] == "stalled_no_signal"


@pytest.mark.slow
def test_a_judge_with_a_jitter(sums):
    """A format reward that nearly all satisfy, plus a thousandth of noise, normalised group by group."""
    noise = random.Random(0)

    def judge(completions, **_):
        return [float(text.count("=") == 2) + noise.gauss(0, 0.004) for text in completions]

    run = sums.grpo(judge, steps=28)
    record = run.root("RL023", planted=FROM_START, within=GATE, severity="warning")
    assert "differ in reward by less than 2% of its range" in record["message"]
    assert "scale_rewards='group'" in record["message"] and "limit 30%" in record["message"]
    assert run.changes(record) == {"scale_rewards": ("group", "batch")}

    noise.seed(0)
    cured = sums.grpo(judge, steps=28, scale_rewards="batch")
    assert cured.first("RL023") is None


# --------------------------------------------------------------------------------------------------------- entropy


@pytest.mark.slow
def test_a_loophole_that_pays_a_part(sums):
    """The answers asked for cannot be known, but one sentence always scores 0.3. The policy learns it by heart, and
    tries nothing else any more."""
    right = unlearnable_key(60)

    def partial(prompts, completions, **_):
        return [max(hit, 0.3 * (text == "?+?=??;??+?=13"))
                for hit, text in zip(right(prompts, completions), completions)]  # fmt: skip

    run = sums.grpo(partial, steps=200)
    record = run.root("RL005", planted=FROM_START, within=200, severity="error", effects=["RL001"])
    assert "nats/token" in record["message"] and "limit 30%" in record["message"]
    changes = run.changes(record)
    assert changes["learning_rate"] == (2e-4, 1e-4)
    assert changes["temperature"] == (1.0, 1.1)


@pytest.mark.slow
def test_an_entropy_bonus_that_is_too_large(sums):
    run = sums.grpo(steps=90, entropy_coef=0.5)
    record = run.root(
        "RL006", planted=FROM_START, within=85, severity="error", effects=["RL016", "RL001"], beside=["RL033"]
    )
    assert "nats/token" in record["message"] and "limit" in record["message"]
    changes = run.changes(record)
    assert changes["entropy_coef"] == (0.5, 0.1)
    assert changes["learning_rate"] == (2e-4, 6e-5)
    collapse = run.first("RL033")  # what the entropy did to the reward
    assert collapse["step"] >= record["step"] and "RL006" in [cause["code"] for cause in collapse["causes"]]


# ----------------------------------------------------------------------------------------------- size of a step


@pytest.mark.slow
def test_a_learning_rate_too_large_for_the_kl_term(sums):
    run = sums.grpo(steps=45, learning_rate=1e-3, beta=0.001)
    # The gate, then three evaluations 5 steps apart.
    record = run.root("RL007", planted=FROM_START, within=35, severity="warning")
    assert "KL to the reference is" in record["message"] and "(limit 0.5)" in record["message"]
    changes = run.changes(record)
    old, new = changes["beta"]
    assert old == 0.001 and 1.5 * old <= new <= 4 * old
    assert changes["learning_rate"] == (1e-3, 7e-4)
    assert run.verdict["state"] == "drifting"


@pytest.mark.slow
def test_too_many_updates_per_batch(sums):
    run = sums.grpo(steps=64, learning_rate=1e-3, num_iterations=16)
    record = run.root("RL009", planted=FROM_START, within=40, severity="warning")
    assert "of tokens hit the clipping bound of the ratio" in record["message"]
    assert "limit 10%" in record["message"]
    changes = run.changes(record)
    old, new = changes["learning_rate"]
    assert old == 1e-3 and 1e-4 <= new <= 9e-4
    assert changes["num_iterations"] == (16, 8)


# --------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.slow
def test_a_judge_that_prefers_the_longer_answer(sums):
    """What it pays for comparisons is the same on average: the reward is flat or falls while completions grow."""
    judge = ranked(lambda ids: len(ids) * finished(ids))
    run = sums.grpo([sums.task.right_answer, judge], steps=120, max_completion_length=56, learning_rate=5e-4)
    record = run.root("RL015", planted=FROM_START, within=110, severity="warning")
    assert "tokens (limit 2 times)" in record["message"]
    assert "keep max_completion_length" in record["advice"]
    assert "max_completion_length" not in run.changes(record)


@pytest.mark.slow
def test_a_judge_that_prefers_the_shorter_answer(sums):
    judge = ranked(lambda ids: -len(ids))
    run = sums.grpo([sums.task.right_answer, judge], steps=80, learning_rate=5e-4)
    # The groups tie some steps before the median of the lengths is down for three evaluations.
    record = run.root(
        "RL017", planted=FROM_START, within=70, severity="warning", effects=["RL001", "RL004"], beside=["RL001"]
    )
    assert "limit 40%" in record["message"] and "Completions shrank from 1" in record["message"]
    assert "weight of any length penalty" in record["advice"]
    assert run.first("RL001", state="suppressed")["step"] <= record["step"] + 1


# --------------------------------------------------------------------------------------------- plateau, collapse


@pytest.mark.slow
def test_a_learning_rate_a_thousand_times_too_small(sums):
    run = sums.grpo(steps=290, learning_rate=2e-7)
    # Four windows of 50 steps without a change, looked at every 50.
    record = run.root("RL031", planted=FROM_START, within=290, severity="info")
    assert "The reward is flat at" in record["message"] and "would have shown" in record["message"]
    changes = run.changes(record)
    assert changes["learning_rate"] == (2e-7, 3e-7)
    assert changes["num_generations"] == (8, 16)
    assert run.verdict["state"] == "plateauing"


@pytest.mark.slow
def test_a_learning_rate_that_jumps(sums):
    """From step 80 on the schedule multiplies it by 30."""
    model = sums.model(pretrained=True)
    run = sums.grpo(steps=130, model=model, options=sums.schedule(model, 2e-4, lambda step: 30 if step >= 80 else 1))
    record = run.root(
        "RL033",
        planted=80,
        within=30,
        severity="error",
        effects=["RL016", "RL001", "RL003"],
        beside=["RL016", "RL005"],
    )
    assert "The reward collapsed from" in record["message"] and "limit -4" in record["message"]
    assert 75 <= record["onset_step"] <= 90
    changes = run.changes(record)
    assert changes["learning_rate"] == (2e-4, 6e-5)
    assert run.verdict["state"] == "collapsing"
