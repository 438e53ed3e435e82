"""How fast the offline trainers are, and what memory they take, beside TRL's: same model, rows, settings and machine.

    python benchmarks/offline.py [--methods sft,dpo_long] [--peft full,lora] [--steps 1] [--quick] [--json FILE] [--write]
    python benchmarks/offline.py --layouts

For every case, each contender trains in a process of its own. The two take turns, a few optimizer steps at a time, so
that whatever else the machine does weighs on both; a ratio is that of two neighbouring turns. The losses of both are
compared, which tells whether they really did the same work. `--write` puts the table into docs/performance.md.
`--layouts` measures something else: what a prompt that chosen and rejected answer share saves by itself.
"""

import importlib
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    CONTENDERS,
    MODEL,
    VOCABULARY,
    alternate,
    build_model,
    forward_backward,
    keep,
    machine,
    names_of,
    options,
    own_stdout,
    prepare,
    ratios,
    share_of,
    take_turns,
    turn_taking,
)

MARKERS = "<!-- offline: begin -->", "<!-- offline: end -->"
PAIRS = ((512, 64), (128, 64), (32, 64))  # tokens of prompt and answers, for `--layouts`


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


def contend(contender: str, name: str, peft: str, model: str, steps: int, turns: int, device: str) -> None:
    """Train a case in turns of `steps` optimizer steps: each waits for a line on stdin, and ends with one on stdout."""
    channel = own_stdout()
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


def contest(name: str, peft: str, model: str, steps: int, turns: int, device: str) -> dict[str, Any]:
    """Both contenders on a case; the first turn of each is not counted."""
    measured, told = take_turns(__file__, turns, name, peft, model, steps, turns, device)
    losses, counted = {who: told[who]["losses"] for who in CONTENDERS}, measured[1:]
    per_turn = (
        statistics.mean(map(tokens_of, rows(name, CASES[name].batch * steps * turns))) * CASES[name].batch * steps
    )
    speeds = ratios(counted)
    return {
        "case": name,
        "peft": peft,
        "speed": statistics.median(speeds),
        "speed_spread": [speeds[len(speeds) // 4], speeds[-1 - len(speeds) // 4]],
        "cpu": statistics.median(ratios(counted, "cpu")),
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


def layouts(model: str, device: str, repeats: int) -> str:
    """A table of what the layout of a pair with its prompt once takes, in shares of what that of two rows does."""
    import torch
    from transformers import AutoModelForCausalLM

    from outspoken.trainers.shared_prompts import mask_dtype_of, plain_batch, shared_batch

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    lines = ["| prompt | answers | time of the plain layout (middle half) |", "|---|---|---|"]
    for prompt, answer in PAIRS:
        ids = torch.randint(4, VOCABULARY, (2, prompt + answer), device=device)
        ids[1, :prompt] = ids[0, :prompt]
        answers = (torch.arange(prompt + answer, device=device) >= prompt).long().expand(2, -1)
        pair = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answers}
        how = {"mask_dtype": mask_dtype_of(network), "hidden_size": network.config.hidden_size}
        cell = "not shared"
        if (shared := shared_batch(pair, 2, **how)) is not None:
            ways = {"plain": plain_batch(pair), "shared": shared}
            seconds = alternate({way: partial(forward_backward, network, ways[way]) for way in ways}, repeats)
            cell = share_of(seconds["shared"], seconds["plain"])
        lines.append(f"| {prompt} | {answer} | {cell} |")
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__, quick="1 step a turn, 3 turns that count")
    parser.add_argument("--methods", default=",".join(CASES), help="cases, of " + ", ".join(CASES))
    parser.add_argument("--peft", default="full,lora", help="of full, lora")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender that count")
    parser.add_argument("--layouts", action="store_true", help="only what shared prompts save, 4 times as many turns")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="of the model")
    parser.add_argument("--hidden", type=int, default=MODEL["hidden_size"], help="hidden size of the model")
    args = parser.parse_args()
    if args.contend:
        contend(*json.loads(args.contend))
        return
    methods = names_of(parser, "--methods", args.methods, CASES)
    kinds = names_of(parser, "--peft", args.peft, ("full", "lora"))
    device = prepare(args.device)
    steps, turns = (1, 3) if args.quick else (args.steps, args.turns)
    began, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as model:
        head = build_model(Path(model), args.layers, args.hidden)
        llama = (
            f"a Llama of {args.layers} layers of {args.hidden}, vocabulary {VOCABULARY:,}, {head:.0%} of it the head"
        )
        if args.layouts:
            print(f"{layouts(model, device, 4 * turns)}\n\nModel: {llama}. Machine: {machine(device)}.")
            return
        for name in methods:
            for peft in kinds:
                results.append(contest(name, peft, model, steps, turns + 1, device))
                print(table(results[-1:]).splitlines()[-1], f"cpu {results[-1]['cpu']:.2f}", flush=True)
    text = f"{table(results)}\n\nModel: {llama}. Machine: {machine(device)}."
    worst = max(results, key=lambda found: found["loss_difference"])
    print(f"\n{text}\n{time.perf_counter() - began:.0f} s; losses differ by at most {worst['loss_difference']:.1e}")
    keep(args, device, CASES, results, MARKERS, text)


if __name__ == "__main__":
    main()
