"""RewardTrainer: data, scores, signals, adapters, resuming, and what it says of wrong input."""

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    TrainerCallback,
)

from outspoken.trainers.data.pairs import prepare_pairs
from outspoken.trainers.reward import DataCollatorForPreference, RewardConfig, RewardTrainer

ROWS = [
    {"prompt": f"What is {i} + 1? And what is {i}?", "chosen": f" It is {i + 1}.", "rejected": " The fox" + " x" * i}
    for i in range(6)
]


def say(role, text):
    return {"role": role, "content": text}


@pytest.fixture
def judge(tiny_tokenizer):
    """`build(architecture="llama", num_labels=1)`: a tiny model with a score head, the same every time."""

    def build(architecture="llama", num_labels=1, **more):
        torch.set_num_threads(1)
        common = {
            "vocab_size": len(tiny_tokenizer),
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "num_labels": num_labels,
        }
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        wide = {**sizes, "intermediate_size": 32, "initializer_range": 0.2}
        classes = {
            "llama": (LlamaForSequenceClassification, LlamaConfig, wide),
            "qwen3": (Qwen3ForSequenceClassification, Qwen3Config, {**wide, "num_key_value_heads": 1, "head_dim": 8}),
            "gpt2": (GPT2ForSequenceClassification, GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}),
            "opt": (OPTForSequenceClassification, OPTConfig, {**sizes, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 256}),
            "bert": (BertForSequenceClassification, BertConfig, {**sizes, "intermediate_size": 32}),
        }  # fmt: skip
        model_class, config_class, fields = classes[architecture]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model_class(config_class(**common, **{**fields, **more}))

    return build


@pytest.fixture
def trainer_of(tmp_path, judge, tiny_tokenizer_factory):
    """`make(rows, model=None, **options)`: a trainer; options of the trainer by name, all others of the config."""

    def make(rows=ROWS, model=None, tokenizer=None, **options):
        arguments = {
            name: options.pop(name)
            for name in ("eval_dataset", "peft_config", "compute_metrics", "callbacks", "data_collator")
            if name in options
        }
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "diagnose": False,
        }
        return RewardTrainer(
            judge() if model is None else model,
            RewardConfig(**settings | options),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=tiny_tokenizer_factory() if tokenizer is None else tokenizer,
            **arguments,
        )

    return make


def first_batch(trainer):
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))


# ----------------------------------------------------------------------------------------------------------- the data


def test_texts_become_whole_sequences_with_an_end_token(tiny_tokenizer):
    rows = [{"prompt": "What is 1?", "chosen": " It is 1.", "rejected": " No.<|endoftext|>"}]
    implicit = [{side: rows[0]["prompt"] + rows[0][side] for side in ("chosen", "rejected")}]
    for given in (rows, implicit):
        dataset, _ = prepare_pairs(Dataset.from_list(given), tiny_tokenizer, None)
        assert dataset[0]["chosen_ids"] == tiny_tokenizer("What is 1? It is 1.<|endoftext|>")["input_ids"]
        assert dataset[0]["rejected_ids"] == tiny_tokenizer("What is 1? No.<|endoftext|>")["input_ids"]


def test_conversations_go_through_the_chat_template(tiny_tokenizer):
    asked, good, bad = say("user", "What is 1?"), say("assistant", "1"), say("assistant", "the fox")
    explicit = {"prompt": [asked], "chosen": [good], "rejected": [bad]}
    implicit = {"chosen": [asked, good], "rejected": [asked, bad]}
    repeated = {**implicit, "prompt": "What is 1?"}  # the prompt as text beside whole conversations
    expected = [
        tiny_tokenizer(f"<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n")[
            "input_ids"
        ]
        for text in ("1", "the fox")
    ]
    for row in (explicit, implicit, repeated):
        dataset, _ = prepare_pairs(Dataset.from_list([row]), tiny_tokenizer, None)
        assert [dataset[0]["chosen_ids"], dataset[0]["rejected_ids"]] == expected


