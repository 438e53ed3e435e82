"""How fast the offline trainers are, and what memory they take, beside TRL's: same model, rows, settings and machine.

    python benchmarks/offline.py [--methods sft,dpo_long] [--peft full,lora] [--steps 1] [--quick] [--json FILE] [--write]

For every case, each contender trains in a process of its own. The two take turns, a few optimizer steps at a time, so
that whatever else the machine does weighs on both; a ratio is that of two neighbouring turns. The losses of both are
compared, which tells whether they really did the same work. `--write` puts the table into docs/performance.md.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

DOC = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- offline: begin -->", "<!-- offline: end -->"
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


@dataclass(frozen=True)
class Case:
    """What is trained on: lengths in tokens, drawn evenly from a range."""

    what: str
    trainer: str  # the name of trainer and config without "Trainer" and "Config"
    prompt: tuple[int, int]
    answer: tuple[int, int]
    batch: int
    speed_aim: float = 1.0
    memory_aim: float = 1.0


CASES = {
    "sft": Case("SFT, texts", "SFT", (0, 0), (100, 250), 3),
    "sft_completion": Case("SFT, completions of prompts", "SFT", (60, 120), (40, 120), 3),
    "dpo": Case("DPO, short prompts", "DPO", (12, 32), (40, 100), 2),
    "dpo_long": Case("DPO, long prompts", "DPO", (300, 400), (30, 60), 2, 1.4, 0.8),
    "kto": Case("KTO", "KTO", (30, 60), (40, 100), 3),
    "reward": Case("reward model, short prompts", "Reward", (8, 16), (60, 120), 4),
    "reward_long": Case("reward model, long prompts", "Reward", (150, 250), (30, 60), 4),
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


def rows(name: str, number: int) -> list[dict[str, Any]]:
    """The rows of a case, always the same."""
    case, draw = CASES[name], random.Random(0)

    def words(span: tuple[int, int]) -> str:
        return " ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(draw.randint(*span)))

    def row(index: int) -> dict[str, Any]:
        prompt = words(case.prompt)
        if name == "sft":
            return {"text": words(case.answer)}
        if name == "sft_completion":
            return {"prompt": prompt, "completion": " " + words(case.answer)}
        if name == "kto":
            return {"prompt": prompt, "completion": " " + words(case.answer), "label": index % 2 == 0}
        return {"prompt": prompt, "chosen": " " + words(case.answer), "rejected": " " + words(case.answer)}

    return [row(index) for index in range(number)]


def tokens_of(row: dict[str, Any]) -> int:
    """Tokens that a trainer which shares nothing has to read for a row, without padding."""
    length = {key: len(text.split()) for key, text in row.items() if isinstance(text, str)}
    if "chosen" in row:
        return 2 * (length["prompt"] + 1) + length["chosen"] + length["rejected"]
    return sum(length.values()) + 1  # and the end token


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
    import gc

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


def contend(contender: str, name: str, peft: str, model: str, steps: int, turns: int, device: str) -> None:
    """Train a case in turns of `steps` optimizer steps: each waits for a line on stdin, and ends with one on stdout."""
    channel = own_stdout()
    import importlib

    import torch
    import transformers
    from datasets import Dataset

    case = CASES[name]
    library = importlib.import_module(contender)
    trainer_class, config_class = (getattr(library, case.trainer + kind) for kind in ("Trainer", "Config"))
    cuda = device == "cuda"
    kind = "AutoModelForSequenceClassification" if case.trainer == "Reward" else "AutoModelForCausalLM"
    extra = {"num_labels": 1} if case.trainer == "Reward" else {}
    torch.manual_seed(0)
    network = getattr(transformers, kind).from_pretrained(model, dtype=torch.float32, **extra)
    if case.trainer == "Reward":
        network.score.weight.data.normal_(0, 0.02)
    adapter = None
    if peft == "lora":
        from peft import LoraConfig

        adapter = LoraConfig(
            r=8,
            target_modules=["q_proj", "v_proj"],
            task_type="SEQ_CLS" if case.trainer == "Reward" else "CAUSAL_LM",
            modules_to_save=["score"] if case.trainer == "Reward" else None,
        )
    data = Dataset.from_list(rows(name, case.batch * steps * turns))
    turn = turn_taking(steps, device, channel)
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            per_device_train_batch_size=case.batch,
            max_steps=steps * turns,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
            bf16=cuda,
            seed=0,
        )
        trainer_class(
            model=network,
            args=args,
            train_dataset=data,
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            peft_config=adapter,
            callbacks=[turn],
        ).train()
    print(json.dumps({"losses": turn.losses}), file=channel, flush=True)


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


def contest(name: str, peft: str, model: str, steps: int, turns: int, device: str) -> dict[str, Any]:
    """Both contenders on a case; the first turn of each is not counted."""
    contenders = {who: Contender(__file__, who, name, peft, model, steps, turns, device) for who in CONTENDERS}
    try:
        # The one that goes first alternates: whoever follows finds a warmer or busier machine.
        orders = [CONTENDERS if turn % 2 else CONTENDERS[::-1] for turn in range(turns)]
        measured = [{who: contenders[who].turn() for who in order} for order in orders]
        losses = {who: contenders[who].read()["losses"] for who in CONTENDERS}
    finally:
        for contender in contenders.values():
            contender.process.stdin.close()
            contender.process.kill()
            contender.process.wait()
    counted = measured[1:]
    per_turn = (
        statistics.mean(map(tokens_of, rows(name, CASES[name].batch * steps * turns))) * CASES[name].batch * steps
    )
    ratios = sorted(turn["trl"]["wall"] / turn["outspoken"]["wall"] for turn in counted)
    return {
        "case": name,
        "peft": peft,
        "speed": statistics.median(ratios),
        "speed_spread": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "cpu": statistics.median(turn["trl"]["cpu"] / turn["outspoken"]["cpu"] for turn in counted),
        "memory": measured[-1]["outspoken"]["peak"] / measured[-1]["trl"]["peak"],
        "loss_difference": max(abs(a - b) for a, b in zip(losses["trl"], losses["outspoken"], strict=True)),
        **{
            who: {
                "tokens_per_second": per_turn / statistics.median(turn[who]["wall"] for turn in counted),
                "peak_mib": measured[-1][who]["peak"],
            }
            for who in CONTENDERS
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | weights | tokens/s: TRL | Outspoken | times as fast (middle half) | aim | peak memory: TRL | Outspoken "
        "| share | aim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        case, trl, ours = CASES[found["case"]], found["trl"], found["outspoken"]
        low, high = found["speed_spread"]
        lines.append(
            f"| {case.what} | {'all' if found['peft'] == 'full' else 'LoRA'} "
            f"| {trl['tokens_per_second']:,.0f} | {ours['tokens_per_second']:,.0f} "
            f"| {found['speed']:.2f} ({low:.2f}–{high:.2f}) | {case.speed_aim:.1f} "
            f"| {trl['peak_mib']:,.0f} MiB | {ours['peak_mib']:,.0f} MiB "
            f"| {found['memory']:.2f} | {case.memory_aim:.1f} |"
        )
    return "\n".join(lines)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(CASES), help="cases, of " + ", ".join(CASES))
    parser.add_argument("--peft", default="full,lora", help="of full, lora")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender that count")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="of the model")
    parser.add_argument("--hidden", type=int, default=MODEL["hidden_size"], help="hidden size of the model")
    parser.add_argument("--quick", action="store_true", help="1 step a turn, 3 turns that count")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        contend(*json.loads(args.contend))
        return
    methods, kinds = args.methods.split(","), args.peft.split(",")
    for value, known, option in ((methods, CASES, "--methods"), (kinds, ("full", "lora"), "--peft")):
        if unknown := sorted({*value} - {*known}):
            parser.error(f"{option} has {unknown[0]!r}; use {', '.join(known)}")
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps, turns = (1, 3) if args.quick else (args.steps, args.turns)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for a busy core would be what is measured
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    began, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as model:
        head = build_model(Path(model), args.layers, args.hidden)
        for name in methods:
            for peft in kinds:
                results.append(contest(name, peft, model, steps, turns + 1, device))
                print(table(results[-1:]).splitlines()[-1], f"cpu {results[-1]['cpu']:.2f}", flush=True)
    llama = f"a Llama of {args.layers} layers of {args.hidden}, vocabulary {VOCABULARY:,}, {head:.0%} of it the head"
    text = f"{table(results)}\n\nModel: {llama}. Machine: {machine(device)}."
    worst = max(results, key=lambda found: found["loss_difference"])
    print(f"\n{text}\n{time.perf_counter() - began:.0f} s; losses differ by at most {worst['loss_difference']:.1e}")
    if args.json:
        cases = {name: asdict(case) for name, case in CASES.items()}
        args.json.write_text(json.dumps({"machine": machine(device), "cases": cases, "results": results}, indent=1))
    if args.write:
        write(BEGIN, END, text)


if __name__ == "__main__":
    main()
