"""SFTTrainer: wrong inputs, configuration, hand-over of measurements, checkpoints; equality with TRL is tested beside."""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser, TrainingArguments

from outspoken.trainers.config import live_fields
from outspoken.trainers.sft import SFTConfig, SFTTrainer, as_sft_config

trl = pytest.importorskip("trl")

TEXTS = [{"text": "The sky is blue."}, {"text": "What is 2 + 2? It is 4."}, {"text": "abc"}, {"text": "def ghi"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def settings(tmp_path):
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
    }


@pytest.fixture
def build(settings, tiny_model_factory, tiny_tokenizer_factory):
    """`build(rows, config, **trainer arguments)`: a trainer that has not trained yet."""

    def trainer(rows=TEXTS, config=None, **kwargs):
        kwargs.setdefault("train_dataset", Dataset.from_list(rows) if isinstance(rows, list) else rows)
        kwargs.setdefault("processing_class", tiny_tokenizer_factory())
        kwargs.setdefault("model", tiny_model_factory())
        return SFTTrainer(args=SFTConfig(**{**settings, **(config or {})}), **kwargs)

    return trainer


# ---------------------------------------------------------------------------------------------- wrong inputs

COLUMNS = "it needs 'text' (set by `dataset_text_field`), 'messages', or 'prompt' and 'completion'"


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            {},
            f"The train dataset has columns 'question', 'answer', but none to train on; {COLUMNS}: name the column in "
            "`dataset_text_field`, rename it, or pass `formatting_func`.",
        ),
        (
            [{"prompt": "a"}],
            {},
            "The train dataset has a column 'prompt' but no 'completion' to learn; add one, or pass `formatting_func`.",
        ),
        (
            [{"chosen": "a", "rejected": "b"}],
            {},
            "The train dataset has columns 'chosen' and 'rejected', so it holds preferences; use DPOTrainer, or keep "
            "the chosen answers in a column 'completion' beside 'prompt'.",
        ),
        ([], {}, "The train dataset is empty; pass a dataset with at least one row."),
        (
            [{"text": "a"}, {"text": None}],
            {},
            "Row 1 of the train dataset, column 'text': expected text, found nothing (None); fill or drop the row.",
        ),
        (
            [{"text": "a"}, {"text": " "}],
            {},
            "Row 1 of the train dataset, column 'text': the text is empty; fill or drop the row.",
        ),
        (
            [{"prompt": "a", "completion": ""}],
            {},
            "Row 0 of the train dataset, column 'completion': the text is empty; fill or drop the row.",
        ),
        (
            [{"text": 3}],
            {},
            "Row 0 of the train dataset, column 'text': expected text or a list of messages, found an integer; convert the "
            "column.",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            {},
            "Row 1 of the train dataset, column 'completion': expected text, found nothing (None); fill or drop the "
            "row.",
        ),
        (
            [{"messages": CHAT}, {"messages": []}],
            {},
            "Row 1 of the train dataset, column 'messages': the conversation has no messages; drop the row.",
        ),
        (
            [{"messages": [{"role": None, "content": "a"}]}],
            {},
            "Row 0 of the train dataset, column 'messages': a message has no role; give every message a 'role' and a "
            "'content'.",
        ),
        (
            [{"messages": [CHAT[0], {"role": "assistant", "content": None}]}],
            {},
            "Row 0 of the train dataset, column 'messages': a message has neither content nor tool calls; fill its "
            "'content' or drop the row.",
        ),
        (
            [{"messages": CHAT, "tools": "[oops"}],
            {},
            "Row 0 of the train dataset, column 'tools': not valid JSON (Expecting value); store the tools' schemas as "
            "a list, or as JSON text.",
        ),
        (
            [{"messages": CHAT}, {"messages": CHAT[:1]}],
            {"assistant_only_loss": True},
            "Row 1 of the train dataset, column 'messages': the conversation has no token of the assistant, though "
            "`assistant_only_loss=True`; drop the row, or check where the chat template has {% generation %} markers.",
        ),
        (
            TEXTS,
            {"assistant_only_loss": True},
            "`assistant_only_loss=True` needs conversations, but the train dataset is not conversational; set it to "
            "False, or give the dataset a column 'messages'.",
        ),
        (
            TEXTS,
            {"completion_only_loss": True},
            "`completion_only_loss=True` needs columns 'prompt' and 'completion', and the train dataset has 'text'; "
            "leave it unset.",
        ),
        (
            [{"input_ids": [1, 2, 3], "labels": [1, 2]}],
            {},
            "Row 0 of the train dataset, column 'labels': 2 values for 3 input_ids; both must be equally long.",
        ),
        (
            [{"prompt": "a long prompt, too long", "completion": "b"}],
            {"max_length": 2},
            "No row of the train dataset has a token with loss left after truncation to `max_length=2`; raise "
            "`max_length` (the longest row has LENGTH tokens).",
        ),
        (
            [{"text": "a", "image": "b"}],
            {},
            "The train dataset has a column of images, but TokenizersBackend is a tokenizer, which cannot prepare them; "
            "pass a model that sees and its processor, or remove the column.",
        ),
        (
            TEXTS,
            {"eos_token": "<none>"},
            "`eos_token` is '<none>', which is not in the vocabulary of the TokenizersBackend; name a token it has, or "
            "add it to the tokenizer and resize the model's embeddings first.",
        ),
        (
            TEXTS,
            {"pad_token": "<none>"},
            "`pad_token` is '<none>', which is not in the vocabulary of the TokenizersBackend; name a token it has.",
        ),
        (
            TEXTS,
            {"truncation_mode": "keep_middle"},
            "`truncation_mode` is 'keep_middle'; use 'keep_start' or 'keep_end'.",
        ),
        (
            TEXTS,
            {"router_aux_loss_coef": 0.1},
            "`router_aux_loss_coef=0.1` needs a mixture-of-experts model that returns its router's logits, which "
            "LlamaForCausalLM does not; leave it unset.",
        ),
        (
            TEXTS,
            {"chat_template_path": "/nowhere/template.jinja"},
            "`chat_template_path` is '/nowhere/template.jinja', which cannot be read (No such file or directory).",
        ),
        (
            TEXTS,
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "`skip_prepare_dataset` is set, but the train dataset has no column 'input_ids'; tokenize it, drop the "
            "option, or pass a `data_collator`.",
        ),
        (
            [{"input_ids": [1], "completion_mask": [1]}],
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "`skip_prepare_dataset` is set, so the masks of the train dataset would be ignored; add a column 'labels' "
            "(-100 where no loss is wanted), or drop the option.",
        ),
    ],
)
def test_mistakes_in_data_and_settings_get_one_sentence(build, rows, config, message):
    with pytest.raises(ValueError) as error:
        build(rows, config)
    assert re.sub(r"has \d+ tokens", "has LENGTH tokens", str(error.value)) == message