def test_tools_and_template_arguments_reach_the_template(tiny_tokenizer_factory):
    row = {
        "prompt": [say("user", "1?")],
        "chosen": [say("assistant", "1")],
        "rejected": [say("assistant", "2")],
        "tools": '[{"name": "add"}]',
        "chat_template_kwargs": {"loud": True},
    }
    template = "{% if loud %}LOUD {% endif %}{{ tools | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = tiny_tokenizer_factory(chat_template=template)
    dataset, _ = prepare_pairs(Dataset.from_list([row]), tokenizer, None)
    assert tokenizer.decode(dataset[0]["chosen_ids"]) == "LOUD 11?1"


def test_tokens_are_taken_as_they_are_also_under_their_old_names(tiny_tokenizer):
    rows = [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]}]
    dataset, facts = prepare_pairs(Dataset.from_list(rows), tiny_tokenizer, 3)
    assert (dataset[0]["chosen_ids"], dataset[0]["rejected_ids"]) == ([5, 6, 7], [5, 8])
    old = [{"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 8]}]
    with pytest.warns(FutureWarning, match="chosen_ids"):
        renamed, _ = prepare_pairs(Dataset.from_list(old), tiny_tokenizer, 3)
    assert renamed[0] == dataset[0]
    assert facts["data/ends_with_eos_share"] == 0.0


def test_facts(tiny_tokenizer):
    end, turn = tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [
        {"chosen_ids": [9, 9, 9, end], "rejected_ids": [9, turn]},
        {"chosen_ids": [9] * 20, "rejected_ids": [9, 8]},
        {"chosen_ids": [7, 7], "rejected_ids": [7, 7]},
    ]
    dataset, facts = prepare_pairs(Dataset.from_list(rows), tiny_tokenizer, 10)
    assert len(dataset) == 2
    assert facts == {
        "data/rows": 3.0,
        "data/longest": 20.0,
        "data/p99_length": 20.0,
        "data/truncated_share": pytest.approx(1 / 3),
        "data/ends_with_eos_share": pytest.approx(2 / 6),
        "data/identical_pairs_share": pytest.approx(1 / 3),
    }


def test_long_pairs_are_dropped_with_a_warning_that_counts_them(tiny_tokenizer, caplog):
    rows = [{"chosen_ids": [9] * length, "rejected_ids": [8]} for length in (3, 5, 9, 4, 7)]
    dataset, _ = prepare_pairs(Dataset.from_list(rows), tiny_tokenizer, 5)
    assert [len(row["chosen_ids"]) for row in dataset] == [3, 5, 4]
    assert "2 of 5 rows of the train dataset are dropped (first: row 2)" in caplog.text
    stream, facts = prepare_pairs(Dataset.from_list(rows).to_iterable_dataset(), tiny_tokenizer, 5)
    assert [len(row["chosen_ids"]) for row in stream] == [3, 5, 4] and facts == {}


def test_the_collator_puts_the_chosen_rows_first():
    rows = [
        {"chosen_ids": [1, 2, 3], "rejected_ids": [4], "margin": 0.5, "preferences": [1, -1]},
        {"chosen_ids": [5], "rejected_ids": [6, 7], "margin": 1, "preferences": [0, 0.5]},
    ]
    batch = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [5, 0, 0, 0], [4, 0, 0, 0], [6, 7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["margin"].tolist() == [0.5, 1.0]
    assert batch["preferences"].tolist() == [[1.0, -1.0], [0.0, 0.5]]


# ------------------------------------------------------------------------------------------------- scores and losses


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
def test_prompts_computed_once_give_the_same_loss_and_gradients(trainer_of, judge, architecture):
    found = []
    for share in (True, False):
        trainer = trainer_of(model=judge(architecture), share_prompts=share, center_rewards_coefficient=0.1)
        assert trainer._share_prompts is share
        batch, calls = first_batch(trainer), []
        hook = trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        hook.remove()
        loss.backward()
        found.append((calls, loss, outputs.logits, {n: p.grad for n, p in trainer.model.named_parameters()}))
    (calls, loss, scores, gradients), (plain_calls, plain_loss, plain_scores, plain_gradients) = found
    assert calls[0][0] == 3 and plain_calls[0][0] == 6
    torch.testing.assert_close(loss, plain_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, plain_scores, atol=1e-5, rtol=1e-5)
    for name, gradient in plain_gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5)


def test_encoders_are_trained_too(trainer_of, judge):
    trainer = trainer_of(model=judge("bert"))
    assert not trainer._share_prompts
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_it_learns_which_answers_are_preferred(trainer_of):
    rows = [
        {
            "prompt": f"Number {i}:",
            "chosen": f" the {'fox dog sky'.split()[i % 3]} is blue.",
            "rejected": f" {i} + {i}.",
        }
        for i in range(24)
    ]
    trainer = trainer_of(
        rows[:18], eval_dataset=Dataset.from_list(rows[18:]), max_steps=20, learning_rate=1e-2,
        per_device_train_batch_size=6,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] > 0.5 and log[-1]["loss"] < 0.05
    assert log[-1]["accuracy"] == 1.0 and log[-1]["margin"] > 2
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_several_scores_are_trained_at_once(trainer_of, judge):
    rows = [{**row, "preferences": p, "margin": m} for row, p, m in zip(
        ROWS[:3], ([1, -1, 0], [0.5, 1, 0], [1, 0, 0]), ([0, 0, 0], [1, 0, 0], [0, 2, 0])
    )]  # fmt: skip
    trainer = trainer_of(rows, judge(num_labels=3), num_scores=3, center_rewards_coefficient=0.1)
    batch = first_batch(trainer)
    scores = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = trainer.compute_loss(trainer.model, batch)
    total, weights, ahead = 0.0, 0.0, {0: [], 1: []}
    for (c, r), p, m in zip(
        zip(scores[:3].tolist(), scores[3:].tolist()), batch["preferences"].tolist(), batch["margin"].tolist()
    ):
        for s in range(3):
            if p[s]:
                gap = math.copysign(1, p[s]) * (c[s] - r[s])
                ahead[s].append(gap)
                total += abs(p[s]) * math.log(1 + math.exp(m[s] - gap))
                weights += abs(p[s])
    centering = ((scores[:3] + scores[3:]) ** 2).mean().item()
    assert weights == 4.5
    assert loss.item() == pytest.approx(total / weights + 0.1 * centering, abs=1e-5)

    metrics = {name: sum(v) / len(v) for name, v in trainer._metrics["train"].items() if v}
    assert metrics["accuracy/0"] == pytest.approx(np.mean([gap > 0 for gap in ahead[0]]))
    assert metrics["margin/1"] == pytest.approx(np.mean(ahead[1]), abs=1e-5)
    assert metrics["margin"] == pytest.approx(np.mean(ahead[0] + ahead[1]), abs=1e-5)
    assert "margin/2" not in metrics  # never compared
    assert metrics["max_reward/2"] == pytest.approx(scores[:, 2].max().item(), abs=1e-5)
    trainer.args.center_rewards_coefficient = None
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    assert trainer.model.score.weight.grad[2].abs().max() == 0 < trainer.model.score.weight.grad[:2].abs().min()


def test_one_number_speaks_for_all_scores(trainer_of, judge):
    rows = [{**row, "preferences": 1.0, "margin": 0.5} for row in ROWS[:3]]
    trainer = trainer_of(rows, judge(num_labels=2), num_scores=2)
    batch = first_batch(trainer)
    scores = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = -torch.nn.functional.logsigmoid(scores[:3] - scores[3:] - 0.5).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, atol=1e-5, rtol=1e-5)


def test_comparisons_weigh_the_same_across_micro_batches(trainer_of, judge):
    """Gradients of an optimizer step do not depend on how it is cut into micro-batches."""
    rows = [{**row, "preferences": p} for row, p in zip(ROWS[:5], ([1, 0], [1, 1], [-1, 1], [0, 0], [0.5, 1]))]
    gradients = []
    for size, steps in ((5, 1), (2, 3)):

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

        trainer = trainer_of(
            rows, judge(num_labels=2), num_scores=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_steps=1, callbacks=[Keep()], center_rewards_coefficient=0.3,
            max_grad_norm=1e9,
        )  # fmt: skip
        trainer.train()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_the_centering_coefficient_is_read_at_each_step(trainer_of):
    trainer = trainer_of()
    batch = first_batch(trainer)
    without = trainer.compute_loss(trainer.model, batch)
    trainer.args.center_rewards_coefficient = 2.0
    scores = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = without + 2.0 * ((scores[:3] + scores[3:]) ** 2).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_scores_are_compared_in_float32(trainer_of, judge):
    trainer = trainer_of(model=judge().to(torch.bfloat16))
    loss, outputs = trainer.compute_loss(trainer.model, first_batch(trainer), return_outputs=True)
    assert loss.dtype == outputs.logits.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- evaluation


def test_metrics_of_an_evaluation_count_every_pair_once(trainer_of):
    """Five pairs in batches of two: the last pair weighs no more than the others."""
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {"seen": len(prediction.predictions)}

    trainer = trainer_of(eval_dataset=Dataset.from_list(ROWS[:5]), compute_metrics=compute)
    metrics = trainer.evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (5, 2) and prediction.label_ids.tolist() == [0] * 5
    chosen, rejected = prediction.predictions.T
    assert metrics["eval_seen"] == 5
    assert metrics["eval_accuracy"] == pytest.approx((chosen > rejected).mean())
    assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-5)
    assert metrics["eval_mean_reward"] == pytest.approx(prediction.predictions.mean(), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), abs=1e-5)
    for row, score in zip(ROWS, chosen):  # the scores are those of each answer alone
        ids = trainer.processing_class(row["prompt"] + row["chosen"] + "<|endoftext|>", return_tensors="pt")[
            "input_ids"
        ]
        assert trainer.model(ids).logits.item() == pytest.approx(score, abs=1e-5)


