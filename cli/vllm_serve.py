"""`outspoken vllm-serve`: a vLLM server into which a trainer pushes its weights."""

import ast
import json
import logging
from typing import Annotated, Any

import typer

from outspoken.cli.common import CommandError, say

_LEVELS = ("critical", "error", "warning", "info", "debug")


def _option(name: str, help: str, default: Any = ..., metavar: str | None = None) -> Any:
    """An option that may be written with underscores, as in TRL, or with hyphens, as in vLLM."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return typer.Option(*spellings, help=help, metavar=metavar)


def vllm_serve(
    context: typer.Context,
    model: Annotated[str, _option("model", "Folder or hub name of the model that is trained.")],
    revision: Annotated[str | None, _option("revision", "Its revision.")] = None,
    host: Annotated[
        str,
        _option("host", "Address to listen on. There is no password: 0.0.0.0 only in a network that you trust."),
    ] = "127.0.0.1",
    port: Annotated[int, _option("port", "Port to listen on; 0: any that is free.")] = 8000,
    tensor_parallel_size: Annotated[int, _option("tensor_parallel_size", "GPUs over which the model is cut.")] = 1,
    data_parallel_size: Annotated[
        int, _option("data_parallel_size", "Copies of the model; only 1, as one trainer talks to one server.")
    ] = 1,
    gpu_memory_utilization: Annotated[
        float, _option("gpu_memory_utilization", "Share of each GPU's memory that vLLM may take (0 to 1).")
    ] = 0.9,
    dtype: Annotated[
        str,
        _option(
            "dtype",
            "bfloat16, float16, float32, or auto: the model's, but float32 becomes bfloat16. Best what training uses.",
        ),
    ] = "auto",
    max_model_len: Annotated[
        int | None, _option("max_model_len", "Longest prompt and completion together, in tokens.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option(
            "--enable_prefix_caching/--no_enable_prefix_caching",
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Compute what prompts have in common once.",
        ),
    ] = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce_eager", "--enforce-eager", help="No CUDA graphs: starts faster, samples slower.")
    ] = False,
    vllm_model_impl: Annotated[
        str, _option("vllm_model_impl", "Whose implementation of the model: vllm, transformers or auto.")
    ] = "vllm",
    kv_cache_dtype: Annotated[str, _option("kv_cache_dtype", "Data type of the key-value cache.")] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust_remote_code", "--trust-remote-code", help="Run Python code that comes with the model."),
    ] = False,
    log_level: Annotated[str, _option("log_level", f"{', '.join(_LEVELS)}.")] = "info",
    distributed_executor_backend: Annotated[
        str | None,
        _option("distributed_executor_backend", "How vLLM runs its workers: mp, or ray for several machines."),
    ] = None,
    speculative_config: Annotated[
        str | None, _option("speculative_config", "vLLM's settings for speculative decoding, as JSON.")
    ] = None,
) -> None:
    """Sample for a trainer with `use_vllm=True, vllm_mode="server"`; it pushes its weights here after each update.

    Further options (`--swap_space 4`) are settings of vLLM's engine. The server listens on 127.0.0.1 unless `--host` says
    otherwise, takes JSON and safetensors only, and has no password.
    """
    if log_level.lower() not in _LEVELS:
        raise CommandError(f"--log_level is {log_level!r}; it must be one of {', '.join(_LEVELS)}.")
    if data_parallel_size != 1:
        raise CommandError(f"--data_parallel_size is {data_parallel_size}; only 1 is supported.")
    settings: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enable_prefix_caching": enable_prefix_caching,
        "enforce_eager": enforce_eager,
        "model_impl": vllm_model_impl,
        "kv_cache_dtype": kv_cache_dtype,
        "trust_remote_code": trust_remote_code,
        "distributed_executor_backend": distributed_executor_backend,
        "speculative_config": _json(speculative_config),
        **_further(context.args),
    }
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    from outspoken.trainers.rollouts.vllm_server import start

    start(
        {k: v for k, v in settings.items() if v is not None}, host, port, lambda address: say(f"Serving at {address}")
    )


def _json(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"--speculative_config is no JSON: {error}.") from error


def _further(arguments: list[str]) -> dict[str, Any]:
    """Settings of vLLM's engine from `--name value`, `--name=value` or `--flag`."""
    settings: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise CommandError(f"{word!r} is no option; further options are settings of vLLM's engine, --name value.")
        name, given, value = word[2:].partition("=")
        if not given:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        try:
            settings[name.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name.replace("-", "_")] = value
    return settings
