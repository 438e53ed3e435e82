"""What the benchmarks have in common: a model, processes that train in turns, options, and where results go."""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

DOC = Path(__file__).parents[1] / "docs" / "performance.md"
CONTENDERS = ("trl", "outspoken")
VOCABULARY = 49_152
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def build_model(folder: Path, layers: int, hidden: int, vocabulary: int = VOCABULARY) -> float:
    """Save a small Llama with random weights, and a tokenizer that makes one token of each word `w<number>`.

    Returns the share of the weights that are in the output head, which is that of the multiplications too.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "vocab_size": vocabulary,
    }
    model = LlamaForCausalLM(LlamaConfig(**MODEL | sizes))
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return model.lm_head.weight.numel() / model.num_parameters()


# --------------------------------------------------------------------------------------------------- a contender


def resident() -> tuple[float, float]:
    """Memory of this process in MiB: now, and at most since `forget_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(status[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def own_stdout() -> TextIO:
    """Standard output for what this script says; what trainers print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def turn_taking(steps: int, device: str, channel: TextIO, each_step: Callable[[], None] = lambda: None) -> Any:
    """A callback that lets a trainer train in turns: each waits for a line on stdin, and ends with one on `channel`.

    What was held when this was called is not counted as memory.

    Args:
        steps: optimizer steps of a turn.
        each_step: called after each step, outside of what is timed.
    """
    import torch
    import transformers

    cuda = device == "cuda"
    gc.collect()
    baseline = torch.cuda.memory_allocated() / 2**20 if cuda else resident()[0]

    class Turns(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def wait(self) -> None:
            if not sys.stdin.readline():
                raise SystemExit("The benchmark has ended.")
            self.began = time.perf_counter(), time.process_time()

        def on_train_begin(self, args, state, control, **kwargs):
            torch.cuda.reset_peak_memory_stats() if cuda else forget_peak()
            self.wait()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                self.losses.append(logs["loss"])

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % steps == 0:
                if cuda:
                    torch.cuda.synchronize()
                wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
                peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident()[1]
                print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak - baseline}), file=channel, flush=True)
            each_step()
            if state.global_step % steps == 0 and state.global_step < state.max_steps:
                self.wait()

    return Turns()


# ---------------------------------------------------------------------------------------------------- the contest


class Contender:
    """A process that trains when told to."""

    def __init__(self, script: str, *args: Any) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, script, "--contend", json.dumps(args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"A contender ended early:\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()


def take_turns(script: str, turns: int, *args: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let both contenders train in turns.

    Args:
        script: what each is started as, with `--contend` and its name and `args`, in JSON.

    Returns:
        What each told of its turns, and in the end.
    """
    contenders = {who: Contender(script, who, *args) for who in CONTENDERS}
    try:
        # The one that goes first alternates: whoever follows finds a warmer or busier machine.
        orders = [CONTENDERS if turn % 2 else CONTENDERS[::-1] for turn in range(turns)]
        measured = [{who: contenders[who].turn() for who in order} for order in orders]
        return measured, {who: contenders[who].read() for who in CONTENDERS}
    finally:
        for contender in contenders.values():
            contender.process.stdin.close()
            contender.process.kill()
            contender.process.wait()


def ratios(turns: list[dict[str, Any]], clock: str = "wall") -> list[float]:
    """By how many times TRL took longer, the least first."""
    return sorted(turn["trl"][clock] / turn["outspoken"][clock] for turn in turns)


# ------------------------------------------------------------------------------------------- ways to do the same thing


def alternate(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each way to do something took, done in alternation; the first time of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in list(ways) if repeat % 2 else reversed(ways):
            began = time.perf_counter()
            ways[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def share_of(seconds: list[float], others: list[float]) -> str:
    """The share of the others' time, turn by turn: median and middle half, as a cell of a table."""
    shares = sorted(a / b for a, b in zip(seconds, others, strict=True))
    quarter = len(shares) // 4
    return f"{statistics.median(shares):.2f} ({shares[quarter]:.2f}–{shares[-1 - quarter]:.2f})"


def forward_backward(model: Any, batch: Any) -> None:
    """A training pass over an `AnswerBatch`."""
    import torch

    from outspoken.trainers.logprobs import label_scores

    scores, _ = label_scores(model, {**batch.inputs, "use_cache": False}, batch.labels)
    batch.take(scores.logps).mean().backward()
    if batch.labels.is_cuda:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------ the scripts


def options(description: str, quick: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    return parser


def names_of(parser: argparse.ArgumentParser, option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that an option lists, or an error if one is not known."""
    names = text.split(",")
    if unknown := sorted({*names} - {*known}):
        parser.error(f"{option} has {unknown[0]!r}; use {', '.join(known)}")
    return names


def prepare(device: str | None) -> str:
    """Set up this process and those it starts; the device, cuda where there is one if unset."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for a busy core would be what is measured
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def keep(
    args: argparse.Namespace, device: str, cases: dict[str, Any], results: Any, markers: tuple[str, str], text: str
) -> None:
    """Put results where the options say."""
    if args.json:
        known = {name: asdict(case) for name, case in cases.items()}
        args.json.write_text(json.dumps({"machine": machine(device), "cases": known, "results": results}, indent=1))
    if args.write:
        write(*markers, text)


def machine(device: str) -> str:
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    threads = "" if device == "cuda" else f", {os.environ['OMP_NUM_THREADS']} thread(s) a process, float32"
    return f"{where}{threads}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"


def write(begin: str, end: str, text: str) -> None:
    """Put a text into docs/performance.md, between two markers."""
    head, _, rest = DOC.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    DOC.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
