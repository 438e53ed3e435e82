"""GRPO and RLOO with prompts that have images: beside TRL's GRPOTrainer, and by themselves."""

import math
import random
import sys
import types

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from outspoken import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from outspoken.trainers import completion_scores
from outspoken.trainers.rollouts.batch import sampled_from_ids

END, IMAGE = 3, 6


def picture(seed, width=16, height=16):
    rng = random.Random(seed)
    image = Pictures.new("RGB", (width, height))
    image.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(width * height)])
    return image


def rows(several=False):
    prompts = [
        [{"role": "user", "content": text}] for text in ("What is it?", "Which colour?", "Is it round?", "Where?")
    ]
    images = [[picture(i, 16 + 8 * (i % 2))] + ([picture(i + 9)] if several and i % 2 else []) for i in range(4)]
    message = {"role": Value("string"), "content": Value("string")}
    if several:
        features = Features({"prompt": List(message), "images": List(Image())})
        return Dataset.from_dict({"prompt": prompts, "images": images}, features=features)
    features = Features({"prompt": List(message), "image": Image()})
    return Dataset.from_dict({"prompt": prompts, "image": [each[0] for each in images]}, features=features)


def spread(completion_ids, **_):
    return [(sum(ids) % 17) / 4 for ids in completion_ids]


@pytest.fixture
def common(short_run):
    return short_run | {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 7,
        "max_steps": 2,
    }


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2}])
def test_like_trl(
    tmp_path, tiny_vision_model, tiny_vision_processor, common, gradient_tape, completion_script, monkeypatch, several,
    settings,
):  # fmt: skip
    import trl

    monkeypatch.setattr(completion_scores, "needed_rows", lambda advantages, mask: torch.arange(len(mask)))
    tapes, logs, prompts = [], [], []
    for trainer_class, config_class in ((trl.GRPOTrainer, trl.GRPOConfig), (GRPOTrainer, GRPOConfig)):
        ours = trainer_class is GRPOTrainer
        tape, script = gradient_tape(), completion_script(END, first=10)
        own = {"diagnose": False, "share_prompts": False} if ours else {}
        processor = tiny_vision_processor()
        # Else TRL marks the wrong tokens of shorter prompts as parts of an image.
        processor.tokenizer.padding_side = "left"
        trainer = trainer_class(
            tiny_vision_model(),
            spread,
            config_class(str(tmp_path / config_class.__module__), **common, **settings, **own),
            rows(several),
            processing_class=processor,
            callbacks=[tape],
        )
        seen = []
        if ours:

            def generate(prompt_ids, params, seen=seen, script=script, **_):
                seen.append(prompt_ids)
                return sampled_from_ids(script(prompt_ids), [END])

            trainer.rollouts.generate = generate
        else:

            def single_turn(prompt_ids, *_, seen=seen, script=script, **__):
                seen.append([list(ids) for ids in prompt_ids])
                return script(prompt_ids), None

            trainer._generate_single_turn = single_turn
        trainer.train()
        tapes.append(tape.steps)
        prompts.append(seen)
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert prompts[0] == prompts[1]
    for theirs, mine in zip(*tapes, strict=True):
        assert theirs.keys() == mine.keys() and any("visual" in name for name in mine)
        for name in theirs:
            torch.testing.assert_close(
                mine[name], theirs[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    for theirs, mine in zip(*logs, strict=True):
        for name in ("loss", "reward", "entropy", "completions/mean_length", "num_tokens", "grad_norm"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize("trainer_class, config_class", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_it_samples_and_trains(
    tmp_path, tiny_vision_model, tiny_vision_processor, common, trainer_class, config_class
):
    seen = []

    def judge(completion_ids, image, prompts, **_):
        assert all(hasattr(each, "size") for each in image)
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    args = config_class(str(tmp_path / "run"), **common, log_completions=True, num_completions_to_print=0, beta=0.1)
    run = trainer_class(tiny_vision_model(), judge, args, rows(), processing_class=tiny_vision_processor())
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logs) and len(logs) == 2
    assert not any(IMAGE in ids for ids in seen)
    assert (tmp_path / "run" / "completions" / "completions_00002.parquet").exists()


@pytest.mark.parametrize("shown", [True, False])
def test_images_stand_in_the_table_of_completions(
    tmp_path, tiny_vision_model, tiny_vision_processor, common, monkeypatch, shown
):
    tables = []
    wandb = types.SimpleNamespace(
        run=object(),
        Image=lambda image: image.size,
        Table=lambda dataframe: dataframe,
        log=lambda what: tables.append(what["completions"]),
    )
    args = GRPOConfig(
        str(tmp_path / "run"), **(common | {"max_steps": 1}), log_completions=True, log_multimodal=shown,
        num_completions_to_print=0, shuffle_dataset=False,
    )  # fmt: skip
    run = GRPOTrainer(tiny_vision_model(), spread, args, rows(several=True), processing_class=tiny_vision_processor())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run.args.report_to = ["wandb"]
    run.train()
    (table,) = tables
    assert ("images" in table) == shown
    if shown:  # two prompts, of one image and of two
        assert table["images"].tolist() == [[(16, 16)]] * 2 + [[(24, 16), (16, 16)]] * 2


def test_texts_with_images_get_one_sentence(tmp_path, tiny_vision_model, tiny_vision_processor, common):
    data = rows().map(lambda row: {"text": "hello"}).remove_columns("prompt").rename_column("text", "prompt")
    args = GRPOConfig(str(tmp_path / "run"), **common)
    run = GRPOTrainer(tiny_vision_model(), spread, args, data, processing_class=tiny_vision_processor())
    with pytest.raises(ValueError, match="The dataset has images, but its prompts are texts; pass prompts as lists"):
        run.train()