def test_mistakes_in_streams_are_told_when_their_row_comes(build):
    rows = IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": None}]))
    trainer = build(rows, {"max_steps": 1})
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset, column 'text': expected text, found nothing"):
        trainer.train()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss_type", "mse", "`loss_type` is 'mse'; use 'nll' or 'dft'."),
        ("pad_to_multiple_of", "ten", "`pad_to_multiple_of` is 'ten'; use a number of tokens, 'auto' or 'none'."),
    ],
)
def test_config_mistakes(settings, field, value, message):
    with pytest.raises(ValueError) as error:
        SFTConfig(**settings, **{field: value})
    assert str(error.value) == message


def test_argument_mistakes(build, tiny_model_factory, tiny_tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    with pytest.raises(ValueError, match=r"^`train_dataset` is missing; pass a datasets\.Dataset\.$"):
        build(train_dataset=None)
    with pytest.raises(
        TypeError, match=r"^`train_dataset` must be a datasets\.Dataset or IterableDataset, got list; "
    ):
        build(train_dataset=TEXTS)
    with pytest.raises(TypeError, match=r"^`eval_dataset\['a'\]` must be a datasets\.Dataset or IterableDataset"):
        build(eval_dataset={"a": TEXTS})
    with pytest.raises(TypeError, match=r"^`args` must be an SFTConfig, got dict\.$"):
        SFTTrainer(tiny_model_factory(), {"a": 1}, train_dataset=Dataset.from_list(TEXTS))
    with pytest.raises(TypeError, match=r"^`processing_class` must be a tokenizer, got str\.$"):
        build(processing_class="tokenizer")
    with pytest.raises(ValueError, match=r"^`processing_class` is missing, and the model was not loaded from a path"):
        build(processing_class=None)
    with pytest.raises(TypeError, match=r"^`peft_config` must be a peft\.PeftConfig such as LoraConfig, got dict\.$"):
        build(peft_config={"r": 8})
    lora = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"^`peft_config` is given, but the model already is a PeftModel; drop"):
        build(model=get_peft_model(tiny_model_factory(), lora), peft_config=lora)
    with pytest.raises(ValueError, match=r"^`formatting_func` makes one text of prompt and completion, so"):
        build([{"prompt": "a", "completion": "b"}], formatting_func=lambda row: "text")
    with pytest.raises(
        ValueError, match=r"^`formatting_func` returned a list for row 0 of the train dataset; it must"
    ):
        build(formatting_func=lambda row: ["text"])
    with pytest.raises(ValueError, match=r"^`compute_loss_func` would replace `loss_type='dft'`; pass only one of"):
        build(config={"loss_type": "dft"}, compute_loss_func=lambda *a, **k: 0)
    small = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "vocab_size": len(tiny_tokenizer)}
    with pytest.raises(
        ValueError, match=r"^SFTTrainer trains decoder-only language models, but T5For.* is an encoder"
    ):
        build(model=T5ForConditionalGeneration(T5Config(**small)))
    hearing = tiny_model_factory()
    hearing.config.audio_config = {"hidden_size": 8}
    with pytest.raises(ValueError, match=r"^SFTTrainer cannot train LlamaForCausalLM, which also takes audio; pass"):
        build(model=hearing)
    (tmp_path / "empty").mkdir()
    tiny_model_factory().save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^No tokenizer could be loaded from .*; pass the model's tokenizer as"):
        build(model=str(tmp_path / "empty"), processing_class=None)
    with pytest.raises(ValueError, match=r"^`model_init_kwargs\['dtype'\]` is 'int3'; use 'auto', 'bfloat16'"):
        build(model=str(tmp_path / "empty"), config={"model_init_kwargs": {"dtype": "int3"}})
    transformed = Dataset.from_list(TEXTS).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"^The train dataset has a transform \(`with_transform`\), which would be"):
        build(transformed)


