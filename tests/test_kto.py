"""KTOTrainer: the losses by hand, mismatched pairs, wrong inputs, measurements, checkpoints; TRL is compared beside."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainingArguments

from outspoken.trainers.config import live_fields
from outspoken.trainers.data.unpaired import mismatched_completions, prepare_unpaired, spare_rows
from outspoken.trainers.kto import DataCollatorForUnpairedPreference, KTOConfig, KTOTrainer
from outspoken.trainers.losses.kto import apo_zero_unpaired_loss, kto_loss, reference_point

trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "What color is the sky?", "completion": " It is blue.", "label": True},
    {"prompt": "What is 2 + 2?", "completion": " It is 4, and that is all there is to say.", "label": False},
    {"prompt": "The grass is", "completion": " green.", "label": True},
    {"prompt": "Say", "completion": " a b c d e f g", "label": False},
    {"prompt": "The quick brown fox", "completion": " sleeps", "label": False},
    {"prompt": "the lazy dog", "completion": " is 7.", "label": True},
]


@pytest.fixture
def common(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "diagnose": False,
        "gradient_checkpointing": False,
    }


@pytest.fixture
def build(common, tiny_model_factory, tiny_tokenizer_factory):
    """`build(rows, config, **trainer arguments)`: a trainer that has not trained yet."""

    def trainer(rows=ROWS, config=None, **kwargs):
        kwargs.setdefault("train_dataset", Dataset.from_list(rows) if isinstance(rows, list) else rows)
        kwargs.setdefault("processing_class", tiny_tokenizer_factory())
        kwargs.setdefault("model", tiny_model_factory())
        return KTOTrainer(args=KTOConfig(**{**common, **(config or {})}), **kwargs)

    return trainer


def _row(prompt, completion):
    return {"prompt_ids": prompt, "completion_ids": completion, "label": True}


# ---------------------------------------------------------------------------------------------- losses


def test_kto_loss_by_hand():
    """r = 2 and -1, z0 = 0.5, beta = 0.4: 1.2 (1 - s(0.6)) and 0.8 (1 - s(0.6)), where s(0.6) = 0.6456563."""
    loss = kto_loss(torch.tensor([2.0, -1.0]), torch.tensor([True, False]), torch.tensor(0.5), 0.4, 1.2, 0.8)
    assert loss.tolist() == pytest.approx([1.2 * 0.3543437, 0.8 * 0.3543437], rel=1e-6)


def test_apo_zero_unpaired_loss_by_hand():
    """r = 3 and 3, beta = 0.5: 1 - s(1.5) = 0.1824255 for the desirable, s(1.5) = 0.8175745 for the other."""
    loss = apo_zero_unpaired_loss(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 0.5)
    assert loss.tolist() == pytest.approx([0.1824255, 0.8175745], rel=1e-6)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=6),
    st.floats(0, 30),
    st.floats(0.01, 2),
    st.floats(0, 3),
    st.floats(0, 3),
)
def test_losses_and_gradients_follow_the_papers(rows, z0, beta, w_desirable, w_undesirable):
    ratios = torch.tensor([r for r, _ in rows], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([d for _, d in rows])
    point = torch.tensor(z0, dtype=torch.float64, requires_grad=True)
    for loss, z in (
        (kto_loss(ratios, desirable, point, beta, w_desirable, w_undesirable), z0),
        (apo_zero_unpaired_loss(ratios, desirable, beta, w_desirable, w_undesirable), 0.0),
    ):
        for value, (r, wanted) in zip(loss.tolist(), rows):
            # The paper: weight minus value, v = weight * sigmoid(beta (r - z0)), mirrored for the undesirable.
            weight, x = (w_desirable, beta * (r - z)) if wanted else (w_undesirable, beta * (z - r))
            assert value == pytest.approx(weight - weight / (1 + math.exp(-x)), rel=1e-9, abs=1e-12)
        (gradient,) = torch.autograd.grad(loss.sum(), ratios)
        for slope, (r, wanted) in zip(gradient.tolist(), rows):
            weight = w_desirable if wanted else w_undesirable
            s = 1 / (1 + math.exp(-beta * (r - z)))
            assert slope == pytest.approx((-1 if wanted else 1) * weight * beta * s * (1 - s), rel=1e-9, abs=1e-12)


def test_reference_point_is_a_mean_not_below_zero_and_has_no_gradient():
    total = torch.tensor(3.0, requires_grad=True)
    assert reference_point(total, torch.tensor(4.0)).item() == 0.75
    assert not reference_point(total, torch.tensor(4.0)).requires_grad
    assert reference_point(torch.tensor(-3.0), torch.tensor(4.0)).item() == 0


# ---------------------------------------------------------------------------------------------- mismatched pairs


def test_completions_rotate_by_one():
    rows = [_row([1], [10]), _row([2], [20]), _row([3], [30])]
    assert mismatched_completions(rows) == [[30], [10], [20]]


def test_completions_written_to_the_same_prompt_are_passed_over():
    # Rows 0 and 1 answer prompt 1, rows 1 and 2 say the same.
    rows = [_row([1], [10]), _row([1], [20]), _row([2], [20]), _row([3], [30])]
    assert mismatched_completions(rows) == [[30], [30], [10], [20]]


def test_a_row_alone_takes_a_spare_completion_always_the_same():
    spares = [_row([p], [10 * p]) for p in range(1, 9)]
    for row in spares:
        (found,) = mismatched_completions([row], spares)
        assert found in [s["completion_ids"] for s in spares] and found != row["completion_ids"]
        assert mismatched_completions([row], spares) == [found]
    assert len({tuple(mismatched_completions([row], spares)[0]) for row in spares}) > 2


def test_pairs_that_came_with_the_data_stay():
    rows = [{**_row([1], [10]), "KL_completion_ids": [99]}, {**_row([2], [20]), "KL_completion_ids": [98]}]
    assert mismatched_completions(rows) == [[99], [98]]


def test_one_prompt_for_all_rows_still_never_pairs_a_row_with_its_own_completion():
    assert mismatched_completions([_row([1], [10]), _row([1], [20])]) == [[20], [10]]


def test_nothing_to_mismatch_is_an_error():
    with pytest.raises(ValueError, match=r"^`loss_type='kto'` needs completions of other rows, but all that were"):
        mismatched_completions([_row([1], [10]), _row([2], [10])], [_row([3], [10])])


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=2)
SOME_ROWS = st.lists(st.builds(_row, IDS, IDS), min_size=1, max_size=8)


@given(SOME_ROWS, SOME_ROWS)
def test_mismatched_pairs_are_never_matched(rows, spares):
    batch, other = ([(tuple(r["prompt_ids"]), tuple(r["completion_ids"])) for r in some] for some in (rows, spares))
    completions = {completion for _, completion in batch + other}
    assume(len(completions) > 1)
    for (prompt, own), found in zip(batch, mismatched_completions(rows, spares)):
        in_batch = {c for _, c in batch if (prompt, c) not in batch}
        in_spares = {c for _, c in other if (prompt, c) not in batch + other}
        assert tuple(found) in (in_batch or in_spares or completions - {own})


@given(st.integers(2, 12))
def test_with_distinct_rows_the_completions_stay_the_same_set(n):
    rows = [_row([i], [100 + i]) for i in range(n)]
    found = mismatched_completions(rows, [_row([99], [99])])
    assert sorted(found) == [row["completion_ids"] for row in rows]


def test_spare_rows_are_different_completions_drawn_by_seed():
    rows = [_row([i], [i % 300]) for i in range(2000)]
    dataset = Dataset.from_list(rows)
    drawn = spare_rows(dataset, 0)
    assert len(drawn) == len({tuple(r["completion_ids"]) for r in drawn}) == 256
    assert drawn == spare_rows(dataset, 0) != spare_rows(dataset, 1)
    few = spare_rows(IterableDataset.from_generator(lambda: iter(rows[:5] + rows[:5])), 0)
    assert [r["completion_ids"] for r in few] == [[0], [1], [2], [3], [4]]


def test_collator_by_hand():
    rows = [_row([1, 2, 3], [4, 5, 6]), {**_row([7, 8], [9]), "label": False}]
    batch = DataCollatorForUnpairedPreference(0, max_length=5, pad_to_multiple_of=3)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5, 0], [7, 8, 9, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]],
        "completion_mask": [[0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]],
        "KL_input_ids": [[1, 2, 3, 9, 0, 0], [7, 8, 4, 5, 6, 0]],
        "KL_attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
        "KL_completion_mask": [[0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]],
        "label": [True, False],
        "truncated": [True, False],
    }
    assert not any(key.startswith("KL_") for key in DataCollatorForUnpairedPreference(0, calculate_kl=False)(rows))


# ---------------------------------------------------------------------------------------------- the step


def _log_prob(model, prompt, completion):
    """Sum of the completion's log-probabilities, from the full logits of one row without padding."""
    ids = torch.tensor([prompt + completion])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(logps[i - 1, ids[0, i]] for i in range(len(prompt), ids.size(1)))


