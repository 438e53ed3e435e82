"""One of two processes that gather trained weights and share a vLLM server: started by tests/test_vllm_backend.py.

`python tests/vllm_worker.py weights SPREAD MODEL FOLDER`, `… sample URL MODEL FOLDER` or `… colocate TP MODEL FOLDER`; what
each found is written to FOLDER/RANK.json.
"""

import copy
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from outspoken.trainers.measuring import is_raised_together
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.rollouts.vllm_backend import VLLMBackend
from outspoken.trainers.rollouts.vllm_weights import Checksum, trained_weights

ADAPTERS = {
    "none": None,
    "lora": {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "r": 4, "lora_alpha": 12},
    "rest": {"target_modules": ["v_proj"], "r": 2, "use_rslora": True, "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj"], "r": 2, "use_dora": True},
}


def adapted(folder, kind):
    """A model with adapters that do something, the same in every process."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if ADAPTERS[kind] is not None:
        model = get_peft_model(model, LoraConfig(**ADAPTERS[kind]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def expected(model):
    model = copy.deepcopy(model)
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return dict(merged.named_parameters())


def spread_out(model, spread):
    if spread == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if spread == "fsdp2":
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module)
        return fully_shard(model)
    if spread == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def digest(model):
    checksum = Checksum()
    for name, tensor in trained_weights(model):
        checksum.add(name, tensor)
    return checksum.hex


def weights(spread, folder):
    found = {}
    for kind in ADAPTERS:
        model = adapted(folder, kind)
        want = expected(model)
        wrapped = spread_out(model, spread)
        try:
            got = {name: tensor.clone() for name, tensor in trained_weights(wrapped)}
        except NotImplementedError as error:
            found[kind] = {"refused": str(error)}
            continue
        found[kind] = {
            "missing": sorted(want.keys() - got.keys()),
            "unknown": sorted(got.keys() - want.keys()),
            "off": max(float((got[name] - want[name]).abs().max()) for name in want.keys() & got.keys()),
            "digests": [digest(wrapped), digest(wrapped)],
        }
    return found


def config(**own):
    return SimpleNamespace(
        **{
            "vllm_mode": "server",
            "vllm_model_impl": "vllm",
            "vllm_server_base_url": None,
            "vllm_server_host": "",
            "vllm_server_port": 0,
            "vllm_server_timeout": 3.0,
            "vllm_group_port": 0,
            "vllm_structured_outputs_regex": None,
            "vllm_enable_sleep_mode": False,
            "vllm_tensor_parallel_size": 1,
            "vllm_gpu_memory_utilization": 0.05,
            "vllm_max_model_length": 64,
            "bf16": False,
            "fp16": False,
            **own,
        }
    )


def colocate(size, folder, accelerator):
    """Two processes with vLLM in them: prompts are uneven, weights are pushed after a change."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = config(vllm_mode="colocate", vllm_tensor_parallel_size=int(size))
    backend = VLLMBackend(model, AutoTokenizer.from_pretrained(folder), args, accelerator)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    report = backend.push_weights(model, 1)
    prompts = [[[5, 6, 7, 8], [9, 10]], [[9, 10], [9, 10], [4]]][accelerator.process_index]
    sampled = backend.generate(prompts, SamplingParams(6, temperature=0.0)).completion_ids
    wanted = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=6, eos_token_id=None)[0, len(p) :].tolist()
        for p in prompts
    ]
    random = backend.generate([[5, 6]] * 4, SamplingParams(8)).completion_ids
    error, together = None, None
    try:
        backend.generate(prompts, SamplingParams(6, extra={"top_q": 1} if accelerator.is_main_process else {}))
    except Exception as problem:
        error, together = f"{type(problem).__name__}: {problem}", is_raised_together(problem)
    return {
        "compared": report.compared,
        "differing": report.differing,
        "checksum": report.checksum,
        "greedy": [sampled, wanted],
        "random": random,
        "error": error,
        "together": together,
    }


def sample(url, folder, accelerator):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rank = accelerator.process_index
    backend = VLLMBackend(model, AutoTokenizer.from_pretrained(folder), config(vllm_server_base_url=url), accelerator)
    report = backend.push_weights(model, 1)
    prompts = [[[5, 6], [7, 8, 9], [7, 8, 9]], [[7, 8, 9], [4]]][rank]
    sampled = backend.generate(prompts, SamplingParams(6, temperature=0.0), caps=[3, 6, 6] if rank == 0 else [6, 2])
    none = backend.generate([] if rank == 0 else [[5, 6]], SamplingParams(2, temperature=0.0))
    errors, together = [], []
    for settings in ({"extra": {"top_q": 1}}, {}):
        if not settings:
            Path(os.environ["STOP"]).touch()  # the test ends the server
            while Path(os.environ["STOP"]).exists():
                pass
        try:
            backend.generate(prompts, SamplingParams(6, **settings))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            together.append(is_raised_together(error))
    return {
        "checksum": report.checksum,
        "completions": sampled.completion_ids,
        "logps": sampled.logps,
        "few": none.completion_ids,
        "errors": errors,
        "together": together,
    }


if __name__ == "__main__":
    task, what, folder, out = sys.argv[1:]
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if task == "weights":
        result = weights(what, folder)
    else:
        result = {"sample": sample, "colocate": colocate}[task](what, folder, accelerator)
    (Path(out) / f"{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
