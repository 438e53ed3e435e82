"""The model card: a README.md beside the weights that says how they were trained, and how that went.

The verdict and the diagnostics are read from the run directory, as anybody else reads them. Text in it may come from
data, from a model, or from whoever could write there, so all of it is escaped: it shows, and does nothing.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from transformers import Trainer

from outspoken.diagnostics import rundir
from outspoken.diagnostics.callback import DiagnosticsCallback, method_of
from outspoken.diagnostics.records import SEVERITIES, as_number
from outspoken.diagnostics.sinks import escaped, value_text

logger = logging.getLogger(__name__)

# Method -> its name, and where it comes from: title and arXiv id.
METHODS: dict[str, tuple[str, str, str]] = {
    "sft": ("supervised fine-tuning", "", ""),
    "reward": (
        "reward modelling with the Bradley-Terry loss",
        "Training language models to follow instructions with human feedback",
        "2203.02155",
    ),
    "dpo": (
        "DPO",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
    ),
    "kto": ("KTO", "KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306"),
    "grpo": (
        "GRPO",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2402.03300",
    ),
    "rloo": (
        "RLOO",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "2402.14740",
    ),
    "distillation": (
        "on-policy distillation",
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "2306.13649",
    ),
}
PACKAGES = ("outspoken", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft", "deepspeed", "vllm")
SETTINGS = (  # shown where the trainer's config has them
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_completion_length",
    "num_generations",
    "optim",
    "seed",
)
MAX_DIAGNOSTICS, MAX_CHANGES, MAX_EVIDENCE, MAX_RESULTS = 30, 30, 6, 20
MAX_CELL = 600  # characters of a text in a table


class ModelCardMixin(Trainer):
    """Gives a trainer its card: at each checkpoint, wherever weights are saved, and when it is pushed to the hub."""

    def create_model_card(  # type: ignore[override]  # TRL's arguments, not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, `<output_dir>/README.md`.

        Args:
            model_name: what the model is called; by default after `hub_model_id` or the output directory.
            dataset_name: the dataset on the hub that it was trained on.
            tags: tags of the model, beside those that the trainer gives.
        """
        write_model_card(self, str(self.args.output_dir), model_name=model_name, dataset_name=dataset_name, tags=tags)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.create_model_card()  # what a checkpoint pushes to the hub takes the card from the output directory
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        write_model_card(self, output_dir or str(self.args.output_dir))