def _paper_loss(policy, reference, rows, mismatched, beta=0.1, weights=(1.0, 1.0)):
    """Loss, z0 and log-ratios as the paper writes them, row by row."""
    with torch.no_grad():
        z0 = sum(
            _log_prob(policy, row["prompt_ids"], other) - _log_prob(reference, row["prompt_ids"], other)
            for row, other in zip(rows, mismatched)
        )
    z0 = max(0.0, float(z0) / len(rows))
    ratios = [
        _log_prob(policy, row["prompt_ids"], row["completion_ids"])
        - _log_prob(reference, row["prompt_ids"], row["completion_ids"]).detach()
        for row in rows
    ]
    terms = [
        weights[0] * (1 - torch.sigmoid(beta * (r - z0)))
        if row["label"]
        else weights[1] * (1 - torch.sigmoid(beta * (z0 - r)))
        for r, row in zip(ratios, rows)
    ]
    return sum(terms) / len(terms), z0, [r.item() for r in ratios]


@pytest.mark.parametrize("size", [1, 4])
def test_loss_and_gradients_are_the_papers_formula(build, tiny_model_factory, size):
    config = {"per_device_train_batch_size": size, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = build(config=config, ref_model=tiny_model_factory(seed=3))
    rows = [trainer.train_dataset[i] for i in range(size)]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()

    mismatched = mismatched_completions(rows, spare_rows(trainer.train_dataset, trainer.args.seed))
    policy = tiny_model_factory()
    expected, z0, ratios = _paper_loss(policy, tiny_model_factory(seed=3), rows, mismatched, 0.3, (1.5, 0.7))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    metrics = trainer._metrics["train"]
    assert metrics["kl"] == pytest.approx([z0], rel=1e-5, abs=1e-6)
    if size == 4:
        assert z0 > 0
        assert metrics["rewards/chosen"] == pytest.approx([0.3 * ratios[0], 0.3 * ratios[2]], rel=1e-4)
        assert metrics["rewards/rejected"] == pytest.approx([0.3 * ratios[1], 0.3 * ratios[3]], rel=1e-4)


def test_loss_does_not_depend_on_the_order_of_a_batch_but_through_its_pairs(build, tiny_model_factory):
    order = [2, 0, 3, 1]
    for config, fixed in (({"loss_type": "apo_zero_unpaired"}, False), ({}, True)):
        trainer = build(config=config, ref_model=tiny_model_factory(seed=3))
        rows = [trainer.train_dataset[i] for i in range(4)]
        if fixed:  # each row keeps its mismatched completion
            others = mismatched_completions(rows)
            rows = [{**row, "KL_completion_ids": other} for row, other in zip(rows, others)]
        losses = [
            trainer.compute_loss(trainer.model, trainer.data_collator(batch)).item()
            for batch in (rows, [rows[i] for i in order])
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_rows_are_shuffled(build):
    rows = [{"prompt": f"Say {i}", "completion": f" {i}", "label": i % 2 == 0} for i in range(40)]
    trainer = build(rows)
    assert trainer.args.train_sampling_strategy == "random"
    epochs = []
    for epoch in range(2):
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        batches = [batch["input_ids"].tolist() for batch in loader]
        epochs.append([tuple(t for t in ids if t != 1) for batch in batches for ids in batch])  # 1 is the padding
    in_order = [tuple(row["prompt_ids"] + row["completion_ids"]) for row in trainer.train_dataset]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(in_order)
    assert epochs[0] != in_order and epochs[0] != epochs[1]


def test_rows_can_be_grouped_by_length(build):
    trainer = build(config={"train_sampling_strategy": "group_by_length", "max_steps": 1, "max_length": 20})
    assert trainer.train_dataset["length"] == [
        min(20, len(row["prompt_ids"]) + len(row["completion_ids"])) for row in trainer.train_dataset
    ]
    trainer.train()


def test_batches_of_one_row_train(build):
    # 5 rows in batches of 2: also the last batch of an epoch is one row alone.
    for config in ({"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 2}):
        trainer = build(ROWS[:5], {"num_train_epochs": 1, "learning_rate": 1e-3, **config})
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) in (3, 5) and all("kl" in entry for entry in logs)
        # A matched pair would make kl the reward over beta; the last batch is one row.
        last = logs[-1].get("rewards/chosen", logs[-1].get("rewards/rejected"))
        assert logs[-1]["kl"] != pytest.approx(max(0.0, last / 0.1), abs=1e-9) or last <= 0


def test_precomputed_reference_trains_shuffled_and_is_found_again(build, tiny_model_factory, tmp_path):
    path = tmp_path / "data"
    Dataset.from_list(ROWS).save_to_disk(path)
    config = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4, "max_steps": 3}
    several = {"a": Dataset.load_from_disk(path), "b": Dataset.load_from_disk(path).select(range(3))}
    trainer = build(Dataset.load_from_disk(path), config, eval_dataset=several)
    assert trainer.ref_model is None
    reference = tiny_model_factory()
    for row in trainer.train_dataset:
        assert row["KL_completion_ids"] != row["completion_ids"]
        for column, completion in (("ref_logps", "completion_ids"), ("ref_KL_logps", "KL_completion_ids")):
            assert row[column] == pytest.approx(
                _log_prob(reference, row["prompt_ids"], row[completion]).item(), rel=1e-5
            )
    before = trainer.evaluate()
    assert before["eval_a_loss"] == before["eval_b_loss"] == 0.5
    trainer.train()
    assert trainer.state.log_history[-2]["rewards/chosen"] != 0
    assert trainer.evaluate()["eval_b_loss"] != 0.5
    with pytest.raises(ValueError, match=r"^The reference is the model before training, which is not held under `pre"):
        trainer.evaluate(Dataset.from_list(ROWS))

    again = build(Dataset.load_from_disk(path), config, ref_model=tiny_model_factory())
    again._answer_logps = None  # not asked a second time
    assert again.train_dataset["ref_logps"] == trainer.train_dataset["ref_logps"]


def test_reference_is_a_frozen_copy_without_dropout(build, tiny_model_factory):
    trainer = build(model=tiny_model_factory(attention_dropout=0.3), config={"max_steps": 2})
    initial = {name: parameter.clone() for name, parameter in trainer.ref_model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, initial[name]) for name, p in trainer.ref_model.named_parameters())
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    assert not any(torch.equal(p, initial[n]) for n, p in trainer.model.named_parameters() if p.dim() > 1)


def test_a_model_edited_in_memory_is_its_own_reference(build, tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.nn.init.zeros_(model.lm_head.weight)
    trainer = build(model=model, config={"max_steps": 1})
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_policy_learns_to_tell_good_from_bad(build):
    config = {"max_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 6, "logging_steps": 20}
    trainer = build(config=config)
    trainer.train()
    found = trainer.evaluate(Dataset.from_list(ROWS))
    assert found["eval_rewards/margins"] > 1
    assert found["eval_rewards/chosen"] > 0 > found["eval_rewards/rejected"]


def test_nan_is_not_hidden(build):
    trainer = build()
    with torch.no_grad():
        trainer.model.lm_head.weight[:] = float("nan")
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    assert math.isnan(loss.item())
    assert math.isnan(trainer._metrics["train"]["rewards/chosen"][0])


@pytest.mark.slow
def test_two_processes_share_one_reference_point(tmp_path, tiny_model_factory, tiny_tokenizer):
    """z0 is the maximum of 0 and the mean over both processes' pairs, and metrics are means over all their rows."""
    for name, seed in (("policy", 0), ("reference", 3)):
        tiny_model_factory(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            from datasets import Dataset
            from transformers import AutoModelForCausalLM
            from outspoken import KTOConfig, KTOTrainer

            folder, rows = sys.argv[1], json.loads(sys.argv[2])
            args = KTOConfig(
                folder + "/out", use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
                per_device_train_batch_size=2, max_steps=1, diagnose=False, train_sampling_strategy="sequential",
                optim="sgd", learning_rate=0.1, weight_decay=0.0, max_grad_norm=0.0,
            )
            reference = AutoModelForCausalLM.from_pretrained(folder + "/reference")
            trainer = KTOTrainer(folder + "/policy", reference, args, train_dataset=Dataset.from_list(rows))
            trainer.train()
            signals = trainer.recorder.take().signals
            if trainer.accelerator.is_main_process:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder + "/trained")
                print("RESULT", json.dumps([trainer.state.log_history[0], signals]))
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), json.dumps(ROWS[:4])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
    log, signals = json.loads(line.split("RESULT", 1)[1])

    rows, _ = prepare_unpaired(Dataset.from_list(ROWS[:4]), tiny_tokenizer, 1024)
    rows = list(rows)
    # Each process rotates its own two rows.
    mismatched = [rows[i]["completion_ids"] for i in (1, 0, 3, 2)]
    policy, reference = tiny_model_factory(), tiny_model_factory(seed=3)
    loss, z0, ratios = _paper_loss(policy, reference, rows, mismatched)
    loss.backward()
    assert z0 > 0
    assert log["kl"] == pytest.approx(z0, rel=1e-4)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["rewards/chosen"] == pytest.approx(0.1 * (ratios[0] + ratios[2]) / 2, rel=1e-4)
    assert log["rewards/rejected"] == pytest.approx(0.1 * (ratios[1] + ratios[3]) / 2, rel=1e-4)
    assert signals["samples/desirable#n"] == 4
    from transformers import AutoModelForCausalLM

    trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "trained").named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(trained[name], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- data


def test_tokens_of_rows_and_facts(build, tiny_tokenizer):
    rows = [
        {"prompt": "Say", "completion": " a b", "label": 1},
        {"prompt": "Say", "completion": " a b", "label": 0},  # the same answer, good and bad
        {"prompt": "Tell", "completion": " it<|endoftext|>", "label": 0},
        {"prompt": "a much longer prompt that fills it all", "completion": " x", "label": 0},
    ]
    trainer = build(rows, {"max_length": 8, "per_device_train_batch_size": 3})
    first = trainer.train_dataset[0]
    assert tiny_tokenizer.decode(first["prompt_ids"]) == "Say"
    assert tiny_tokenizer.decode(first["completion_ids"]) == " a b<|endoftext|>"
    assert tiny_tokenizer.decode(trainer.train_dataset[2]["completion_ids"]) == " it<|endoftext|>"
    assert [row["label"] for row in trainer.train_dataset] == [True, False, False]  # the last row is dropped
    lengths = [
        len(tiny_tokenizer(r["prompt"] + r["completion"].removesuffix("<|endoftext|>"))["input_ids"]) + 1 for r in rows
    ]
    assert trainer.recorder.facts == {
        "data/rows": 4,
        "data/longest": lengths[3],
        "data/p99_length": lengths[3],
        "data/truncated_share": 0.25,
        "data/no_supervised_share": 0.25,
        "data/boundary_mismatch_share": 0,
        "data/ends_with_eos_share": 1,
        "data/desirable_share": 0.25,
        "data/undesirable_share": 0.75,
        "data/identical_pairs_share": 0.5,
    }


def test_rows_tokenized_already_are_taken_as_they_are(build):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 8], "label": i == 0} for i in range(2)]
    rows[1]["completion_ids"] = [9]
    trainer = build(rows, {"max_steps": 1})
    assert [row["completion_ids"] for row in trainer.train_dataset] == [[7, 8], [9]]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5)
    trainer.evaluate(trainer.train_dataset)  # prepared once, it may be given again


