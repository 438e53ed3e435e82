"""A stand-in for vLLM with the parts of its surface that the trainers use: it samples for real, from a transformers model.

Like vLLM it fuses query, key and value, and gate and up; it reports log-probabilities after truncation; its scheduler is
the process. The environment plants faults: FAKE_VLLM_FORGETS (loading weights with this in their name does nothing) and
FAKE_VLLM_SLOW (seconds that each call of `generate` takes; it first touches the file FAKE_VLLM_MARK).
"""

import contextlib
import os
import random
import sys
import time
import types
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

__version__ = "0.32.0"
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED["up_proj"] = "gate_up_proj"


@dataclass
class StructuredOutputsParams:
    regex: str | None = None


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop: list | None = None
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict | None = None

    def __post_init__(self):
        if self.temperature < 1e-5 and self.n > 1:
            raise Exception(f"n must be 1 when using greedy sampling, got {self.n}.")
        if not 0 < self.top_p <= 1:
            raise Exception(f"top_p must be in (0, 1], got {self.top_p}.")


@dataclass
class EngineArgs:
    model: str = ""
    revision: str | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    model_impl: str = "auto"
    enable_sleep_mode: bool = False
    trust_remote_code: bool = False
    distributed_executor_backend: str | None = None
    seed: int = 0
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    load_format: str = "auto"
    logprobs_mode: str = "raw_logprobs"
    worker_extension_cls: str = ""
    kv_cache_dtype: str = "auto"
    speculative_config: dict | None = None


class Model(nn.Module):
    """A transformers model under vLLM's names, its weights fused."""

    def __init__(self, path, dtype, dummy):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        if dummy:
            self.inner = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        else:
            self.inner = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.places = {}  # transformers' name -> (ours, first row)
        self.tensors = {}
        for name, parameter in self.inner.named_parameters():
            piece = next((p for p in FUSED if f".{p}." in name), None)
            mine = name.replace(f".{piece}.", f".{FUSED[piece]}.") if piece else name
            before = self.tensors.get(mine)
            self.places[name] = (mine, 0 if before is None else len(before))
            value = parameter.detach().clone()
            self.tensors[mine] = value if before is None else torch.cat([before, value])

    def named_parameters(self, *args, **kwargs):
        return iter({name: nn.Parameter(t, requires_grad=False) for name, t in self.tensors.items()}.items())

    def get_submodule(self, name):
        return nn.Module()  # none of which keeps a packed copy

    def load_weights(self, weights):
        loaded = set()
        for name, tensor in weights:
            if name not in self.places:
                continue
            mine, row = self.places[name]
            if (forgets := os.environ.get("FAKE_VLLM_FORGETS")) is None or forgets not in name:
                self.tensors[mine][row : row + len(tensor)].copy_(tensor)
            loaded.add(mine)
        return loaded

    def logits(self, ids):
        with torch.no_grad():
            for name, parameter in self.inner.named_parameters():
                mine, row = self.places[name]
                parameter.copy_(self.tensors[mine][row : row + len(parameter)])
            return self.inner(torch.tensor([ids])).logits[:, -1]


class Sampler(nn.Module):
    """In the manner of vLLM's: log-probabilities are those of what is sampled from."""

    def forward(self, logits, sampling_metadata):
        sampled, logprobs = self.sample(logits.float(), sampling_metadata)
        return int(sampled), float(logprobs[0, sampled])

    def compute_logprobs(self, logits):
        return logits.log_softmax(-1)

    def sample(self, logits, sampling_metadata):
        if sampling_metadata.temperature is None:
            return logits.argmax(-1), self.compute_logprobs(logits)
        logits = logits / sampling_metadata.temperature.unsqueeze(1)
        if sampling_metadata.top_k:
            kept = logits.topk(sampling_metadata.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kept, -torch.inf)
        logprobs = self.compute_logprobs(logits)
        return torch.multinomial(logprobs.exp(), 1)[:, 0], logprobs


class Worker:
    def __init__(self, config, settings):
        self.vllm_config, self.model_config = config, config.model_config
        self.device, self.rank = torch.device("cpu"), 0
        model = Model(settings.model, config.model_config.dtype, settings.load_format == "dummy")
        self.model_runner = SimpleNamespace(sampler=Sampler(), get_model=lambda: model, vllm_config=config)


class LLM:
    def __init__(self, **settings):
        settings = EngineArgs(**settings)
        from transformers import AutoConfig, AutoTokenizer

        dtype = {"auto": torch.bfloat16}.get(settings.dtype) or getattr(torch, settings.dtype)
        torch.manual_seed(settings.seed)
        longest = settings.max_model_len or AutoConfig.from_pretrained(settings.model).max_position_embeddings
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=longest, dtype=dtype),
            parallel_config=SimpleNamespace(world_size=settings.tensor_parallel_size),
            device_config=SimpleNamespace(device_type="cpu"),
            speculative_config=settings.speculative_config,
        )
        module, _, name = settings.worker_extension_cls.rpartition(".")
        kind = type("Worker", (Worker, getattr(import_module(module), name)), {})
        self.worker = kind(config, settings)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.llm_engine = SimpleNamespace(vllm_config=config, engine_core=SimpleNamespace(shutdown=lambda: None))
        self.settings, self.calls, self.slept = settings, [], []

    def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level):
        self.slept.append(("sleep", level))

    def wake_up(self, tags):
        self.slept.append(("wake", *tags))

    def generate(self, prompts, sampling_params, use_tqdm):
        if seconds := float(os.environ.get("FAKE_VLLM_SLOW", 0)):
            Path(os.environ["FAKE_VLLM_MARK"]).touch()
            time.sleep(seconds)
        self.calls.append((prompts, sampling_params))
        random.random()
        return [
            SimpleNamespace(outputs=[self._complete(prompt["prompt_token_ids"], params) for _ in range(params.n)])
            for prompt, params in zip(prompts, sampling_params)
        ]

    def _complete(self, prompt, params):
        runner, ids, logprobs, reason = self.worker.model_runner, [], [], "length"
        temperature = None if params.temperature < 1e-5 else torch.tensor([params.temperature])
        metadata = SimpleNamespace(temperature=temperature, top_k=params.top_k, max_num_logprobs=0)
        while len(ids) < params.max_tokens:
            logits = runner.get_model().logits(prompt + ids)
            token, logprob = runner.sampler(logits=logits, sampling_metadata=metadata)
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=logprob)})
            text = self.tokenizer.decode(ids) if params.stop else ""
            if token in params.stop_token_ids or any(stop in text for stop in params.stop or ()):
                reason = "stop"
                break
        return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)


def _module(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


_module("vllm.config", set_current_vllm_config=lambda config: contextlib.nullcontext())
_module("vllm.sampling_params", StructuredOutputsParams=StructuredOutputsParams)
_module("vllm.distributed", cleanup_dist_env_and_memory=lambda: None)
_module("vllm.model_executor")
_module("vllm.model_executor.model_loader")
_module(
    "vllm.model_executor.model_loader.reload",
    initialize_layerwise_reload=lambda model: None,
    finalize_layerwise_reload=lambda model, config: None,
)
