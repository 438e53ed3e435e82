"""Sampling with vLLM: inside the trainer's process (`vllm_mode="colocate"`) or on a server (`vllm_mode="server"`).

A trainer calls three things: `push_weights` after each update of its model, `generate`, and `close`. Every process of the
run must make the same calls.
"""

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from outspoken.trainers.measuring import raise_together
from outspoken.trainers.rollouts.batch import Sampled
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.rollouts.vllm_client import ServerUnavailable, VLLMClient, WeightsLost
from outspoken.trainers.rollouts.vllm_engine import VLLMEngine, model_source, own_randomness, require_vllm
from outspoken.trainers.rollouts.vllm_weights import Checksum, Sums, differences, groups_of, sums, trained_weights
from outspoken.trainers.sharding import unwrapped

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OUTAGES = 5  # so often a server may go away during one call
_READ_BACK = 1 << 27  # so many numbers of the weights are read back from vLLM at each push, in turn


@dataclass(frozen=True)
class PushReport:
    """What one push of the weights did.

    Attributes:
        version: the version of the weights that vLLM now holds.
        pushed: False where it held them already; the rest then tells of the push that brought them.
        checksum: order-independent digest, in hex, of the tensors as they arrived; the same as of those sent.
        tensors, bytes: how much was sent.
        compared: how many of vLLM's weights (fused ones count as one) were read back and compared.
        differing: those that are not the trained ones, described; should be empty.
        seconds: from the first tensor to the last comparison.
        restarts: how often the server went away and the push began anew.
    """

    version: int
    pushed: bool
    checksum: str
    tensors: int
    bytes: int
    compared: int
    differing: tuple[str, ...]
    seconds: float
    restarts: int = 0

    def metrics(self) -> dict[str, float]:
        """Signals to log; the checksum as the number of its first 48 bits."""
        return {
            "weights/checksum": float(int(self.checksum[:12], 16)),
            "weights/version": float(self.version),
            "weights/push_seconds": self.seconds,
            "weights/compared": float(self.compared),
            "weights/differing": float(len(self.differing)),
        }