def test_several_scores_are_predicted_side_by_side(trainer_of, judge):
    shapes = []
    trainer = trainer_of(
        model=judge(num_labels=3), num_scores=3, eval_dataset=Dataset.from_list(ROWS[:3]),
        compute_metrics=lambda p: shapes.append(p.predictions.shape) or {},
    )  # fmt: skip
    trainer.evaluate()
    assert shapes == [(3, 2, 3)]


def test_several_evaluation_datasets_and_new_ones(trainer_of):
    trainer = trainer_of(
        eval_dataset={"easy": Dataset.from_list(ROWS[:2]), "hard": Dataset.from_list(ROWS[2:])},
        eval_strategy="steps", eval_steps=1, max_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_hard_accuracy",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_easy_loss", "eval_hard_loss", "eval_accuracy", "eval_easy_accuracy", "eval_hard_accuracy"} <= logged
    assert "eval_accuracy" in trainer.evaluate(Dataset.from_list(ROWS[:2]))


def test_streams(trainer_of):
    trainer = trainer_of(
        Dataset.from_list(ROWS).to_iterable_dataset(), eval_dataset=Dataset.from_list(ROWS[:2]).to_iterable_dataset()
    )
    trainer.train()
    assert trainer.state.global_step == 2 and math.isfinite(trainer.evaluate()["eval_loss"])


