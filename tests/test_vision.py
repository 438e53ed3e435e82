"""Models that see: batches with images, and their supervised training beside TRL's, on a tiny Qwen2.5-VL."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from outspoken.trainers.data.vision import DataCollatorForVisionLanguageModeling, DataCollatorForVisionPreference
from outspoken.trainers.dpo import DPOConfig, DPOTrainer
from outspoken.trainers.sft import SFTConfig, SFTTrainer

Image = pytest.importorskip("PIL.Image")
trl = pytest.importorskip("trl")

# A token is 2 x 2 patches of 4 x 4 pixels, so an image of 16 x 16 pixels has 4 tokens.
TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
          "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% for b in m['content'] %}{{ b['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{% for b in m['content'] %}"
    "{% if b['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ b['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def processor_class():
    from transformers import Qwen2VLProcessor

    class StillsProcessor(Qwen2VLProcessor):
        """Qwen's processor without videos, which need torchvision."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    return StillsProcessor


@pytest.fixture
def processor(processor_class):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["What is this? A red square. It is blue."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TOKENS[0], pad_token=TOKENS[1], additional_special_tokens=TOKENS[2:]
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=32 * 32
    )
    return processor_class(images, tokenizer, chat_template=TEMPLATE)


@pytest.fixture
def tiny_vlm(processor):
    """`tiny_vlm()`: a new Qwen2.5-VL of two layers, the same each time."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def build():
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1,
                "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            },
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16,
                "fullatt_block_indexes": [1], "in_channels": 3, "initializer_range": 0.1,
            },
            **{
                f"{name}_token_id": TOKENS.index(token)
                for name, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>"),
                                    ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"))
            },
        )  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(config)

    return build


def picture(seed, width=16, height=16):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def chats():
    return [
        {"images": [picture(0)], "messages": turns("What is this?", "A red square.")},
        {"images": [picture(1), picture(2, 32)], "messages": turns("And these?", "Blue.", "Sure?", "It is.")},
        {"images": [picture(3)], "messages": turns("What color is this one, please?", "Green.")},
    ]


def pairs():
    return [
        {
            "image": picture(0),
            "prompt": turns("What is this?"),
            "completion": [{"role": "assistant", "content": "Red."}],
        },
        {
            "image": picture(1, 32),
            "prompt": turns("Is this blue?"),
            "completion": [{"role": "assistant", "content": "No, it is not blue at all."}],
        },
    ]


SEE = "<|vision_start|><|image_pad|><|vision_end|>"


def texts():
    return [
        {"images": [picture(0)], "text": f"{SEE}This is red.<|endoftext|>"},
        {"images": [picture(1), picture(2)], "text": f"{SEE}{SEE}These are blue, both.<|endoftext|>"},
    ]


def text_pairs():
    return [
        {"image": picture(0), "prompt": f"{SEE}What is this?", "completion": " Red.<|endoftext|>"},
        {"image": picture(1), "prompt": f"{SEE}This?", "completion": " That is a green square.<|endoftext|>"},
    ]


def preferences():
    def row(images, asked, chosen, rejected):
        answers = {"chosen": chosen, "rejected": rejected}
        said = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
        return {"images": images, "prompt": turns(asked), **said}

    return [
        row([picture(0)], "What is this?", "It is red.", "Blue."),
        row([picture(1), picture(2, 32)], "Same?", "No.", "It is a large green square."),
    ]


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (chats, {}),
        (chats, {"assistant_only_loss": True}),
        (chats, {"pad_to_multiple_of": 16}),
        (chats, {"max_length": 30}),
        (pairs, {}),
        (pairs, {"completion_only_loss": True}),
        (pairs, {"completion_only_loss": True, "max_length": 31}),
        (texts, {}),
        (text_pairs, {"completion_only_loss": True}),
    ],
    ids=["chats", "assistant", "multiple", "cut", "pairs", "completions", "cut-completions", "texts", "text-pairs"],
)
def test_batches_equal_trl(processor, rows, settings):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling as Theirs

    if settings.get("max_length") == 30:  # TRL cuts into the images of the longer row there
        rows = lambda every=rows: every()[:1] + every()[2:]  # noqa: E731
    ours = DataCollatorForVisionLanguageModeling(processor, **settings)(rows())
    theirs = Theirs(processor, **settings)(rows())
    assert {*ours} == {*theirs}
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_row_read_by_hand(processor):
    rows = pairs()[:1]
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, pad_to_multiple_of=40)(rows)
    decode = processor.tokenizer.decode
    assert decode(batch["input_ids"][0]).replace("<|pad|>", "") == (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n"
    )
    assert decode(batch["labels"][0][batch["labels"][0] != -100]) == "Red.<|im_end|>\n"
    assert batch["input_ids"].shape == (1, 40)
    assert batch["pixel_values"].shape == (16, 3 * 2 * 4 * 4)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert rows[0].keys() == {"image", "prompt", "completion"}  # as they were


def test_preference_batches_equal_trl(processor):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference as Theirs

    for settings in ({}, {"max_length": 48}):
        ours = DataCollatorForVisionPreference(processor, **settings)(preferences())
        theirs = Theirs(processor, **settings)(preferences())
        assert {*ours} - {*theirs} == ({"truncated"} if settings else set())
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert ours["truncated"].tolist() == [False, False, False, True]

    standard = [{"image": picture(0), "prompt": f"{SEE}What?", "chosen": " Red.", "rejected": " A blue one."}]
    batch = DataCollatorForVisionPreference(processor)(standard)
    written = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"])]
    assert [processor.tokenizer.decode(ids) for ids in written] == [" Red.<|endoftext|>", " A blue one.<|endoftext|>"]


def test_text_without_its_end_gets_one(processor):
    row = {"images": [picture(0)], "text": f"{SEE}This is red."}
    ended = DataCollatorForVisionLanguageModeling(processor)([row])["input_ids"]
    assert processor.tokenizer.decode(ended[0]).endswith("red.<|endoftext|>")


def test_images_where_the_blocks_say(processor):
    content = [
        {"type": "text", "text": "First "},
        {"type": "image"},
        {"type": "text", "text": " then "},
        {"type": "image"},
    ]
    rows = [
        {"images": [picture(0), picture(1)], "messages": [{"role": "user", "content": content}]},
        {"images": None, "messages": turns("No image here.", "No.")},
    ]
    batch = DataCollatorForVisionLanguageModeling(processor)(rows)
    assert "First <|vision_start|><|image_pad|>" in processor.tokenizer.decode(batch["input_ids"][0])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    alone = DataCollatorForVisionLanguageModeling(processor)(rows[1:])
    assert {*alone} == {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture
def build(tmp_path, tiny_vlm, processor):
    """`build(rows, trainer="ours", options={}, **config)`: a trainer that has not trained yet."""

    def make(rows, trainer="ours", options=None, **config):
        config_class, trainer_class = {
            "ours": (SFTConfig, SFTTrainer),
            "trl": (trl.SFTConfig, trl.SFTTrainer),
            "our dpo": (DPOConfig, DPOTrainer),
            "trl dpo": (trl.DPOConfig, trl.DPOTrainer),
        }[trainer]
        extra = {"diagnose": False} if "our" in trainer else {}
        settings = {
            "output_dir": str(tmp_path / trainer), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2,
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **extra, **config,
        }  # fmt: skip
        return trainer_class(
            tiny_vlm(),
            args=config_class(**settings),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            **({"ref_model": tiny_vlm()} if trainer == "trl dpo" else {}),  # which loads it from a path
            **{"processing_class": processor, **(options or {})},
        )

    return make


def _assert_same(ours, theirs, names=("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")):
    for trainer in (ours, theirs):
        trainer.train()
    mine = [entry for entry in ours.state.log_history if "loss" in entry]
    other = [entry for entry in theirs.state.log_history if "loss" in entry]
    for a, b in zip(mine, other, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (chats, {"assistant_only_loss": True}),
        (pairs, {}),
        pytest.param(chats, {}, marks=pytest.mark.slow),
        pytest.param(pairs, {"completion_only_loss": False}, marks=pytest.mark.slow),
        pytest.param(
            texts, {"remove_unused_columns": False, "per_device_train_batch_size": 1}, marks=pytest.mark.slow
        ),
        pytest.param(text_pairs, {"loss_type": "dft"}, marks=pytest.mark.slow),
    ],
    ids=["assistant", "pairs", "chats", "whole-pairs", "texts", "text-pairs"],
)
def test_training_equals_trl(build, rows, config):
    ours = build(rows(), **config)
    before = {name: parameter.clone() for name, parameter in ours.model.named_parameters()}
    _assert_same(ours, build(rows(), "trl", **config))
    moved = {name for name, parameter in ours.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("visual" in name for name in moved)
    assert any("language_model" in name for name in moved)


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "ipo", "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["sigmoid", "with-sft", "ipo"],
)
def test_preference_training_equals_trl(build, config):
    names = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", "num_tokens")  # fmt: skip
    settings = {"beta": 0.5, "per_device_train_batch_size": 1, **config}
    _assert_same(build(preferences(), "our dpo", **settings), build(preferences(), "trl dpo", **settings), names)


def test_preferences_of_an_adapter_and_their_evaluation(build):
    from peft import LoraConfig

    options = {
        "peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "eval_dataset": Dataset.from_list(preferences()),
    }
    trainer = build(preferences(), "our dpo", options, max_steps=3, learning_rate=1.0)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate(Dataset.from_list(preferences()))
    assert before["eval_rewards/margins"] == 0
    assert after["eval_rewards/margins"] > 0
    assert after["eval_loss"] < before["eval_loss"]


def test_preferences_in_text_of_a_model_that_sees(build):
    rows = [{name: value for name, value in row.items() if name != "images"} for row in preferences()]
    settings = {"max_steps": 1, "beta": 0.5}
    _assert_same(build(rows, "our dpo", **settings), build(rows, "trl dpo", **settings), ("loss", "logps/chosen"))


def test_evaluation_and_streams(build):
    def metrics(prediction):
        return {"tokens": int((prediction.label_ids != -100).sum())}

    options = {"eval_dataset": {"one": Dataset.from_list(pairs())}, "compute_metrics": metrics}
    stream = IterableDataset.from_generator(lambda: iter(pairs()))
    trainer = build(stream, options=options, max_steps=1)
    trainer.train()
    found = trainer.evaluate()
    # "Red." and "No, it is not blue at all.", each with its end of turn and line.
    tokenizer = trainer.processing_class.tokenizer
    expected = sum(len(tokenizer(row["completion"][0]["content"] + "<|im_end|>\n")["input_ids"]) for row in pairs())
    assert found["eval_one_tokens"] == expected
    fresh = trainer.evaluate(Dataset.from_list(pairs()))
    assert fresh["eval_loss"] == pytest.approx(found["eval_one_loss"], rel=1e-6)


def test_a_model_that_sees_learns_from_text(build, tiny_vlm):
    """Rows without images, whose template wants contents as blocks."""
    rows = [{"messages": turns("What is this?", "A square.")}, {"messages": turns("Hi", "Hello, you.")}]
    _assert_same(build(rows), build(rows, "trl"))
    ours = build(rows, assistant_only_loss=True, max_steps=1)
    labels = ours.train_dataset[0]["labels"]
    decode = ours.processing_class.tokenizer.decode
    assert decode([label for label in labels if label != -100]) == "A square.<|im_end|>"


@pytest.mark.slow
def test_packed_text_of_a_model_that_sees(build):
    rows = [{"messages": turns("What is this?", "A square.")}, {"messages": turns("Hi", "Hello, you.")}]
    packed, padded = (build(rows, max_steps=1, **how) for how in ({"packing": True, "max_length": 128}, {}))
    assert len(packed.train_dataset) == 1
    _assert_same(packed, padded)


def test_adapter_and_checkpoint(build, tmp_path):
    from peft import LoraConfig

    options = {"peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")}
    trainer = build(pairs(), options=options, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "ours" / "checkpoint-1" / "adapter_model.safetensors").exists()
    assert (tmp_path / "ours" / "checkpoint-1" / "processor_config.json").exists()
    assert (tmp_path / "ours" / "checkpoint-1" / "chat_template.jinja").exists()


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (chats, {"packing": True}, "`packing=True` does not work with images; set it to False."),
        (chats, {"padding_free": True}, "`padding_free=True` does not work with images; set it to False."),
        (
            chats,
            {"truncation_mode": "keep_end"},
            "`truncation_mode='keep_end'` would cut images off, which stand at the beginning; use 'keep_start', or set "
            "`max_length=None`.",
        ),
        (
            chats,
            {"completion_only_loss": True},
            "`completion_only_loss=True` needs columns 'prompt' and 'completion', and the train dataset has 'images', "
            "'messages'; leave it unset.",
        ),
        (
            lambda: [{"images": [picture(0)], "messages": []}],
            {},
            "Row 0 of the train dataset, column 'messages': the conversation has no messages; drop the row.",
        ),
    ],
)
def test_mistakes_are_told_at_once(build, rows, config, message):
    with pytest.raises(ValueError) as error:
        build(rows(), **config)
    assert str(error.value) == message


def test_reference_scores_need_the_images_again(build):
    with pytest.raises(
        ValueError, match=r"^`precompute_ref_log_probs=True` does not work with images; set it to False"
    ):
        build(preferences(), "our dpo", precompute_ref_log_probs=True)


@pytest.mark.parametrize(("trainer", "rows"), [("ours", chats), ("our dpo", preferences)])
def test_images_in_evaluation_only(build, trainer, rows):
    blind = [{name: value for name, value in row.items() if name != "images"} for row in rows()]
    with pytest.raises(ValueError) as error:
        build(blind, trainer, options={"eval_dataset": Dataset.from_list(rows())})
    assert str(error.value) == (
        "The eval dataset has a column 'images', but the train dataset has no images; remove the column, or train with "
        "images, too."
    )


@pytest.mark.parametrize(("trainer", "rows"), [("ours", chats), ("our dpo", preferences)])
def test_a_tokenizer_does_not_see(build, processor, trainer, rows):
    with pytest.raises(ValueError) as error:
        build(rows(), trainer, options={"processing_class": processor.tokenizer})
    assert str(error.value) == (
        "The train dataset has a column of images, but TokenizersBackend is a tokenizer, which cannot prepare them; "
        "pass a model that sees and its processor, or remove the column."
    )


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (
            chats,
            {"max_length": 8},
            "`max_length=8` would cut off a part of an image: in a row of LENGTH tokens the images end at token 11; raise "
            "`max_length` to more than that, set it to None, or make the images smaller.",
        ),
        (
            pairs,
            {"assistant_only_loss": True},
            "`assistant_only_loss=True` needs a column 'messages' where there are images, not 'prompt' and "
            "'completion'; set it to False, and the loss is on the completions.",
        ),
        (
            lambda: [{"images": [picture(0)], "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
            {},
            "The conversation has 0 places for images, but 1 images are given; give one image for each place.",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_when_their_row_comes(build, rows, config, message):
    with pytest.raises(ValueError) as error:
        build(rows()[:1], **config, per_device_train_batch_size=1).train()
    assert re.sub(r"row of \d+", "row of LENGTH", str(error.value)) == message