class VLLMBackend:
    """Samples with vLLM, from weights that are proven to be the trained ones.

    Args:
        model: the trained model, as the accelerator prepared it (DDP, FSDP, ZeRO), with or without adapters.
        tokenizer: its tokenizer.
        args: the trainer's config; the fields `vllm_*` are read when the backend is built, other sampling settings come
            with each call.
        accelerator: of the trainer.

    Raises:
        ImportError: vLLM is not installed, or too old, where it is needed (colocated).
        ConnectionError: no server answered within `vllm_server_timeout` seconds.
        ValueError: a setting that does not fit the others.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, args: Any, accelerator: Any):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.accelerator = accelerator
        self.report: PushReport | None = None
        self.exact_logps = True
        self._version = 0
        self._held: int | None = None  # version of the weights that the engine holds
        self._asleep = False
        self._turn = 0  # which weights are read back next
        self._run = secrets.token_hex(4)
        self._said: set[str] = set()
        self._tp_group: Any = None
        self._engine: VLLMEngine | None = None
        self._client: VLLMClient | None = None
        if args.vllm_mode == "colocate":
            self._colocate()
        elif args.vllm_mode == "server":
            self.exact_logps = self._main_process_does(self._connect)
        else:
            raise ValueError(f"vllm_mode is {args.vllm_mode!r}; it must be 'colocate' or 'server'.")

    # ------------------------------------------------------------------------------------------------------- set-up

    def _colocate(self) -> None:
        args, accelerator = self.args, self.accelerator
        require_vllm("vllm_mode='colocate'")
        world, size = accelerator.num_processes, args.vllm_tensor_parallel_size
        if world % size:
            raise ValueError(
                f"vllm_tensor_parallel_size is {size}, which does not divide the {world} processes; choose one that does."
            )
        on_cpu = accelerator.device.type == "cpu"
        if args.vllm_enable_sleep_mode and on_cpu:
            raise ValueError("vllm_enable_sleep_mode frees GPU memory, but this run is on the CPU; set it to False.")
        if size > 1:
            groups = [list(range(first, first + size)) for first in range(0, world, size)]
            self._tp_group, _ = dist.new_subgroups_by_enumeration(groups)
        inner = unwrapped(self.model)
        base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        path, source = model_source(base, self.tokenizer)
        dtype = _engine_dtype(args, base)
        settings: dict[str, Any] = {
            "model": path,
            "dtype": str(dtype).removeprefix("torch."),
            "tensor_parallel_size": size,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
            "max_model_len": args.vllm_max_model_length,
            "model_impl": args.vllm_model_impl,
            "enable_sleep_mode": args.vllm_enable_sleep_mode,
            "trust_remote_code": bool(getattr(args, "trust_remote_code", False)),
            # One engine per process, which finds its tensor-parallel peers in the trainer's process group.
            "distributed_executor_backend": "external_launcher",
            "seed": accelerator.process_index // size,
            "enforce_eager": on_cpu,
            **source,
        }
        error = None
        with own_randomness(), _launched(accelerator):
            try:
                self._engine = VLLMEngine(**settings)
            except Exception as problem:
                error = problem
        raise_together(accelerator, error)
        assert self._engine is not None
        self.exact_logps = self._engine.exact_logps
        self._dtype = dtype
        if args.vllm_enable_sleep_mode:
            self.sleep()

    def _connect(self) -> bool:
        """Find the server; whether its log-probabilities are exact."""
        args = self.args
        self._client = VLLMClient(
            base_url=args.vllm_server_base_url,
            host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            group_port=args.vllm_group_port,
            connection_timeout=args.vllm_server_timeout,
        )
        self._meet()
        return bool(self._client.info.get("exact_logps", True))

    def _meet(self) -> None:
        """Set up how weights go to the server: over NCCL where both sides have a GPU, else in requests."""
        client = self._client
        assert client is not None
        self._dtype = getattr(torch, client.info["dtype"])
        client.drop_dead_communicator()
        on_gpu = self.accelerator.device.type == "cuda" and client.info.get("device") == "cuda"
        if on_gpu and client.communicator is None:
            try:
                require_vllm("A push over NCCL")
            except ImportError as error:
                self._say_once(f"{error} Until then weights go to the server over HTTP, which is slower.")
                return
            client.init_communicator(self.accelerator.device)

    # ----------------------------------------------------------------------------------------------------- sampling

    def generate(
        self,
        prompt_ids: list[list[int]],
        params: SamplingParams,
        *,
        caps: list[int] | None = None,
        images: list[list[Any] | None] | None = None,
    ) -> Sampled:
        """Sample one completion per entry of `prompt_ids`; equal neighbours are one request for several completions.

        The log-probabilities are those that `Sampled` promises; None under structured outputs, and, with a vLLM that cannot
        be made to give them, where top-k, top-p, min-p or penalties are on. Entropies are not kept.

        Args:
            prompt_ids: token ids of each prompt; the processes may have different numbers of them.
            params: how to sample; `extra` are fields of vLLM's `SamplingParams`.
            caps: limits of new tokens per prompt.
            images: for each prompt its PIL images, or None.

        Raises:
            ValueError: a setting that vLLM does not know or take, or a prompt that does not fit.
            ConnectionError: the server went away and did not return within `vllm_server_timeout` seconds.
        """
        if self._held is None or self._held != self._version:
            self.push_weights(self.model, self._version)
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**31 - 1, (1,)))  # so that a resumed run samples what the first one would have
        if self._engine is not None:  # processes whose generators stand alike must not sample alike
            seed += 1_000_003 * (self.accelerator.process_index // self.args.vllm_tensor_parallel_size)
        limits = list(caps) if caps is not None else [params.max_new_tokens] * len(prompt_ids)
        pictures = list(images) if images is not None else [None] * len(prompt_ids)
        settings = self._settings(params)
        mine = (prompt_ids, limits, pictures, seed, settings)
        answer = self._generate_here(mine) if self._engine is not None else self._generate_there(mine)
        masked = settings.get("structured_outputs") is not None
        logps = answer["logps"] if (self.exact_logps and not masked) or _untruncated(settings) else None
        if logps is None:
            cause = "under structured outputs" if masked else "after top-k, top-p, min-p and penalties"
            self._say_once(
                f"vLLM gives only log-probabilities {cause} here, which are not the model's, so none are kept; a correction "
                "by importance sampling needs sampling without."
            )
        return Sampled(answer["completion_ids"], answer["finished"], logps)

    def _settings(self, params: SamplingParams) -> dict[str, Any]:
        """Fields of vLLM's `SamplingParams`."""
        settings: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p or 0.0,
            "repetition_penalty": params.repetition_penalty,
            # What ends a completion is ours to say; vLLM would add what it finds in the model's folder.
            "stop_token_ids": list(params.end_ids),
            "ignore_eos": True,
            "detokenize": bool(params.stop),
        }
        if params.stop:
            settings |= {"stop": list(params.stop), "include_stop_str_in_output": True, "skip_special_tokens": False}
        settings |= params.extra
        if settings.get("stop") or settings.get("bad_words"):
            settings["detokenize"] = True
        if self.args.vllm_structured_outputs_regex is not None:
            if "structured_outputs" in params.extra:
                self._say_once(
                    "Both vllm_structured_outputs_regex and generation_kwargs['structured_outputs'] are set; the former "
                    "is used."
                )
            settings["structured_outputs"] = {"regex": self.args.vllm_structured_outputs_regex}
        return settings

    def _generate_here(self, mine: tuple) -> dict[str, Any]:
        """With the engine in this process; a tensor-parallel group of processes samples the prompts of all of them."""
        assert self._engine is not None
        if self._asleep or self.args.vllm_enable_sleep_mode:
            self._engine.wake(["kv_cache"])
            self._asleep = False
        everyone = [mine]
        if self._tp_group is not None:
            everyone = [mine] * dist.get_world_size(self._tp_group)
            dist.all_gather_object(everyone, mine, group=self._tp_group)
        answer, error = None, None
        try:
            with own_randomness():
                answer = self._engine.generate(_request(everyone))
        except Exception as problem:
            error = problem
        raise_together(self.accelerator, error)
        assert answer is not None
        if self.args.vllm_enable_sleep_mode:
            self.sleep()
        place = dist.get_rank(self._tp_group) if self._tp_group is not None else 0
        return _share(answer, [len(part[0]) for part in everyone], place)

    def _generate_there(self, mine: tuple) -> dict[str, Any]:
        """With the server, to which the main process talks for all."""
        everyone = gather_object([mine])
        for _ in range(_OUTAGES):
            status, answer = self._main_process_does(lambda: self._ask(_request(everyone)))
            if status == "done":
                return _share(answer, [len(part[0]) for part in everyone], self.accelerator.process_index)
            self._held = None
            self.push_weights(self.model, self._version)
        raise RuntimeError(
            f"The vLLM server went away {_OUTAGES} times while it sampled the same prompts; its own messages say why."
        )

    def _ask(self, request: dict[str, Any]) -> tuple[str, Any]:
        """The server's answer; or "push" where it came back without the weights."""
        client = self._client
        assert client is not None
        if not request["prompts"]:
            return "done", {"completion_ids": [], "logps": [], "finished": []}
        for _ in range(_OUTAGES):
            try:
                return "done", client.generate(request, self._name(self._version))
            except ServerUnavailable as error:
                logger.warning(f"The vLLM server at {client.base_url} went away while it sampled ({error}).")
                client.check_server()
            except WeightsLost as error:
                logger.warning(f"{error} They are pushed again.")
                client.check_server()
                return "push", None
        return "push", None

    # ------------------------------------------------------------------------------------------------------ weights

    def push_weights(self, model: nn.Module, version: int) -> PushReport:
        """Let vLLM hold the model's weights as they are now, if it does not hold this version of them already.

        Args:
            model: the trained model; adapters are merged into what is pushed, not into it.
            version: changes whenever the weights do, the number of optimizer steps, say.

        Raises:
            RuntimeError: what arrived is not what was sent.
            ConnectionError: the server went away and did not return within `vllm_server_timeout` seconds.
        """
        self.model, self._version = model, version
        if self._held == version and self.report is not None:
            return replace(self.report, pushed=False)
        started = time.perf_counter()
        if self._engine is not None and self.args.vllm_enable_sleep_mode:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._engine.wake(["weights"])
            self._asleep = False
        for restarts in range(_OUTAGES):
            report = self._push_once(started)
            if report is not None:
                self.report, self._held = replace(report, restarts=restarts), version
                if report.differing:
                    logger.warning(
                        f"vLLM holds other weights than the trained ones after push {version}: "
                        f"{'; '.join(report.differing[:3])}{' …' if len(report.differing) > 3 else ''}."
                    )
                return self.report
        raise RuntimeError(f"The vLLM server went away {_OUTAGES} times while weights were pushed to it.")

    def _push_once(self, started: float) -> PushReport | None:
        """One push by all processes; None where the server went away in the middle of it and is back."""
        talks = self._engine is not None or self.accelerator.is_main_process
        target: Any = self._engine if self._engine is not None else self._client
        checksum, sent, size = Checksum(), dict[str, Sums](), 0
        error: Exception | None = None
        try:
            if talks:
                self._begin(target)
        except Exception as problem:
            error = problem
        # Gathering takes all processes, so a failure of one must not end the others' loop.
        for name, tensor in trained_weights(self.model, self.accelerator.device):
            if not talks or error is not None:
                continue
            try:
                tensor = self._cast(tensor)
                checksum.add(name, tensor)
                sent[name] = sums(tensor)
                size += tensor.numel() * tensor.element_size()
                if self._engine is not None:
                    target.receive([(name, tensor)])
                else:
                    target.send(name, tensor)
            except Exception as problem:
                error = problem
        held: list[dict[str, Sums]] | None = None
        groups: list = []
        if talks and error is None:
            try:
                groups, held = self._held_by(target, checksum.hex, sent)
            except Exception as problem:
                error = problem
        if self._tp_group is not None:  # each process sees only its own worker's part
            parts: list = [None] * dist.get_world_size(self._tp_group)
            dist.all_gather_object(parts, held, group=self._tp_group)
            held = None if None in parts else [worker for part in parts for worker in part]
        report = None
        if held is not None:
            differing, compared = differences(sent, groups, held)
            seconds = time.perf_counter() - started
            report = PushReport(
                self._version, True, checksum.hex, len(sent), size, compared, tuple(differing), seconds
            )
        if self._engine is not None:
            raise_together(self.accelerator, error)
            return report
        return self._main_process_does(lambda: self._pushed(error, report))

    def _begin(self, target: Any) -> None:
        if self._engine is not None:
            target.start_update()
        else:
            self._meet()
            target.start_update(self._name(self._version))

    def _pushed(self, error: Exception | None, report: PushReport | None) -> PushReport | None:
        """In the main process, how a push to the server ended."""
        assert self._client is not None
        if isinstance(error, ServerUnavailable | WeightsLost):
            logger.warning(f"The vLLM server at {self._client.base_url} went away during a push of weights ({error}).")
            self._client.check_server()
            return None
        if error is not None:
            raise error
        return report

    def _held_by(self, target: Any, checksum: str, sent: dict[str, Sums]) -> tuple[list, list[dict[str, Sums]]]:
        """End a push: which weights are to be compared, and the sums over what vLLM holds of them."""
        answer = target.finish_update()
        if answer["checksum"] != checksum:
            raise RuntimeError(
                f"The weights that reached vLLM (checksum {answer['checksum']}) are not those sent ({checksum}); nothing "
                "may be sampled with them. Is another trainer using the same server?"
            )
        loaded = {name: answer["loaded"].get(name, []) for name in sent}
        missing = [name for name, parameters in loaded.items() if not parameters]
        if missing:
            self._say_once(
                f"vLLM has no place for {len(missing)} of the trained tensors: {', '.join(missing[:3])}"
                f"{' …' if len(missing) > 3 else ''}."
            )
        groups = self._in_turn(groups_of(loaded), sent)
        return groups, target.weight_sums([p for _, parameters in groups for p in parameters])

    def _in_turn(self, groups: list, sent: dict[str, Sums]) -> list:
        """The weights to read back this time: all of a small model, of a large one some, other ones at each push."""
        chosen: list = []
        count = 0
        for i in range(len(groups)):
            group = groups[(self._turn + i) % len(groups)]
            size = sum(sent[name].numbers for name in group[0])
            if chosen and count + size > _READ_BACK:
                break
            chosen.append(group)
            count += size
        self._turn = (self._turn + len(chosen)) % max(len(groups), 1)
        return chosen

    def _cast(self, tensor: Tensor) -> Tensor:
        """As vLLM will hold it: what it computes in half precision need not travel in full."""
        if tensor.dtype in (torch.float32, torch.float64) and self._dtype in (torch.bfloat16, torch.float16):
            return tensor.to(self._dtype)
        return tensor

    def _name(self, version: int) -> str:
        return f"{self._run}-{version}"

    # ------------------------------------------------------------------------------------------------------- memory

    def sleep(self, level: int = 2) -> None:
        """Free the GPU memory of a colocated engine until it is needed; nothing with a server or without sleep mode.

        Args:
            level: 1 keeps the weights in host memory; 2 drops them, and they are pushed again. Both drop the KV cache.
        """
        if self._engine is None or not self.args.vllm_enable_sleep_mode:
            return
        self._engine.sleep(level)
        self._asleep = True
        if level == 2:
            self._held = None

    def wake(self) -> None:
        """Take the memory back, with the weights; `generate` and `push_weights` do it when they must."""
        if self._engine is None or not self._asleep:
            return
        if self._held is None:
            self.push_weights(self.model, self._version)
        else:
            self._engine.wake(["weights"])
        self._engine.wake(["kv_cache"])
        self._asleep = False

    def close(self) -> None:
        """Free what the backend holds; a server keeps running."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._client is not None:
            self._client.close_communicator()

    # ------------------------------------------------------------------------------------------------ all processes

    def _main_process_does(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, in every process; what it raises there is raised everywhere."""
        outcome: list[Any] = [None, None]  # what it gives, what it raises
        if self.accelerator.is_main_process:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = _portable(error)
        broadcast_object_list(outcome)
        value, problem = outcome
        if problem is not None:
            raise_together(self.accelerator, problem)
        return value

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said and self.accelerator.is_main_process:
            logger.warning(sentence)
        self._said.add(sentence)


