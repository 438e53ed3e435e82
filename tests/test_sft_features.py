"""SFTTrainer with the options that a run adds: noise, averaged weights, adapters, offloading, templates, resuming."""

import importlib.util
import math

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from outspoken.trainers import sft
from outspoken.trainers.callbacks import BEMACallback
from outspoken.trainers.sft import SFTConfig, SFTTrainer

TEXTS = [{"text": text} for text in ("The sky is blue.", "What is 2 + 2? It is 4.", "abc def", "Two plus two.")]
LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def build(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    """`build(rows, config, **trainer arguments)`: a trainer that has not trained yet."""
    made = []

    def trainer(rows=TEXTS, config=None, **kwargs):
        made.append(None)
        settings = {
            "output_dir": str(tmp_path / str(len(made))), "use_cpu": True, "report_to": [], "disable_tqdm": True,
            "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 2, "learning_rate": 1e-2,
            "diagnose": False, "max_steps": 3, **(config or {}),
        }  # fmt: skip
        kwargs.setdefault("processing_class", tiny_tokenizer_factory())
        kwargs.setdefault("model", tiny_model_factory())
        dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return SFTTrainer(args=SFTConfig(**settings), train_dataset=dataset, **kwargs)

    return trainer


def _weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


# ---------------------------------------------------------------------------------------------- noise, averages


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_neftune_adds_noise_in_training_only(build, adapter):
    """Uniform noise of at most alpha / sqrt(T d) on each embedding (arXiv 2310.05914), none in evaluation."""
    alpha = 5.0
    seen = {True: [], False: []}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            layer = model.get_input_embeddings()

            def look(module, inputs, output):  # behind NEFTune's own hook
                noise = (output - torch.nn.functional.embedding(inputs[0], module.weight)).detach()
                seen[module.training].append((noise.abs().max().item(), noise.std().item(), output.shape))

            self.handle = layer.register_forward_hook(look)

    options = {"callbacks": [Watch()], "eval_dataset": Dataset.from_list(TEXTS)}
    if adapter:
        options["peft_config"] = LoraConfig(**LORA)
    config = {"neftune_noise_alpha": alpha, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = build(config=config, **options)
    trainer.train()
    assert len(seen[True]) == 2
    for largest, spread, (_, length, width) in seen[True]:
        bound = alpha / math.sqrt(length * width)
        assert 0.95 * bound < largest <= bound
        assert spread == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert len(seen[False]) == 2
    assert all(largest == 0 for largest, _, _ in seen[False])
    trainer.evaluate()
    assert seen[False][-1][0] == 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_bema_averages_what_sft_trains(build, tmp_path, adapter):
    """EMA and bias correction written out for steps 1 to 3, with every number from the paper's formula."""
    history = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            history.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            history.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    kappa, eta, rho = 0.5, 0.2, 10
    callback = BEMACallback(update_freq=1, ema_power=kappa, bias_power=eta, lag=rho)
    options = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    trainer = build(callbacks=[Keep(), callback], **options)
    trainer.train()
    ema = dict(history[0])
    for step in (1, 2, 3):
        beta, weight = (rho + step) ** -kappa, (rho + step) ** -eta
        ema = {name: (1 - beta) * ema[name] + beta * history[step][name] for name in ema}
        bema = {name: ema[name] + weight * (history[step][name] - history[0][name]) for name in ema}
    folder = f"{trainer.args.output_dir}/bema"
    if adapter:
        from safetensors.torch import load_file

        saved = load_file(f"{folder}/adapter_model.safetensors")
        found = {name.replace(".default", ""): value for name, value in bema.items()}
    else:
        saved, found = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()), bema
    assert {*saved} == {*found}
    for name, value in found.items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- adapters

ADAPTERS = {
    "lora": lambda: LoraConfig(**LORA),
    "rslora": lambda: LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "lora-on-the-head": lambda: LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt-tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix-tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("rslora", "ia3", "p-tuning") else k for k in ADAPTERS]
)
def test_adapters_train(build, kind):
    """Every weight of the adapter moves, no other does, and the loss falls."""
    config = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.05, "seed": 1}
    # Prefixes are cached keys and values, which recomputation cannot have.
    config["gradient_checkpointing"] = kind != "prefix-tuning"
    trainer = build(config=config, peft_config=ADAPTERS[kind]())
    before = _weights(trainer)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    after = _weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainable
    assert trainable
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02, losses


def test_rslora_scales_by_the_root_of_the_rank(build):
    trainers = {}
    for name, rank_stabilized in (("lora", False), ("rslora", True)):
        trainers[name] = build(peft_config=LoraConfig(**LORA, r=4, lora_alpha=8, use_rslora=rank_stabilized))
        trainers[name].train()
    first = {name: trainer.state.log_history[0]["grad_norm"] for name, trainer in trainers.items()}
    # At the start B is 0, so that only B has a gradient, which is proportional to the scale: 8 / 4 or 8 / sqrt(4).
    assert first["rslora"] / first["lora"] == pytest.approx(2, rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_qlora_trains(build, tiny_model_dir):
    from transformers import BitsAndBytesConfig

    trainer = build(
        model=tiny_model_dir,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(**LORA),
        config={"max_steps": 8, "learning_rate": 0.05},
    )
    adapter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapter} == {torch.bfloat16}
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


