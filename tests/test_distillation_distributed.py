"""Distillation in two processes on the CPU, over gloo: what one process does with a batch, two do with half of it each.

Run as a script it is the worker: `python tests/test_distillation_distributed.py FOLDER` trains every variant, alone or
started twice by accelerate.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BATCH, STEPS = 4, 3
SPREAD = {"ddp": "ddp_cpu", "fsdp1": "fsdp1", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # where `make test-all` puts it, beside the environment
# Variant -> the config's settings. The dataset's completions are the same for one process and two; samples are not.
VARIANTS = {
    "dense": {"lmbda": 0.0, "beta": 0.5},
    # An adapter on the head, which is called on slices: the processes have different numbers of tokens, so of slices.
    "head": {"lmbda": 0.0, "beta": 1.0, "lora": True, "max_slice_logits": 3000},
    "top_k": {"lmbda": 0.0, "beta": 0.0, "teacher_top_k": 5},
    "mix": {"lmbda": 0.5, "beta": 1.0, "max_completion_length": 6},
}
SAME = [name for name, settings in VARIANTS.items() if settings["lmbda"] == 0.0]


# ---------------------------------------------------------------------- the worker


def words(i):
    """Texts of different lengths, so that the processes' batches are not alike."""
    return " ".join(["sky", "blue", "green", "grass", "seven"][(i + j) % 5] for j in range(1 + i * 7 % 9))


def tiny(seed, width):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, eos_token_id=0, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretend_to_have_devices():
    """Accelerate shards models over accelerators only, though torch and DeepSpeed also do over the CPU's processes."""
    import torch.distributed.fsdp as fsdp
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    for kind in (fsdp.FullStateDictConfig, fsdp.FullOptimStateDictConfig):
        kind.offload_to_cpu = property(lambda self: False, lambda self, value: None)


def train(variant, folder, model_dir, teacher_dir):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from outspoken.trainers import distillation
    from outspoken.trainers.losses.distillation import label_divergence

    own = dict(VARIANTS[variant])
    lora, limit = own.pop("lora", False), own.pop("max_slice_logits", 2**26)
    distillation.label_divergence = functools.partial(label_divergence, max_slice_logits=limit)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = distillation.DistillationConfig(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // world, gradient_accumulation_steps=2,
        per_device_eval_batch_size=BATCH // world, adam_epsilon=1e-2, learning_rate=0.05, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=not sharded, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, seed=3, **{"max_completion_length": 40, **own},
    )  # fmt: skip
    rows = [{"prompt": f"What {words(i)}?", "completion": f" It is {words(3 * i + 1)}."} for i in range(32)]
    trainer = distillation.DistillationTrainer(
        model=model_dir,
        teacher_model=teacher_dir,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    trainer.evaluate()
    if not (lora and trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        kind = str(trainer.accelerator.distributed_type)
        (folder / "result.json").write_text(json.dumps({"history": trainer.state.log_history, "kind": kind}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    torch.manual_seed(0)


def main(folder, model_dir, teacher_dir):
    import torch

    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        pretend_to_have_devices()
    for variant in VARIANTS:
        out = Path(folder, variant)
        out.mkdir(parents=True, exist_ok=True)
        try:
            train(variant, out, model_dir, teacher_dir)
        except Exception:
            (out / f"error-{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
            raise


# ---------------------------------------------------------------------- the tests


def launch(spread, folder, model_dir, teacher_dir):
    import yaml

    from outspoken.cli.env import accelerate_config

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTSPOKEN_LOG": "off", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, str(folder), model_dir, teacher_dir]
    if spread is not None:
        config = yaml.safe_load(accelerate_config(SPREAD[spread]).read_text())
        config |= {"num_processes": 2, "mixed_precision": "no"}
        for option in ("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"):
            if option in config.get("fsdp_config", {}):
                config["fsdp_config"][option] = False
        file = folder / "accelerate.yaml"
        file.write_text(yaml.safe_dump(config))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
        command = [sys.executable, *launcher, *command[1:]]
        if spread.startswith("zero"):
            environment["DS_ACCELERATOR"] = "cpu"
            if DEEPSPEED.is_dir():
                environment["PYTHONPATH"] = os.pathsep.join([str(DEEPSPEED), environment.get("PYTHONPATH", "")])
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="session")
def ran(once, tiny_tokenizer):
    """`ran(spread, variant)`: the folder that a variant's run left."""

    def models(folder):
        for name, seed, width in (("student", 1, 32), ("teacher", 2, 48)):
            tiny(seed, width).save_pretrained(folder / name)
            tiny_tokenizer.save_pretrained(folder / name)

    def find(spread, variant):
        made = once("distillation-models", models)
        folder = once(
            f"distillation-{spread}",
            lambda folder: launch(spread, folder, str(made / "student"), str(made / "teacher")),
        )
        found = folder / variant
        if not (found / "result.json").exists():
            told = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("*/error-*.txt")))
            pytest.fail(f"{variant} left no result. {told or (folder / 'log.txt').read_text()[-3000:]}")
        return found

    return find


@pytest.fixture(params=SPREAD)
def spread(request):
    if request.param.startswith("zero") and not (DEEPSPEED.is_dir() or find_spec("deepspeed")):
        pytest.skip("deepspeed is not installed; `make test-all` installs it where it can")
    return request.param


def history(folder):
    return json.loads((folder / "result.json").read_text())["history"]


def weights(folder):
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("variant", SAME)
def test_two_processes_are_like_one(ran, spread, variant):
    import torch

    one, two = ran(None, variant), ran(spread, variant)
    assert json.loads((two / "result.json").read_text())["kind"] != "DistributedType.NO"
    compared = set()
    for entry, other in zip(history(one), history(two), strict=True):
        # Micro-batches hold other rows, so means of their means differ a little; what is of the whole step does not.
        for name in {"loss", "grad_norm", "num_tokens", "eval_loss"} & entry.keys():
            if name == "grad_norm" and spread != "ddp":
                continue
            assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=1e-5), (entry["step"], name)
            compared.add(name)
        for name in (name for name in entry if "distillation/" in name or name == "entropy"):
            assert other[name] == pytest.approx(entry[name], rel=0.2, abs=0.1), (entry["step"], name)
    assert {"loss", "num_tokens", "eval_loss"} <= compared
    expected = weights(one / "model")
    if spread == "fsdp1" and variant == "head":
        return  # FSDP1 gathers an adapter with its full state, which fails on a CPU
    found = weights(two / "model")
    if variant == "head":
        # Beside an adapter on the head peft also saves the head, but not from what is sharded.
        found, expected = ({n: v for n, v in each.items() if "lora_" in n} for each in (found, expected))
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_mix_of_samples_and_data(ran, spread):
    rows = [row for row in history(ran(spread, "mix")) if "loss" in row]
    expected = [row["distillation/on_policy"] for row in history(ran(None, "mix")) if "loss" in row]
    assert [row["distillation/on_policy"] for row in rows] == expected
    assert {*expected} == {0.0, 1.0}
    assert all(row["loss"] > 0 for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