def _portable(error: Exception) -> Exception:
    """An error that can be sent to other processes: of a built-in type, or as a RuntimeError with its words."""
    kind = next((k for k in (ConnectionError, TimeoutError, ValueError, ImportError) if isinstance(error, k)), None)
    return (kind or RuntimeError)(
        str(error) if kind or type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    )


def _engine_dtype(args: Any, model: Any) -> torch.dtype:
    """What training computes in, so that sampler and trainer round alike."""
    if getattr(args, "bf16", False):
        return torch.bfloat16
    if getattr(args, "fp16", False):
        return torch.float16
    dtype = getattr(model, "dtype", None)
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.bfloat16


@contextlib.contextmanager
def _launched(accelerator: Any) -> Iterator[None]:
    """The variables that torchrun would have set, where nobody did: vLLM finds its peers by them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = str(probe.getsockname()[1])
    wanted = {
        "RANK": str(accelerator.process_index),
        "LOCAL_RANK": str(accelerator.local_process_index),
        "WORLD_SIZE": str(accelerator.num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port,
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _untruncated(settings: dict[str, Any]) -> bool:
    """Whether nothing but the temperature stands between the model's logits and what is sampled from."""
    plain = {"top_p": 1.0, "top_k": (0, -1), "min_p": 0.0, "repetition_penalty": 1.0}
    harmless = {"temperature", "stop", "stop_token_ids", "ignore_eos", "detokenize", "seed"}
    harmless |= {"include_stop_str_in_output", "skip_special_tokens", "n"}
    for name, value in settings.items():
        if name in plain:
            usual = plain[name]
            if value != usual and not (isinstance(usual, tuple) and value in usual):
                return False
        elif name not in harmless and value is not None:
            return False
    return True


def _request(everyone: Sequence[tuple]) -> dict[str, Any]:
    """One request for the prompts of all processes; neighbours that are equal become one prompt with several completions."""
    rows = [
        (tuple(prompt), limit, picture)
        for prompts, limits, pictures, *_ in everyone
        for prompt, limit, picture in zip(prompts, limits, pictures)
    ]
    # One seed and one way to sample, or tensor-parallel processes would wait for each other for ever.
    *_, seed, settings = everyone[0]
    request: dict[str, Any] = {"prompts": [], "n": [], "max_tokens": [], "sampling": settings, "seed": seed}
    images = []
    for (prompt, limit, _), group in groupby(rows, key=lambda row: (row[0], row[1], [id(p) for p in row[2] or ()])):
        members = list(group)
        request["prompts"].append(list(prompt))
        request["n"].append(len(members))
        request["max_tokens"].append(limit)
        images.append(members[0][2])
    if any(images):
        request["images"] = images
    return request


def _share(answer: dict[str, Any], counts: Sequence[int], place: int) -> dict[str, Any]:
    """The completions of one process, out of those of all."""
    start = sum(counts[:place])
    return {name: answer[name][start : start + counts[place]] for name in ("completion_ids", "logps", "finished")}