# --------------------------------------------------------------------------------------------------- what it measures


def test_signals(trainer_of, tiny_tokenizer):
    """Lengths are those of the answers without the prompt; scores are those of the whole step, over its micro-batches."""
    rows = [
        {"chosen_ids": [20, 21, 22, 30 + i, 40, 41], "rejected_ids": [20, 21, 22, *range(50, 51 + i)]}
        for i in range(7)
    ]
    rows.append({"chosen_ids": [20, 21, 30], "rejected_ids": [20, 21, 30]})
    trainer = trainer_of(rows, per_device_train_batch_size=4)
    trainer.model.train()
    scores, batches = [], list(trainer.get_train_dataloader())
    for batch in batches:
        trainer.compute_loss(trainer.model, batch)
        scores.append(trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0])
    signals = trainer.recorder.take().signals
    # Of the identical pair only the last token counts as answer.
    assert signals["lengths/chosen"] == pytest.approx((7 * 3 + 1) / 8)
    assert signals["lengths/rejected"] == pytest.approx((sum(range(1, 8)) + 1) / 8)
    assert signals["pairs/identical"] == 1 / 8 and signals["pairs/identical#n"] == 8
    scores = torch.cat(scores).detach()
    assert signals["scores/mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert signals["scores/std"] == pytest.approx(scores.std().item(), abs=1e-5)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]) - 3.0  # the prompt of the 7 pairs
    lengths[lengths == 0] = 1  # the identical pair: 2 tokens of prompt and 1 of answer
    expected = np.corrcoef(scores.numpy(), lengths.numpy())[0, 1]
    assert signals["scores/length_correlation"] == pytest.approx(expected, abs=1e-4)
    assert signals["scores/length_correlation#n"] == 16
    trainer.state.global_step = 1
    trainer.compute_loss(trainer.model, batches[0])
    assert trainer.recorder.take().signals["scores/mean"] == pytest.approx(scores[:8].mean().item(), abs=1e-5)


def test_a_run_is_watched(trainer_of, tmp_path):
    import json

    trainer = trainer_of(diagnose=True, max_steps=3)
    trainer.train()
    folder = tmp_path / "out" / "outspoken"
    run = json.loads((folder / "run.json").read_text())
    assert run["method"] == "reward" and run["facts"]["data/rows"] == 6.0
    assert {"learning_rate", "center_rewards_coefficient"} <= run["live"].keys()
    signals = [json.loads(line)["signals"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in (
        "loss",
        "accuracy",
        "margin",
        "mean_reward",
        "scores/mean",
        "scores/std",
        "lengths/chosen",
        "pairs/identical",
    ):
        assert name in signals[0], name


# ------------------------------------------------------------------------------------------ models, adapters, resuming


def test_a_path_gets_a_new_head_quietly(tiny_model_dir, trainer_of, caplog):
    with caplog.at_level(logging.WARNING, "transformers"):
        trainer = trainer_of(model=tiny_model_dir, num_scores=2)
    assert trainer.model.score.weight.shape == (2, 32) and trainer.model.config.num_labels == 2
    assert "MISSING" not in caplog.text and "UNEXPECTED" not in caplog.text


def test_a_saved_reward_model_goes_on_with_its_head(tmp_path, judge, trainer_of, tiny_tokenizer):
    model = judge()
    model.save_pretrained(tmp_path / "judge")
    tiny_tokenizer.save_pretrained(tmp_path / "judge")
    trainer = trainer_of(model=str(tmp_path / "judge"))
    assert torch.equal(trainer.model.score.weight, model.score.weight)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_an_adapter_keeps_its_score_head(tmp_path, tiny_model_dir, trainer_of, task_type):
    """A new head that were not saved would be drawn anew when the adapter is loaded."""
    trainer = trainer_of(
        model=tiny_model_dir,
        peft_config=LoraConfig(task_type=task_type, target_modules="all-linear", r=2),
        learning_rate=0.1,
    )
    start = trainer.model.base_model.model.score.weight.detach().clone()
    trainer.train()
    head = trainer.model.base_model.model.score.weight.detach()
    assert (head - start).abs().max() > 0.01
    batch = first_batch(trainer)
    trainer.model.eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = trainer.model(**inputs).logits
    trainer.save_model(str(tmp_path / "adapter"))
    torch.manual_seed(123)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    base.config.pad_token_id = trainer.processing_class.pad_token_id
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_a_new_head_that_an_adapter_leaves_out_is_told(judge, trainer_of, caplog, tiny_model_dir):
    trainer_of(model=tiny_model_dir, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "'score' was added to the adapter's `modules_to_save`" in caplog.text
    caplog.clear()
    trainer_of(model=get_peft_model(judge(), LoraConfig(target_modules=["q_proj"])))
    assert "score head is new and not part of the adapter" in caplog.text
    caplog.clear()
    trainer_of(model=get_peft_model(judge(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])))
    assert "score head" not in caplog.text


def test_dropout_is_off_unless_wanted(judge, trainer_of):
    def rates(trainer):
        return {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(trainer_of(model=judge("gpt2"))) == {0.0}
    assert rates(trainer_of(model=judge("gpt2"), disable_dropout=False)) == {0.1}
    # OPT keeps its probabilities as numbers.
    layer = trainer_of(model=judge("opt")).model.model.decoder.layers[0]
    assert layer.dropout == layer.self_attn.dropout == 0.0


def test_the_chat_template_and_end_token_can_be_chosen(tmp_path, trainer_of):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    rows = [{"prompt": [say("user", "a")], "chosen": [say("assistant", "b")], "rejected": [say("assistant", "c")]}]
    trainer = trainer_of(rows, chat_template_path=str(tmp_path / "mine.jinja"))
    assert trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"]) == "[a][b]"
    trainer = trainer_of(eos_token="<|im_end|>")
    assert trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"]).endswith("1.<|im_end|>")
    assert trainer.model.config.eos_token_id == trainer.processing_class.convert_tokens_to_ids("<|im_end|>")


def test_an_end_token_that_pads_is_told(trainer_of, tiny_tokenizer_factory, caplog):
    trainer = trainer_of(tokenizer=tiny_tokenizer_factory(pad_token="<|endoftext|>"))
    assert "scored at the token before it" in caplog.text
    # And so they are, shared or not: the model looks for the last token that is no padding token.
    batch = first_batch(trainer)
    scores = trainer._score(trainer.model, dict(batch)).logits
    expected = trainer.model(**batch).logits
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_is_equal_to_the_bit(tmp_path, trainer_of, judge):
    def run(folder, **options):
        return trainer_of(
            model=judge("gpt2"), output_dir=str(tmp_path / folder), max_steps=4, save_strategy="steps", save_steps=2,
            disable_dropout=False, per_device_train_batch_size=2, **options,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    keys = ("loss", "accuracy", "margin", "mean_reward", "num_tokens")
    logs = [
        [{key: entry[key] for key in keys} for entry in t.state.log_history if "loss" in entry]
        for t in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_activations_are_offloaded_when_asked(trainer_of, monkeypatch):
    import functools

    from outspoken.trainers import reward

    opened = []
    real = reward.offload_activations

    def offload(model, **options):
        opened.append(model)
        return real(model, cpu_too=True, **options)

    monkeypatch.setattr(reward, "offload_activations", functools.wraps(real)(offload))
    weights = []
    for offloading in (False, True):
        trainer = trainer_of(activation_offloading=offloading, gradient_checkpointing=True)
        trainer.train()
        weights.append(trainer.model.score.weight.detach().clone())
    assert len(opened) == 2 and torch.equal(*weights)


def test_rows_are_grouped_by_length(trainer_of):
    trainer = trainer_of(train_sampling_strategy="group_by_length")
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset]
    assert trainer.train_dataset["length"][:] == lengths
    trainer.train()


# ------------------------------------------------------------------------------------------------------ what it refuses

BAD = {
    "no rejected": ([{"chosen": "a"}], {}, "no 'rejected'"),
    "unpaired": ([{"prompt": "a", "completion": "b", "label": True}], {}, "KTOTrainer"),
    "single answers": ([{"prompt": "a", "completion": "b"}], {}, "single answers"),
    "empty": ([{"chosen": "a", "rejected": ""}], {}, "Row 0 of the train dataset, column 'rejected'"),
    "none": ([{"chosen": "a", "rejected": "b"}, {"chosen": None, "rejected": "b"}], {}, "Row 1 of the train dataset, column 'chosen'"),
    "mixed": ([{"prompt": "a", "chosen": [say("assistant", "b")], "rejected": "c"}], {}, "column"),
    "no tokens": ([{"chosen_ids": [1], "rejected_ids": []}], {}, "no tokens"),
    "not tokens": ([{"chosen_ids": "abc", "rejected_ids": "abd"}], {}, "list of token ids"),
    "identical": ([{"chosen": "a", "rejected": "a"}], {}, "nothing to prefer"),
    "too long": ([{"chosen": "a" * 50, "rejected": "b"}], {"max_length": 10}, "No row of the train dataset is left"),
    "margin is text": ([{"chosen": "a", "rejected": "b", "margin": "big"}], {}, "'margin'"),
    "margin missing": ([{"chosen_ids": [1], "rejected_ids": [2], "margin": None}], {}, "expected one number, found None"),
    "margin infinite": ([{"chosen_ids": [1], "rejected_ids": [2], "margin": math.inf}], {}, "found inf"),
    "too many margins": ([{"chosen": "a", "rejected": "b", "margin": [1.0, 2.0]}], {}, "2 numbers for `num_scores=1`"),
    "preference too large": ([{"chosen": "a", "rejected": "b", "preferences": 2}], {}, "found 2"),
    "images": ([{"chosen": "a", "rejected": "b", "image": 1}], {}, "text models only"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_told_before_the_weights_load(tmp_path, trainer_of, tiny_model_dir, case):
    import shutil

    rows, options, message = BAD[case]
    shutil.copytree(tiny_model_dir, tmp_path / "no-weights")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    with pytest.raises(ValueError) as raised:
        trainer_of(rows, str(tmp_path / "no-weights"), **options)
    assert message in str(raised.value) and str(raised.value).endswith(".")


def test_bad_settings_and_models(trainer_of, judge, tiny_model_factory, tmp_path, tiny_tokenizer):
    for options, message in (
        ({"num_scores": 0}, "`num_scores` is 0"),
        ({"max_length": 0}, "`max_length` is 0"),
        ({"center_rewards_coefficient": -1.0}, "`center_rewards_coefficient` is -1.0"),
        ({"pad_to_multiple_of": "many"}, "`pad_to_multiple_of` is 'many'"),
        ({"eos_token": "<none>"}, "`eos_token` is '<none>'"),
        ({"model": judge(num_labels=2)}, "`num_labels=2`"),
        ({"model": tiny_model_factory()}, "AutoModelForSequenceClassification"),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "use 'SEQ_CLS'"),
    ):
        with pytest.raises(ValueError) as raised:
            trainer_of(**options)
        assert message in str(raised.value)
    judge(num_labels=3).save_pretrained(tmp_path / "three")
    tiny_tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="has 3 outputs, but `num_scores` is 1; set `num_scores=3`"):
        trainer_of(model=str(tmp_path / "three"))
    with pytest.raises(ValueError, match="`max_steps` is -1"):
        trainer_of(Dataset.from_list(ROWS).to_iterable_dataset(), max_steps=-1)
    with pytest.raises(ValueError, match="`train_dataset` is missing"):
        RewardTrainer(judge(), RewardConfig(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="with_transform"):
        trainer_of(Dataset.from_list(ROWS).with_transform(lambda rows: rows))
    with warnings.catch_warnings(), pytest.raises(FutureWarning, match="pad_token"):
        warnings.simplefilter("error")
        RewardConfig(str(tmp_path), pad_token="<|pad|>", use_cpu=True)


@pytest.fixture(autouse=True)
def _heard():
    """What the package logs reaches `caplog`, whatever ran before."""
    logger = logging.getLogger("outspoken")
    before = logger.propagate
    logger.propagate = True
    yield
    logger.propagate = before
