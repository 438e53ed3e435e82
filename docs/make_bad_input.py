"""Writes docs/bad_input.md: wrong datasets and settings, and the sentence that each one gets.

The sentences are what the trainers really say: every case is run, with a model folder whose weights must not be touched.
`make docs` rewrites the page, a test compares it.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

import outspoken

PAGE = Path(__file__).parent / "bad_input.md"

USER = {"role": "user", "content": "What is 2+2?"}
REPLY = {"role": "assistant", "content": "4"}
PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
RATED = {"prompt": "2+2=", "completion": "4", "label": True}
TEXT = {"text": "2+2=4"}
PROMPT = {"prompt": "2+2="}
NO_BOUNDS = {"vllm_importance_sampling_clip_max": None}
LONG = "2+2=" * 50

# What is wrong, the trainer, its dataset's rows, its settings.
DATA: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("no dataset", "SFT", None, {}),
    ("a mapping instead of a dataset", "SFT", {"text": ["2+2=4"]}, {}),
    ("an empty dataset", "SFT", Dataset.from_dict({"text": []}), {}),
    ("no column to train on", "SFT", [{"content": "2+2=4"}], {}),
    ("a prompt, but nothing to learn", "SFT", [{"prompt": "2+2="}], {}),
    ("preferences given to SFT", "SFT", [PAIR], {}),
    ("text is missing in one row", "SFT", [TEXT, {"text": None}], {}),
    ("text is empty in one row", "SFT", [TEXT, {"text": " "}], {}),
    ("numbers instead of text", "SFT", [{"text": 4}], {}),
    ("a conversation without messages", "SFT", [{"messages": [USER, REPLY]}, {"messages": []}], {}),
    ("a message without a role", "SFT", [{"messages": [{"role": None, "content": "4"}]}], {}),
    ("a message without content", "SFT", [{"messages": [USER, {"role": "assistant", "content": None}]}], {}),
    ("assistant-only loss on plain text", "SFT", [TEXT], {"assistant_only_loss": True}),
    ("completion-only loss without completions", "SFT", [TEXT], {"completion_only_loss": True}),
    ("tools that are no JSON", "SFT", [{"messages": [USER, REPLY], "tools": "{"}], {}),
    (
        "every completion lies beyond max_length",
        "SFT",
        [{"prompt": LONG, "completion": "4"}],
        {"max_length": 16},
    ),
    ("answers that are not paired", "DPO", [RATED], {}),
    ("no rejected answers", "DPO", [{"prompt": "2+2=", "chosen": "4"}], {}),
    ("single answers given to DPO", "DPO", [{"prompt": "2+2=", "completion": "4"}], {}),
    ("a rejected answer is missing", "DPO", [PAIR, {**PAIR, "rejected": None}], {}),
    ("a chosen answer is empty", "DPO", [PAIR, {**PAIR, "chosen": ""}], {}),
    ("a conversation as prompt, text as answer", "DPO", [{**PAIR, "prompt": [USER]}], {}),
    ("both answers are the same in every row", "DPO", [{**PAIR, "rejected": "4"}], {}),
    ("every prompt fills max_length", "DPO", [{**PAIR, "prompt": LONG}], {"max_length": 16}),
    ("no labels", "KTO", [{"prompt": "2+2=", "completion": "4"}], {}),
    ("labels that are words", "KTO", [{**RATED, "label": "good"}], {}),
    ("labels beyond 0 and 1", "KTO", [{**RATED, "label": 3}], {}),
    ("a label is missing", "KTO", [RATED, {**RATED, "label": None}], {}),
    ("a completion is empty", "KTO", [RATED, {**RATED, "completion": ""}], {}),
    ("single answers given to a reward model", "Reward", [{"prompt": "2+2=", "completion": "4"}], {}),
    ("a margin that is no number", "Reward", [{**PAIR, "margin": "large"}], {}),
    ("no dataset", "GRPO", None, {}),
    ("no prompts", "GRPO", [{"question": "2+2="}], {}),
    ("a prompt is missing", "GRPO", [PROMPT, {"prompt": None}], {}),
    ("a prompt is empty", "RLOO", [PROMPT, {"prompt": " "}], {}),
    ("a prompt without messages", "GRPO", [{"prompt": [USER]}, {"prompt": []}], {}),
    ("a message without a role", "RLOO", [{"prompt": [{"role": None, "content": "2+2="}]}], {}),
    ("fewer prompts than a generation batch takes", "GRPO", [PROMPT], {"per_device_train_batch_size": 16}),
    ("nothing to learn from", "Distillation", [{"question": "2+2="}] * 8, {}),
    ("completions are trained on, but there are none", "Distillation", [PROMPT] * 8, {"lmbda": 0.5}),
    ("every pair is longer than max_length", "Reward", [{**PAIR, "prompt": LONG}], {"max_length": 16}),
]

SETTINGS: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("an unknown loss", "SFT", [TEXT], {"loss_type": "nlll"}),
    ("packing without a length", "SFT", [TEXT], {"packing": True, "max_length": None}),
    ("padding to a word", "SFT", [TEXT], {"pad_to_multiple_of": "eight"}),
    ("an EOS token that is not in the vocabulary", "SFT", [TEXT], {"eos_token": "<|stop|>"}),
    ("a chat template that is not there", "SFT", [TEXT], {"chat_template_path": "chat.jinja"}),
    ("an unknown loss", "DPO", [PAIR], {"loss_type": "sigmod"}),
    ("fewer weights than losses", "DPO", [PAIR], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}),
    ("EXO without label smoothing", "DPO", [PAIR], {"loss_type": "exo_pair"}),
    ("robust DPO with half the labels flipped", "DPO", [PAIR], {"loss_type": "robust", "label_smoothing": 0.5}),
    ("an unknown divergence", "DPO", [PAIR], {"f_divergence_type": "kl"}),
    (
        "a divergence for a loss that has none",
        "DPO",
        [PAIR],
        {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"},
    ),
    ("WPO with sorted pairs", "DPO", [PAIR], {"loss_type": "aot", "use_weighting": True}),
    ("LD-DPO beyond its range", "DPO", [PAIR], {"ld_alpha": 1.5}),
    (
        "a moving reference whose log-probs are precomputed",
        "DPO",
        [PAIR],
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
    ),
    ("a negative beta", "DPO", [PAIR], {"beta": -0.1}),
    ("an unknown loss", "KTO", [RATED], {"loss_type": "bco"}),
    ("an unknown loss", "GRPO", [PROMPT], {"loss_type": "ppo"}),
    ("CISPO without its bound", "GRPO", [PROMPT], {"loss_type": "cispo"}),
    ("an unknown way to advantages", "GRPO", [PROMPT], {"advantage_estimator": "gae"}),
    ("pass@k without a k", "GRPO", [PROMPT], {"advantage_estimator": "pass_at_k"}),
    ("groups that do not divide the batch", "GRPO", [PROMPT], {"num_generations": 5}),
    ("two sizes of a generation batch", "GRPO", [PROMPT], {"generation_batch_size": 16, "steps_per_generation": 3}),
    ("a temperature of zero", "GRPO", [PROMPT], {"temperature": 0.0}),
    ("a moving reference that is not there", "GRPO", [PROMPT], {"sync_ref_model": True}),
    ("truncation without a bound", "GRPO", [PROMPT], {"vllm_importance_sampling_mode": "token_truncate", **NO_BOUNDS}),
    ("a word for what happens on errors", "GRPO", [PROMPT], {"reward_on_error": "ignore"}),
    ("two engines to sample with", "GRPO", [PROMPT], {"use_vllm": True, "use_transformers_continuous_batching": True}),
    ("vLLM in an unknown place", "GRPO", [PROMPT], {"vllm_mode": "remote"}),
    ("an unknown loss", "RLOO", [PROMPT], {"loss_type": "ppo"}),
    ("a range from high to low", "RLOO", [PROMPT], {"reward_clip_range": (1.0, -1.0)}),
    ("a group of one", "RLOO", [PROMPT], {"num_generations": 1}),
    ("no teacher", "Distillation", [PROMPT] * 8, {}),
    ("a divergence beyond its range", "Distillation", [PROMPT] * 8, {"beta": 1.5}),
    ("a stream without max_steps", "DPO", Dataset.from_list([PAIR]).to_iterable_dataset(), {"max_steps": -1}),
]


def sentence(trainer: str, rows: Any, settings: dict[str, Any], model: str, output_dir: str) -> str:
    """What a trainer says to wrong input.

    Raises:
        AssertionError: it says nothing.
    """
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    config = {"max_steps": 1, "report_to": "none", "use_cpu": True, **settings}
    try:
        args = getattr(outspoken, f"{trainer}Config")(output_dir=output_dir, **config)
        rewards = {"reward_funcs": len} if trainer in ("GRPO", "RLOO") else {}
        getattr(outspoken, f"{trainer}Trainer")(model=model, args=args, train_dataset=dataset, **rewards)
    except (ValueError, TypeError) as error:
        return str(error)
    raise AssertionError(f"{trainer}Trainer accepted {rows} with {settings}")


def model_without_weights(folder: str) -> str:
    """A folder with a model's config and tokenizer, and weights that cannot be read."""
    from outspoken.cli.demo_task import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] or '' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    for weights in Path(folder).glob("*.safetensors"):
        weights.write_bytes(b"not weights")
    return folder


def answers(cases: list[tuple[str, str, Any, dict[str, Any]]]) -> Iterator[tuple[str, str, str]]:
    """What is wrong, the trainer, and what it said, for each case."""
    with tempfile.TemporaryDirectory() as folder:
        model = model_without_weights(folder)
        for wrong, trainer, rows, settings in cases:
            yield wrong, trainer, sentence(trainer, rows, settings, model, f"{folder}/out")


def page() -> str:
    lines = [
        "# Wrong input, and what is said about it",
        "",
        "Every mistake gets one sentence that names the column, the row or the setting, and what to do. It comes before",
        "the weights are loaded. This page is written by `make docs`, from what the trainers really say.",
    ]
    for title, cases in (("Datasets", DATA), ("Settings", SETTINGS)):
        lines += ["", f"## {title}", "", "| what is wrong | trainer | what is said |", "|---|---|---|"]
        for wrong, trainer, said in answers(cases):
            lines.append(f"| {wrong} | {trainer} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