def write_model_card(
    trainer: Any,
    output_dir: str | os.PathLike[str],
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> None:
    """Write `README.md` into `output_dir`, on the main process. A card that cannot be written is logged, never raised.

    Args:
        trainer: any `transformers.Trainer`; where it has a `DiagnosticsCallback`, the card tells how the run went.
    """
    if not trainer.is_world_process_zero():
        return
    try:
        card = model_card(trainer, model_name=model_name, dataset_name=dataset_name, tags=tags)
        os.makedirs(output_dir, exist_ok=True)
        Path(output_dir, "README.md").write_text(card, encoding="utf-8")
    except Exception as error:
        logger.warning(f"The model card in {output_dir} could not be written: {type(error).__name__}: {error}")


def model_card(
    trainer: Any,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> str:
    """The card's text: YAML metadata, then Markdown."""
    model, args = trainer.model, trainer.args
    adapter = is_peft_model(trainer.accelerator.unwrap_model(model, keep_torch_compile=False))
    method = method_of(trainer)
    base = str(getattr(model.config, "_name_or_path", "") or "")
    local = os.path.isdir(base) or os.path.isabs(base)
    hub_id = getattr(trainer, "hub_model_id", None) or getattr(args, "hub_model_id", None)
    if not model_name:
        model_name = str(hub_id).split("/")[-1] if hub_id else Path(os.path.abspath(args.output_dir)).name
    given = [tags] if isinstance(tags, str) else list(tags or ())
    metadata = ModelCardData(
        base_model=base if base and not local else None,
        datasets=[dataset_name] if dataset_name else None,
        library_name="peft" if adapter else "transformers",
        license=_licence_of(base, local),
        model_name=model_name,
        pipeline_tag="text-classification" if method == "reward" else "text-generation",
        tags=list(dict.fromkeys(["generated_from_trainer", "outspoken", method, *_model_tags(model), *given])),
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {markdown(model_name, 200)}",
        _introduction(method, base, local, dataset_name),
        f"## How to use it\n\n{_quick_start(method, str(hub_id or Path(args.output_dir).name), trainer)}",
        f"## How it was trained\n\n{_training(trainer, method, adapter)}",
        *_run_sections(trainer),
        "## Versions\n\n" + "\n".join(f"- {name} {found}" for name in PACKAGES if (found := _version(name))),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# ---------------------------------------------------------------------- text that is safe in Markdown

_MARKS = re.compile(r"([\\`*_\[\]{}|~$@])")


def markdown(text: Any, limit: int = MAX_CELL) -> str:
    """Text as one line of Markdown that shows it as it is: no markup, no HTML, no links, no new cell of a table.

    >>> markdown("<b>**a**|[x](http://y)")
    '&lt;b&gt;\\\\*\\\\*a\\\\*\\\\*\\\\|\\\\[x\\\\](http\\\\://y)'
    """
    line = _MARKS.sub(r"\\\1", escaped(text, limit))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", r"\://")
    line = re.sub(r"(?i)(www)\.", r"\1\\.", line)
    # What makes a heading, a list, a rule or a quotation does so at the beginning only.
    return re.sub(r"^(\s*)([#+\-=]|\d+(?=[.)](?:\s|$)))", lambda m: f"{m[1]}{_entities(m[2])}", line)


def _entities(text: str) -> str:
    return "".join(f"&#{ord(char)};" for char in text)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------- sections


def _introduction(method: str, base: str, local: bool, dataset_name: str | None) -> str:
    name, title, paper = METHODS.get(method, (method.upper(), "", ""))
    if not base:
        source = "a model built in memory"
    elif local:
        source = f"a model in a local folder, {markdown(os.path.basename(os.path.normpath(base)), 200)}"
    else:
        source = _hub_link(base, "")
    data = f" on {_hub_link(dataset_name, 'datasets/')}" if dataset_name else ""
    how = f"{markdown(name)} ([{title}](https://arxiv.org/abs/{paper}))" if paper else markdown(name)
    return f"Trained from {source}{data} with {how}, by Outspoken."


def _hub_link(name: str, kind: str) -> str:
    """A repository on the hub as a link, if it can be one."""
    text = markdown(name, 200)
    return f"[{text}](https://huggingface.co/{kind}{name})" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else text


def _quick_start(method: str, name: str, trainer: Any) -> str:
    model = json.dumps(escaped(name, 200).replace("`", ""))
    if method == "reward":
        code = [
            f'rewarder = pipeline("text-classification", model={model}, function_to_apply="none")',
            'print(rewarder("The capital of France is Paris.")[0]["score"])',
        ]
    else:
        processor = trainer.processing_class
        chat = getattr(processor, "chat_template", None) is not None
        prompt = (
            '[{"role": "user", "content": "What is the capital of France?"}]' if chat else '"The capital of France is"'
        )
        code = [
            f'generator = pipeline("text-generation", model={model})',
            f"print(generator({prompt}, max_new_tokens=128, return_full_text=False)[0])",
        ]
    return "\n".join(["```python", "from transformers import pipeline", "", *code, "```"])


def _training(trainer: Any, method: str, adapter: bool) -> str:
    args, state = trainer.args, trainer.state
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name, None) is not None}
    settings["processes"] = args.world_size
    if adapter:
        config = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).active_peft_config
        settings["adapter"] = (
            f"{getattr(config.peft_type, 'value', config.peft_type)}, rank {getattr(config, 'r', '?')}"
        )
    done = f"{state.global_step} update steps"
    if state.epoch is not None:
        done += f", {state.epoch:.2f} epochs"
    parts = [f"{done}."]
    links = _links()
    if links:
        parts.append("Followed at " + ", ".join(f"[{name}]({url})" for name, url in links.items()) + ".")
    parts.append(_table(["setting", "value"], ((name, _setting(value)) for name, value in settings.items())))
    results = _last_results(state.log_history)
    if results:
        parts += ["Last values:", _table(["metric", "value"], results.items())]
    return "\n\n".join(parts)


def _run_sections(trainer: Any) -> list[str]:
    """How the run went, from its run directory; nothing where the run was not watched or cannot be read."""
    observers = [c for c in trainer.callback_handler.callbacks if isinstance(c, DiagnosticsCallback)]
    if not observers or observers[0].run_id is None:  # not watched, or not trained here
        return []
    folder = observers[0].folder(trainer.args)
    try:
        run = rundir.read_json(folder / rundir.RUN)
        if run.get("id") != observers[0].run_id:
            raise ValueError(f"{folder} holds the run {run.get('id')!r}, not {observers[0].run_id!r}")
        verdict = rundir.read_json(folder / rundir.VERDICT)
        diagnostics = _latest(rundir.read_jsonl(folder / rundir.DIAGNOSTICS)[0], "fingerprint")
        changes = _latest(rundir.read_jsonl(folder / rundir.CHANGES)[0], "id")
        return [
            f"## How the run went\n\n{_verdict(run, verdict)}",
            f"### Diagnostics\n\n{_diagnostics(diagnostics)}",
            f"### Changes made while it trained\n\n{_changes(changes)}" if changes else "",
        ]
    except Exception as error:
        logger.warning(f"The model card says nothing about how the run went: {type(error).__name__}: {error}")
        return []