def test_a_text_prompt_beside_conversations_is_replaced(build, tiny_tokenizer):
    def says(role, text):
        return {"role": role, "content": text}

    rows = [
        {
            "prompt": f"Say {i}",
            "chosen": [says("user", f"Say {i}"), says("assistant", f"{i}")],
            "rejected": [says("user", f"Say {i}"), says("assistant", "no")],
        }
        for i in range(2)
    ]
    row = build(rows).train_dataset[1]
    assert tiny_tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nSay 1<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(row["completion_ids"]) == "1<|im_end|>\n"


def test_pairs_become_two_rows(build, tiny_tokenizer):
    rows = [{"chosen": "Say it: yes", "rejected": "Say it: no"}, {"chosen": "Is it: a", "rejected": "Is it: b"}]
    for stream in (False, True):
        dataset = Dataset.from_list(rows)
        trainer = build(dataset.to_iterable_dataset() if stream else dataset, {"max_steps": 1})
        found = [
            (tiny_tokenizer.decode(row["prompt_ids"]), tiny_tokenizer.decode(row["completion_ids"]), row["label"])
            for row in trainer.train_dataset
        ]
        assert sorted(found) == [
            ("Is it:", " a<|endoftext|>", True),
            ("Is it:", " b<|endoftext|>", False),
            ("Say it:", " no<|endoftext|>", False),
            ("Say it:", " yes<|endoftext|>", True),
        ]