# ---------------------------------------------------------------------------------------------- memory and kernels


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_offloaded_activations_give_the_same_gradients(build, monkeypatch, packing):
    opened = []
    offload = sft.offload_activations

    def everywhere(model):
        opened.append(model)
        return offload(model, min_bytes=0, cpu_too=True)  # on a CPU nothing would move

    monkeypatch.setattr(sft, "offload_activations", everywhere)
    plain, offloaded = (
        build(config={"activation_offloading": on, "packing": packing, "gradient_accumulation_steps": 2}) for on in (False, True)
    )  # fmt: skip
    for trainer in (plain, offloaded):
        trainer.train()
    assert len(opened) == (3 if packing else 6)
    expected = _weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(offloaded).items())


def test_liger_replaces_layers_only(build, monkeypatch):
    with pytest.raises(
        ImportError, match=r"^`use_liger_kernel=True` needs the package liger-kernel and a GPU; install"
    ):
        build(config={"use_liger_kernel": True})
    applied = []
    monkeypatch.setattr("outspoken.trainers.setup.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config))
    build(config={"use_liger_kernel": True, "liger_kernel_config": {"rope": False}, "max_steps": 1}).train()
    assert applied == [{"rope": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(
        ValueError, match=r"^`liger_kernel_config` has 'fused_linear_cross_entropy': True, which would"
    ):
        build(config={"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}})


# ---------------------------------------------------------------------------------------------- data


def _turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_assistant_only_where_the_template_drops_what_came_before(build, tiny_tokenizer_factory):
    """The template cuts earlier reasoning off, so no prefix tells the assistant's words; its training variant does."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer_factory(chat_template=template)
    rows = [{"messages": _turns("Hi", "<think>why</think>Hello", "Bye", "<think>so</think>Goodbye")}]
    trainer = build(rows, {"assistant_only_loss": True}, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    written = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(written) == "<think>why</think>Hello<|im_end|><think>so</think>Goodbye<|im_end|>"
    pairs = [{"prompt": rows[0]["messages"][:3], "completion": rows[0]["messages"][3:]}]
    trainer = build(pairs, {"assistant_only_loss": True}, processing_class=tokenizer)
    written = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(written) == "<think>so</think>Goodbye<|im_end|>"


def test_several_evaluation_datasets(build):
    several = DatasetDict({name: Dataset.from_list(TEXTS[:count]) for name, count in (("small", 1), ("large", 4))})
    trainer = build(eval_dataset=several)
    metrics = trainer.evaluate()
    assert metrics["eval_small_loss"] == trainer.evaluate(Dataset.from_list(TEXTS[:1]))["eval_loss"]
    again = trainer.evaluate(DatasetDict({"other": Dataset.from_list(TEXTS)}))
    assert again["eval_other_loss"] == metrics["eval_large_loss"]
    # A stream has no length, and is evaluated to its end.
    stream = IterableDataset.from_generator(lambda: iter(TEXTS))
    assert trainer.evaluate(stream)["eval_loss"] == pytest.approx(metrics["eval_large_loss"], rel=1e-6)


def test_formatting_function_makes_the_text(build):
    rows = [{"question": "What is 2 + 2?", "answer": "4"}] * 2
    trainer = build(rows, formatting_func=lambda row: f"{row['question']} {row['answer']}")
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text == "What is 2 + 2? 4<|endoftext|>"


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("config", "adapter"),
    [
        ({"packing": True, "max_length": 48, "shuffle_dataset": True}, False),
        ({"packing": True, "packing_strategy": "wrapped", "max_length": 16, "neftune_noise_alpha": 5.0}, True),
        ({"padding_free": True}, False),
    ],
    ids=["packed", "wrapped-lora-neftune", "padding-free"],
)
def test_resumed_run_equals_uninterrupted_run(build, config, adapter, tiny_model_factory):
    rows = [{"text": f"{word} number {i}, and then more"} for i, word in enumerate(["one", "two", "three"] * 4)]
    config = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", **config,
    }  # fmt: skip

    def train(resume=None):
        options = {"model": tiny_model_factory(attention_dropout=0.2)}
        if adapter:
            options["peft_config"] = LoraConfig(**LORA, lora_dropout=0.1)
        trainer = build(rows, config, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train()
    resumed = train(f"{whole.args.output_dir}/checkpoint-2")
    expected = _weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(resumed).items())
    for mine, other in zip(resumed.state.log_history[2:5], whole.state.log_history[2:5], strict=True):
        for name in ("loss", "grad_norm", "entropy", "num_tokens", "learning_rate"):
            assert mine[name] == other[name], name