def test_conversations_without_a_template_are_refused(build, tiny_tokenizer_factory):
    with pytest.raises(ValueError, match=r"^The dataset is conversational, but the tokenizer has no chat template; "):
        build([{"messages": CHAT}], processing_class=tiny_tokenizer_factory(chat_template=None))


# ---------------------------------------------------------------------------------------------- configuration


def test_same_constructor_and_fields_as_trl():
    ours = list(inspect.signature(SFTTrainer.__init__).parameters)
    assert ours == list(inspect.signature(trl.SFTTrainer.__init__).parameters)
    theirs = {f.name: f for f in dataclasses.fields(trl.SFTConfig)}
    mine = {f.name: f for f in dataclasses.fields(SFTConfig)}
    assert not {*theirs} - {*mine}
    assert {name for name in theirs if mine[name].default != theirs[name].default} == set()


def test_live_fields():
    assert {*live_fields(SFTConfig)} == {"learning_rate", "max_grad_norm", "loss_type", "label_smoothing_factor"}
    assert live_fields(SFTConfig)["learning_rate"] == {"minimum": 0.0, "maximum": 1.0, "choices": None}
    assert live_fields(SFTConfig)["loss_type"]["choices"] == ["nll", "dft"]


def test_command_line_and_deprecated_values(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--pad_to_multiple_of", "8", "--max_length", "64"]
    (config,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(
        [*arguments, "--model_init_kwargs", '{"dtype": "bfloat16"}', "--diagnose", "false"]
    )
    assert config.pad_to_multiple_of == 8
    assert config.max_length == 64
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert config.diagnose is False
    assert config.bf16 is False
    assert SFTConfig(str(tmp_path), use_cpu=True).pad_to_multiple_of is None
    with pytest.warns(FutureWarning, match="'nll' computes the same"):
        assert SFTConfig(str(tmp_path), use_cpu=True, loss_type="chunked_nll").loss_type == "nll"
    with pytest.warns(FutureWarning, match="it cuts off the beginning"):
        SFTConfig(str(tmp_path), use_cpu=True, truncation_mode="keep_end")


def test_other_libraries_arguments_are_converted(tmp_path, tiny_model_factory):
    common = {"use_cpu": True, "report_to": [], "hub_token": "secret", "num_train_epochs": 2.0, "bf16": False}
    for args in (
        TrainingArguments(str(tmp_path), learning_rate=3e-4, **common),
        trl.SFTConfig(str(tmp_path), learning_rate=3e-4, max_length=7, **common),
    ):
        converted = as_sft_config(args, tiny_model_factory())
        assert type(converted) is SFTConfig
        assert converted.learning_rate == 3e-4
        assert converted.hub_token == "secret"
        assert converted.num_train_epochs == 2.0
        assert converted.max_length == getattr(args, "max_length", 1024)
    assert as_sft_config(None, "some/where").output_dir == "where-SFT"


# ---------------------------------------------------------------------------------------------- models


def test_path_loads_float32_unless_told(build, tiny_model_dir):
    assert build(model=tiny_model_dir, processing_class=None).model.dtype == torch.float32
    half = build(model=tiny_model_dir, config={"model_init_kwargs": {"dtype": "bfloat16"}})
    assert half.model.dtype == torch.bfloat16


def test_tokens_of_the_model_follow_the_tokenizer(build, tiny_tokenizer_factory):
    tokenizer = tiny_tokenizer_factory(pad_token=None)
    trainer = build(config={"eos_token": "<|im_end|>"}, processing_class=tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert trainer.model.config.eos_token_id == trainer.model.config.pad_token_id == end
    assert trainer.model.generation_config.eos_token_id == [end, tokenizer.convert_tokens_to_ids("<|endoftext|>")]


def test_chat_template_file_is_used(build, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}", encoding="utf-8")
    trainer = build([{"messages": CHAT}], {"chat_template_path": str(path)})
    assert trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"]) == "<user>Hi<assistant>Hello"


def test_new_tokens_of_a_template_train_beside_the_adapter(build, tmp_path, tiny_tokenizer_factory):
    from peft import LoraConfig

    source = tiny_tokenizer_factory()
    source.add_tokens(["<turn>"])
    source.save_pretrained(tmp_path / "source")
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = build([{"messages": CHAT}], {"chat_template_path": str(tmp_path / "source")}, peft_config=config)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("lm_head" in name for name in trained)
    assert any("embed_tokens" in name for name in trained)
    assert config.trainable_token_indices == {"embed_tokens": list(range(300, 320))}
    trainer.args.max_steps = 1
    trainer.train()


# ---------------------------------------------------------------------------------------------- measurements


def test_measurements_are_handed_over(build):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6], "labels": [5, -100]},  # its one label is never predicted: position 0
    ]
    trainer = build(rows, {"max_steps": 1})
    trainer.train()
    taken = trainer.recorder.take().signals
    assert taken["samples/no_supervised"] == 1 / 2
    assert taken["samples/no_supervised#n"] == 2
    assert taken["tokens/supervised_share"] == pytest.approx(2 / 6)
    assert trainer.recorder.facts["data/rows"] == 2
    assert trainer.recorder.facts["data/longest"] == 4