# ---------------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            {},
            "The train dataset has no column 'label'; KTOTrainer needs one that is true where the completion is "
            "desirable and false where it is not.",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": "good"}],
            {},
            "Row 0 of the train dataset, column 'label': expected true or false, found 'good'; make it a boolean.",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b", "label": -1}],
            {},
            "Row 1 of the train dataset, column 'label': expected true or false, found -1; make it a boolean.",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "", "label": True}],
            {},
            "Row 1 of the train dataset, column 'completion': the text is empty; fill or drop the row.",
        ),
        (
            [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": ""}],
              "label": True}],
            {},
            "Row 0 of the train dataset, column 'completion': the completion is empty; fill or drop the row.",
        ),
        (
            [{"chosen": "yes", "rejected": "no"}],
            {},
            "Row 0 of the train dataset has no column 'prompt', and its 'chosen' and 'rejected' do not begin alike; "
            "add the prompt as a column.",
        ),
        (
            [{"prompt_ids": [5], "completion_ids": [], "label": True}],
            {},
            "Row 0 of the train dataset, column 'completion': the completion has no tokens; fill or drop the row.",
        ),
        (
            [{"completion_ids": [5], "label": True}],
            {},
            "The train dataset has columns 'completion_ids' and 'label', but no 'prompt_ids'; add the prompts' tokens.",
        ),
        ([], {}, "The train dataset is empty; pass a dataset with at least one row."),
        (
            [{**ROWS[0], "image": "x"}],
            {},
            "KTOTrainer trains text models only, but the train dataset has a column of images; remove it.",
        ),
        (
            [{"prompt": "a b", "completion": "c", "label": True}],
            {"max_length": 2},
            "Every prompt of the train dataset has at least `max_length=2` tokens, so no token of a completion is left; "
            "raise `max_length` (the longest row has 4 tokens).",
        ),
        (
            [{"prompt": "a", "completion": "c", "label": i == 0} for i in range(3)],
            {},
            "`loss_type='kto'` needs completions to other prompts, but all rows of the train dataset that were looked at "
            "have the same completion; use `loss_type='apo_zero_unpaired'`, or add other completions.",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_data_get_one_sentence(build, rows, config, message, monkeypatch):
    monkeypatch.setattr("outspoken.trainers.kto.prepare_model", lambda *a, **k: pytest.fail("the weights were loaded"))
    with pytest.raises(ValueError) as error:
        build(rows, config)
    assert str(error.value) == message


def test_mistakes_in_streams_are_told(build):
    rows = [*ROWS[:2], {**ROWS[2], "label": None}]
    with pytest.raises(
        ValueError, match=r"Row 2 of the train dataset, column 'label': expected true or false, found n"
    ):
        build(IterableDataset.from_generator(lambda: iter(rows)), {"max_steps": 1})
    with pytest.raises(
        ValueError, match=r"^`precompute_ref_log_probs=True` needs rows that stay in place, but the tra"
    ):
        build(IterableDataset.from_generator(lambda: iter(ROWS)), {"max_steps": 1, "precompute_ref_log_probs": True})
    trainer = build(config={"precompute_ref_log_probs": True})
    with pytest.raises(
        ValueError, match=r"^`precompute_ref_log_probs=True` needs rows that stay in place, but the eva"
    ):
        trainer.evaluate(IterableDataset.from_generator(lambda: iter(ROWS)))
    with pytest.raises(ValueError, match=r"^`max_steps` is -1, but a streamed `train_dataset` has no length; "):
        build(IterableDataset.from_generator(lambda: iter(ROWS)))


@pytest.mark.parametrize("label", [True, False])
def test_one_label_only_is_a_warning(build, caplog, label):
    build([{**row, "label": label} for row in ROWS])
    which, other = ("desirable", "undesirable") if label else ("undesirable", "desirable")
    assert (
        f"All 6 rows of the train dataset are {which}, so there is nothing to tell them from; add {other} ones (`label` "
        f"{str(not label).lower()}), or use SFTTrainer for good answers alone."
    ) in caplog.messages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "bco"}, "`loss_type` is 'bco'; use 'kto' or 'apo_zero_unpaired'."),
        ({"beta": 0.0}, "`beta` is 0.0; choose a number above 0."),
        ({"undesirable_weight": -1.0}, "`undesirable_weight` is -1.0; choose 0 or more."),
        ({"pad_to_multiple_of": "ten"}, "`pad_to_multiple_of` is 'ten'; use a number of tokens, 'auto' or 'none'."),
        (
            {"sync_ref_model": True, "precompute_ref_log_probs": True},
            "`sync_ref_model=True` moves the reference model, which `precompute_ref_log_probs=True` asks only once, "
            "before training; set one of them to False.",
        ),
    ],
)
def test_config_mistakes(common, fields, message):
    with pytest.raises(ValueError) as error:
        KTOConfig(**common, **fields)
    assert str(error.value) == message