def _verdict(run: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    running = run.get("status") == "running"
    word = "Verdict so far" if running else "Verdict"
    state = str(verdict.get("state")).replace("_", " ")
    head = (
        f"**{word}: {markdown(state, 40)}** (confidence {markdown(verdict.get('confidence'), 20)}, step "
        f"{markdown(verdict.get('step'), 20)}). {markdown(verdict.get('reason', ''))}"
    )
    lines = [f"- {_evidence(e)}" for e in _mappings(verdict.get("evidence"))[:MAX_EVIDENCE]]
    if not running and run.get("status") != "finished":
        head += f"\n\nThe run ended as: {markdown(run.get('status'), 40)}."
    return "\n\n".join([head, *(["\n".join(lines)] if lines else [])])


def _evidence(evidence: Mapping[str, Any]) -> str:
    text = f"{markdown(evidence.get('signal'), 100)}: {markdown(evidence.get('statistic'), 40)} "
    text += f"{_shown(evidence.get('value'))}, n = {_shown(evidence.get('n'))}"
    window = evidence.get("window")
    if isinstance(window, list) and len(window) == 2:
        text += f", steps {_shown(window[0])} to {_shown(window[1])}"
    for key in ("baseline", "threshold"):
        if evidence.get(key) is not None:
            text += f", {key} {_shown(evidence[key])}"
    return text


def _diagnostics(records: Sequence[Mapping[str, Any]]) -> str:
    fired = [r for r in records if r.get("fired_step") is not None or r.get("state") == "firing"]
    if not fired:
        return "None fired."
    order: dict[str, int] = {severity: i for i, severity in enumerate(SEVERITIES)}
    fired.sort(key=lambda r: (order.get(str(r.get("severity")), len(order)), as_number(r.get("fired_step")) or 0.0))
    rows = [
        (
            f"{r.get('code')} {r.get('name')}",
            r.get("severity"),
            r.get("state"),
            f"{_shown(r.get('first_step'))} to {_shown(r.get('last_step', r.get('step')))}",
            r.get("message", ""),
            r.get("advice", ""),
        )
        for r in fired[:MAX_DIAGNOSTICS]
    ]
    text = _table(["diagnostic", "severity", "state", "steps", "what was seen", "advice"], rows)
    more = len(fired) - MAX_DIAGNOSTICS
    return text + (f"\n\n… and {more} more." if more > 0 else "")


def _changes(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in records[:MAX_CHANGES]:
        fields = record.get("fields")
        moved = [
            f"{name} {value_text(pair.get('old'))} -> {value_text(pair.get('new'))}"
            for name, pair in (fields.items() if isinstance(fields, Mapping) else ())
            if isinstance(pair, Mapping)
        ]
        rows.append(
            (
                record.get("step"),
                ", ".join(moved) or "-",
                record.get("state"),
                record.get("actor"),
                record.get("reason"),
            )
        )
    text = _table(["step", "change", "state", "asked by", "reason"], rows)
    more = len(records) - MAX_CHANGES
    return text + (f"\n\n… and {more} more." if more > 0 else "")


# ---------------------------------------------------------------------- small things


def _latest(records: Iterable[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """The last record of each thing, in the order in which the things appeared."""
    return list({str(record.get(key)): record for record in records}.values())


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _shown(value: Any) -> str:
    number = None if isinstance(value, str) else as_number(value)
    return markdown(value, 40) if number is None else f"{number:.4g}" if number % 1 else f"{number:.0f}"


def _setting(value: Any) -> str:
    value = getattr(value, "value", value)  # of an enumeration
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value_text(value)


def _last_results(history: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The last training loss and the last value of each metric of an evaluation."""
    last: dict[str, str] = {}
    for entry in history:
        for name, value in entry.items():
            number = as_number(value)
            speed = name.endswith(("_runtime", "_per_second"))
            if number is not None and not speed and (name in ("loss", "train_loss") or name.startswith("eval_")):
                last[str(name)] = f"{number:.4g}"
    return dict(list(last.items())[:MAX_RESULTS])


def _links() -> dict[str, str]:
    """Where the run's dashboards are, for those that run in this process."""
    wandb = sys.modules.get("wandb")
    comet = sys.modules.get("comet_ml")
    experiment = comet.get_running_experiment() if comet is not None else None
    found = {
        "Weights & Biases": getattr(getattr(wandb, "run", None), "url", None),
        "Comet": getattr(experiment, "url", None),
    }
    return {
        name: url
        for name, url in found.items()
        if isinstance(url, str) and re.fullmatch(r"https?://[A-Za-z0-9/:._~%?=&-]{1,500}", url)
    }


def _model_tags(model: Any) -> list[str]:
    tags = getattr(model, "model_tags", None)
    return [str(tag) for tag in tags] if isinstance(tags, list | tuple) else []


def _licence_of(base: str, local: bool) -> str | None:
    """The base model's licence, as its own card says, if that lies on this machine."""
    try:
        card = os.path.join(base, "README.md") if local else try_to_load_from_cache(base, "README.md")
        if not isinstance(card, str) or not os.path.isfile(card):
            return None
        found = (metadata_load(card) or {}).get("license")
    except Exception:
        return None
    return found if isinstance(found, str) else None


def _version(package: str) -> str | None:
    if package == "outspoken":
        from outspoken import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