def test_cut_rows_and_rows_that_end_are_counted(build, tiny_tokenizer):
    """Of three rows of 4 tokens one was cut; a fourth has no token with loss, and so no end to learn."""
    eos = tiny_tokenizer.eos_token_id
    rows = [
        {"input_ids": [5, 6, 7, eos]},
        {"input_ids": [5, 6, 7, 8, eos]},
        {"input_ids": [5, 6, 7, eos], "labels": [-100, 6, 7, -100]},
        {"input_ids": [5, 6, eos], "labels": [5, -100, -100]},
    ]
    settings = {"max_steps": 1, "max_length": 4, "per_device_train_batch_size": 4}
    rows = [{"labels": row["input_ids"], **row} for row in rows]
    trainer = build(rows, settings)
    trainer.train()
    taken = trainer.recorder.take().signals
    assert (taken["samples/truncated"], taken["samples/truncated#n"]) == (1 / 4, 4)
    assert (taken["samples/supervised_eos"], taken["samples/supervised_eos#n"]) == (1 / 3, 3)

    unlimited = build(rows, settings | {"max_length": None})
    unlimited.train()
    taken = unlimited.recorder.take().signals
    assert taken["samples/truncated"] == 0
    assert taken["samples/supervised_eos"] == 2 / 3  # the second row keeps its end

    prepared = build(rows, settings | {"dataset_kwargs": {"skip_prepare_dataset": True}})
    prepared.train()
    assert "samples/truncated" not in prepared.recorder.take().signals  # nobody knows what was cut before