def test_argument_mistakes(build, tiny_model_factory):
    from peft import LoraConfig

    with pytest.raises(ValueError, match=r"^`train_dataset` is missing; pass a datasets\.Dataset\.$"):
        build(train_dataset=None)
    model = tiny_model_factory()
    with pytest.raises(ValueError, match=r"^`ref_model` is the same object as `model`, so it would train along; "):
        build(model=model, ref_model=model)
    with pytest.raises(ValueError, match=r"^`sync_ref_model=True` needs a reference model of its own, but with an ad"):
        build(config={"sync_ref_model": True}, peft_config=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"^`router_aux_loss_coef=0.1` needs a mixture-of-experts model"):
        build(config={"router_aux_loss_coef": 0.1})
    with pytest.raises(ValueError, match=r"^The train dataset has a transform \(`with_transform`\), which would be"):
        build(Dataset.from_list(ROWS).with_transform(lambda batch: batch))
    plain = DataCollatorForUnpairedPreference(1, calculate_kl=False)
    with pytest.raises(
        ValueError, match=r"^The batch has no 'KL_input_ids', which `loss_type='kto'` needs; let `data_"
    ):
        build(config={"max_steps": 1}, data_collator=plain).train()


# ---------------------------------------------------------------------------------------------- configuration


def test_same_constructor_and_fields_as_trl():
    ours = list(inspect.signature(KTOTrainer.__init__).parameters)
    assert ours == list(inspect.signature(trl.KTOTrainer.__init__).parameters)
    theirs = {f.name: f for f in dataclasses.fields(trl.KTOConfig)}
    mine = {f.name: f for f in dataclasses.fields(KTOConfig)}
    assert not {*theirs} - {*mine}
    differ = {name for name in theirs if mine[name].default != theirs[name].default}
    assert differ == {"train_sampling_strategy"}  # TRL cannot shuffle
    assert mine["train_sampling_strategy"].default == "random"


def test_live_fields(build):
    assert {*live_fields(KTOConfig)} == {
        "learning_rate", "max_grad_norm", "beta", "desirable_weight", "undesirable_weight", "ref_model_mixup_alpha",
        "ref_model_sync_steps",
    }  # fmt: skip
    trainer = build(config={"beta": 0.5}, ref_model=build().model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    losses = [trainer.compute_loss(trainer.model, batch).item()]
    for name, value in (("beta", 2.0), ("desirable_weight", 3.0), ("undesirable_weight", 0.0)):
        setattr(trainer.args, name, value)
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    # Policy and reference are equal, so each term is half its weight: beta changes nothing, the weights do.
    assert losses == pytest.approx([0.5, 0.5, (3 + 1) / 4, 3 / 4])
    trainer.args.beta = 1.0
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    one = trainer.compute_loss(trainer.model, batch).item()
    trainer.args.beta = 0.1
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(one, rel=1e-3)


def test_command_line_and_other_arguments(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--pad_to_multiple_of", "8", "--beta", "0.3"]
    (config,) = HfArgumentParser(KTOConfig).parse_args_into_dataclasses(
        [*arguments, "--model_init_kwargs", '{"dtype": "bfloat16"}']
    )
    assert (config.pad_to_multiple_of, config.beta) == (8, 0.3)
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert KTOConfig(str(tmp_path), use_cpu=True).pad_to_multiple_of is None


def test_other_libraries_arguments_are_converted(common, tiny_model_factory, tiny_tokenizer_factory):
    shared = {key: value for key, value in common.items() if key != "diagnose"}
    for args in (
        TrainingArguments(**shared, bf16=False),
        trl.KTOConfig(**shared, bf16=False, beta=0.7),
    ):
        trainer = KTOTrainer(
            tiny_model_factory(),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tiny_tokenizer_factory(),
        )
        assert type(trainer.args) is KTOConfig
        assert trainer.args.beta == getattr(args, "beta", 0.1)


def test_activation_offloading_gives_the_same_weights(build, monkeypatch):
    from functools import partial

    from outspoken.trainers import activation_offloading

    moved = []
    offload = partial(activation_offloading.offload_activations, cpu_too=True, min_bytes=1)
    monkeypatch.setattr("outspoken.trainers.kto.offload_activations", lambda model: moved.append(1) or offload(model))
    trained = []
    for on in (False, True):
        trainer = build(config={"activation_offloading": on, "max_steps": 2})
        trainer.train()
        trained.append(dict(trainer.model.named_parameters()))
    assert len(moved) == 2
    assert all(torch.equal(parameter, trained[0][name]) for name, parameter in trained[1].items())


# ---------------------------------------------------------------------------------------------- measurements


def test_measurements_are_handed_over(build, tiny_model_factory):
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 0], "label": True},  # 0 ends a text
        {"prompt_ids": [5], "completion_ids": [9, 10, 11, 12, 13, 14, 0], "label": False},  # cut to 5 of 7
        {"prompt_ids": [6], "completion_ids": [12], "label": False},
    ]
    config = {"max_steps": 1, "per_device_train_batch_size": 3, "max_length": 6}
    trainer = build(rows, config, ref_model=tiny_model_factory(seed=3))
    trainer.train()
    taken = trainer.recorder.take().signals
    assert taken["samples/desirable"] == pytest.approx(1 / 3)
    assert taken["samples/desirable#n"] == 3
    assert taken["samples/no_supervised"] == 0
    assert taken["samples/truncated"] == pytest.approx(1 / 3)
    assert taken["samples/supervised_eos"] == pytest.approx(1 / 3)
    assert taken["tokens/supervised_share"] == pytest.approx((3 + 5 + 1) / (5 + 6 + 2))
    assert taken["lengths/chosen"] == 3
    assert taken["lengths/rejected"] == (5 + 1) / 2
    policy, reference = tiny_model_factory(), tiny_model_factory(seed=3)
    with torch.no_grad():
        ratios = [
            float(_log_prob(policy, prompt, completion) - _log_prob(reference, prompt, completion))
            for prompt, completion in (([5, 6], [7, 8, 0]), ([5], [9, 10, 11, 12, 13]), ([6], [12]))
        ]
    assert taken["shift/chosen"] == pytest.approx(ratios[0] / 3, rel=1e-4)
    assert taken["shift/rejected"] == pytest.approx((ratios[1] + ratios[2]) / 6, rel=1e-4)
    gaps = [abs(ratio) / n for ratio, n in zip(ratios, (3, 5, 1))]
    assert taken["reference/initial_gap"] == pytest.approx(max(gaps), rel=1e-4)
    assert "rewards/length_correlation" not in taken  # of fewer than 8 answers
    assert trainer.state.log_history[0]["num_tokens"] == 5 + 6 + 2