def test_batch_without_labels_is_a_finite_zero(build):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 2
    trainer = build(rows, {"max_steps": 1, "max_length": None, "weight_decay": 0.0})
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == 0
    assert first["grad_norm"] == 0
    assert "entropy" not in first  # nothing was predicted: no entropy, rather than one of 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_live_fields_are_read_when_used(build):
    trainer = build(config={"max_steps": 1})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    plain = trainer.compute_loss(trainer.model, batch).item()
    trainer.args.label_smoothing_factor = 0.5
    smoothed = trainer.compute_loss(trainer.model, batch).item()
    trainer.args.label_smoothing_factor = 0.0
    trainer.args.loss_type = "dft"
    dft = trainer.compute_loss(trainer.model, batch).item()

    logps = trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    mask = targets != -100
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[mask]
    assert plain == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert smoothed == pytest.approx(-(picked.mean() + logps.mean(-1)[mask].mean()).item() / 2, rel=1e-5)
    assert dft == pytest.approx(-(picked * picked.exp()).mean().item(), rel=1e-5)


def test_training_lowers_the_loss_to_the_data_entropy(build):
    # Four equally likely first tokens after the same beginning, then everything is certain: ln(4) nats over 2 labels.
    rows = [{"input_ids": [4, token, 99]} for token in (10, 20, 30, 40)]
    trainer = build(rows, {"max_steps": 150, "per_device_train_batch_size": 4, "logging_steps": 150})
    trainer.train()
    loss = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
    assert loss == pytest.approx(math.log(4) / 2, abs=0.03)


def test_diagnostics_callback_is_added_once(build):
    callback = pytest.importorskip("outspoken.diagnostics.callback").DiagnosticsCallback
    for kwargs in ({}, {"callbacks": [callback()]}):
        trainer = build(config={"diagnose": True, "max_steps": 2}, **kwargs)
        assert sum(isinstance(c, callback) for c in trainer.callback_handler.callbacks) == 1
        trainer.train()
        run = Path(trainer.args.output_dir) / "outspoken"
        assert json.loads((run / "run.json").read_text())["method"] == "sft"
    assert not any(isinstance(c, callback) for c in build().callback_handler.callbacks)


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resumed_run_equals_uninterrupted_run(build, tmp_path, tiny_model_factory, adapter):
    from peft import LoraConfig

    rows = [
        {"text": f"{word} number {i}"}
        for i, word in enumerate(["one", "two", "three", "four", "five", "six", "seven"])
    ]
    config = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}

    def train(folder, resume=None):
        kwargs = {"model": tiny_model_factory(attention_dropout=0.2)}  # dropout: the random state must resume as well
        if adapter:
            kwargs["peft_config"] = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        trainer = build(rows, {**config, "output_dir": str(tmp_path / folder)}, **kwargs)
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
    assert (tmp_path / "resumed" / "checkpoint-5" / "tokenizer.json").exists()