def test_initial_gap_is_of_the_first_step_only_and_zero_for_a_copy(build):
    seen = []

    class Take:
        def __call__(self, trainer):
            seen.append(trainer.recorder.take().signals)

    from transformers import TrainerCallback

    class Observe(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            Take()(trainer)

    trainer = build(ROWS * 3, {"max_steps": 5, "gradient_accumulation_steps": 2}, callbacks=[Observe()])
    trainer.train()
    assert seen[0]["reference/initial_gap"] == pytest.approx(0, abs=1e-6)
    assert not any("reference/initial_gap" in signals for signals in seen[1:])
    assert all(signals["samples/desirable#n"] == 4 for signals in seen[:4])  # both micro-batches of the step
    assert seen[-1]["rewards/length_correlation#n"] >= 8
    assert -1 <= seen[-1]["rewards/length_correlation"] <= 1


def test_evaluation_does_not_count_as_training(build):
    trainer = build()
    found = trainer.evaluate(Dataset.from_list(ROWS[:3]))
    assert found["eval_num_tokens"] == 0
    assert {"eval_loss", "eval_kl", "eval_rewards/chosen", "eval_logps/rejected", "eval_entropy"} <= {*found}
    assert trainer.recorder.take().signals == {}


def test_metrics_are_means_over_rows_however_they_fall_into_batches(build, tiny_model_factory):
    labels = [True, True, False, True, False, False]
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels)]
    logs = []
    for size in (1, 4, 6):
        config = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": size}
        found = build(rows, config, ref_model=tiny_model_factory(seed=3)).evaluate(Dataset.from_list(rows))
        logs.append({key: value for key, value in found.items() if "rewards" in key or "logps" in key})
    assert "eval_rewards/margins" in logs[0]  # though no batch of one row has both kinds
    for log in logs[1:]:
        assert log == pytest.approx(logs[0], rel=1e-5)
    margin = logs[0]["eval_rewards/chosen"] - logs[0]["eval_rewards/rejected"]
    assert logs[0]["eval_rewards/margins"] == pytest.approx(margin)


def test_rows_weigh_the_same_in_micro_batches_of_different_sizes(build, tiny_model_factory):
    """Three rows in micro-batches of 2 and 1: the gradient is that of their mean, not of a mean of means."""
    config = {
        "loss_type": "apo_zero_unpaired", "gradient_accumulation_steps": 2, "num_train_epochs": 1, "optim": "sgd",
        "learning_rate": 0.1, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = build(ROWS[:3], config, ref_model=tiny_model_factory(seed=3))
    rows = list(trainer.train_dataset)
    trainer.train()
    policy, reference = tiny_model_factory(), tiny_model_factory(seed=3)
    terms = []
    for row in rows:
        pair = row["prompt_ids"], row["completion_ids"]
        ratio = _log_prob(policy, *pair) - _log_prob(reference, *pair).detach()
        terms.append(torch.sigmoid((-0.1 if row["label"] else 0.1) * ratio))
    loss = sum(terms) / 3
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    trained = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(trained[name], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_of_one_kind_logs_nothing_of_the_other(build):
    trainer = build([row for row in ROWS if row["label"]], {"max_steps": 1})
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"rewards/chosen", "logps/chosen", "logits/chosen"} <= {*log}
    assert not {"rewards/rejected", "logps/rejected", "logits/rejected", "rewards/margins"} & {*log}


def test_diagnostics_callback_writes_a_kto_run(build):
    trainer = build(config={"diagnose": True, "max_steps": 2})
    trainer.train()
    run = json.loads((Path(trainer.args.output_dir) / "outspoken" / "run.json").read_text())
    assert run["method"] == "kto"
    assert run["facts"]["data/desirable_share"] == 0.5
    assert {"beta", "desirable_weight", "undesirable_weight"} <= {*run["live"]}


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "kind",
    ["full", pytest.param("lora", marks=pytest.mark.slow), pytest.param("moving-reference", marks=pytest.mark.slow)],
)
def test_resumed_run_equals_uninterrupted_run(build, tmp_path, tiny_model_factory, kind):
    from peft import LoraConfig

    config = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "disable_dropout": False,
    }
    if kind == "moving-reference":
        config.update(sync_ref_model=True, ref_model_sync_steps=1)

    def train(folder, resume=None):
        kwargs = {"model": tiny_model_factory(attention_dropout=0.2)}  # dropout: the random state must resume as well
        if kind == "lora":
            kwargs["peft_config"] = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        trainer = build(ROWS + ROWS[:1], {**config, "output_dir": str(tmp_path / folder)}, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole")
    resumed = train("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())
    timed = ("runtime", "per_second", "train_loss")
    for mine, other in zip(resumed.state.log_history[:5], whole.state.log_history[:5]):
        assert {k: v for k, v in mine.items() if not k.endswith(timed)} == {
            k: v for k, v in other.items() if not k.endswith(timed)
        }
    assert resumed.state.log_history[4]["num_tokens"] == whole.state.log_history[4]["num_tokens"] > 0
