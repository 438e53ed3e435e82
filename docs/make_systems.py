"""Write the tables of docs/systems/: what is read under which name, from the tables of the readers. `make docs` runs it.

A page is written by hand but for what stands between the two marks; README.md is written whole. A test keeps both current.
"""

from collections.abc import Mapping
from pathlib import Path

from outspoken.diagnostics import signals
from outspoken.diagnostics.sources import FAMILIES
from outspoken.diagnostics.sources.names import COMMON, Family
from outspoken.diagnostics.sources.settings import AXOLOTL, LLAMA_FACTORY

FOLDER = Path(__file__).parent / "systems"
BEGIN, END = "<!-- made by docs/make_systems.py -->", "<!-- end of what is made -->"

# Page, system, what to point the command at, what that is.
SYSTEMS = [
    ("trl", "TRL, transformers", "OUTPUT_DIR", "`trainer_state.json`, the console, a notebook"),
    ("unsloth-axolotl", "Unsloth, Axolotl", "OUTPUT_DIR", "`trainer_state.json`, the console"),
    ("openrlhf", "OpenRLHF", "train.log", "the console, TensorBoard, W&B"),
    ("verl", "veRL", "PROJECT/EXPERIMENT.jsonl", "its file logger, the console, trackers"),
    ("prime-rl", "PRIME-RL", "OUTPUT_DIR", "`metrics.jsonl` of each process, the console, W&B"),
    ("pipelinerl", "PipelineRL", "RUN/finetune/log/info_0.log", "the console of the trainer, W&B"),
    ("oat", "OAT", "console.log", "the console, W&B"),
    ("tinker", "Tinker cookbook", "LOG_PATH", "`metrics.jsonl`"),
    ("llama-factory", "LLaMA-Factory", "OUTPUT_DIR", "`trainer_state.json`, `trainer_log.jsonl`"),
    ("torchtune", "torchtune", "LOG_DIR", "`log_<seconds>.txt` or `.jsonl`, the console"),
    ("nemo-rl", "NeMo-RL", "LOG_DIR", "TensorBoard, W&B, MLflow, the console"),
    ("open-instruct", "open-instruct", "wandb/latest-run", "W&B"),
    ("lightning", "Lightning", "lightning_logs", "`metrics.csv`, TensorBoard"),
    ("plain-loop", "a loop of your own", "log.jsonl", "JSON lines, CSV, JSON, or `outspoken.Recorder`"),
    ("tensorboard", "TensorBoard", "RUNS/NAME", "event files of any trainer"),
    ("wandb", "Weights & Biases", "wandb/latest-run", "local runs, CSV exports"),
    ("mlflow", "MLflow", "mlruns", "local stores"),
]

# Page -> families of its tables; a page that is not listed has none.
FAMILIES_OF = {
    "trl": ("trl",),
    "unsloth-axolotl": (),
    "openrlhf": ("openrlhf", "openrlhf_reward"),
    "verl": ("verl",),
    "prime-rl": ("prime_rl",),
    "pipelinerl": ("pipeline_rl",),
    "oat": ("oat",),
    "tinker": ("tinker",),
    "llama-factory": ("llama_factory",),
    "torchtune": ("torchtune",),
    "nemo-rl": ("nemo_rl",),
    "open-instruct": ("open_instruct",),
    "plain-loop": (),
}
# Page -> tables of settings beside those of its families.
SETTINGS_OF = {"unsloth-axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY}


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(names: Mapping[str, object]) -> list[str]:
    """Names without those that a tracker made of another by its own punctuation (`critic_score_mean`)."""
    written = {name.replace("/", "_") for name in names if "/" in name}
    return [name for name in names if not any(name == w or name.endswith(f"_{w}") for w in written)]


def _factor(scale: float) -> str:
    if scale == -1:
        return "with the other sign"
    return "percent" if scale == 0.01 else f"times {scale:g}"


def _names(family: Family) -> str:
    """Our signals, and the names that each is read from."""
    claims: dict[str, list[str]] = {}
    for theirs in _plain(family.aliases):
        shown = f"`{theirs}`" + (f" ({_factor(family.scale[theirs])})" if theirs in family.scale else "")
        claims.setdefault(family.aliases[theirs], []).append(shown)
    for ours, derived in family.derived.items():
        inputs = ", ".join(f"`{name}`" for name in derived.inputs)
        claims.setdefault(ours, []).append(f"computed from {inputs}")
    lines = ["| our signal | unit | its name, the first one that is there |", "|---|---|---|"]
    for ours, names in claims.items():
        row = signals.lookup(ours)
        lines.append(f"| `{ours}` | {_cell(row.unit) if row else ''} | {_cell(', '.join(names))} |")
    return "\n".join(lines)


def _meanings(family: Family) -> str:
    """Each sentence once, with the names that it is about."""
    about: dict[str, list[str]] = {}
    for name in _plain(family.meanings):
        about.setdefault(family.meanings[name].rstrip("."), []).append(name)
    lines = []
    for said, names in about.items():
        unnamed = [f"`{name}`" for name in names if name.rpartition("/")[2] not in said]
        lines.append(f"- {', '.join(unnamed)}: {said}." if len(unnamed) == len(names) else f"- {said}.")
    lines += [
        f'- `{name}`: {value:g} stands for "not available" and counts as not logged.'
        for name, value in family.not_measured.items()
    ]
    off = [name for name in _plain(dict.fromkeys(sorted(family.zero_if_off))) if not name.startswith("train/")]
    if off:
        listed = ", ".join(f"`{name}`" for name in off)
        lines.append(f"- {listed}: 0 in every row means that the thing is switched off; then it counts as not logged.")
    if family.null_is_nan:
        lines.append("- Its file logger writes NaN as `null`, so `null` is read as NaN there.")
    if family.drops_nan:
        lines.append("- It leaves out what is not finite: a value that is missing may have been a NaN.")
    return "\n".join(lines)


def _settings(table: Mapping[str, str]) -> str:
    fields: dict[str, list[str]] = {}
    for theirs, ours in table.items():
        fields.setdefault(ours.rstrip("."), []).append(f"`{theirs}`")
    rows = "\n".join(f"| `{ours}` | {', '.join(theirs)} |" for ours, theirs in fields.items())
    return f"| our field | its setting |\n|---|---|\n{rows}"


def made(page: str) -> str:
    """What stands between the marks of a page; "" for a page without tables."""
    parts = []
    for name in FAMILIES_OF.get(page, ()):
        one = family(name)
        title = f"## What is read\n\n`--format {name}` where the names alone do not tell."
        parts.append(title if not parts else f"With the names of its reward models (`--format {name}`):")
        parts.append(_names(one))
        meanings = _meanings(one)
        if meanings and len(parts) < 4:
            parts.append(f"Which of several meanings was taken, and why:\n\n{meanings}")
    if page == "plain-loop":
        names: dict[str, list[str]] = {}
        for theirs, ours in COMMON.items():
            names.setdefault(ours, []).append(f"`{theirs}`")
        rows = "\n".join(f"| `{ours}` | {', '.join(theirs)} |" for ours, theirs in names.items())
        parts.append(f"## Names that are understood\n\n| our signal | also |\n|---|---|\n{rows}")
    table = {**(family(FAMILIES_OF[page][0]).settings if FAMILIES_OF.get(page) else {}), **SETTINGS_OF.get(page, {})}
    table = {theirs: ours for theirs, ours in table.items() if theirs != f"trl.{ours}"}
    if table:
        parts.append(f"## Settings\n\n{_settings(table)}")
    return "\n\n".join(parts)


def index() -> str:
    rows = "\n".join(
        f"| [{title}]({page}.md) | `outspoken diagnose {path}` | {files} |" for page, title, path, files in SYSTEMS
    )
    return (
        "# Anybody's run\n\n"
        "`outspoken diagnose PATH` reads what a training leaves behind, and says what is wrong with it. The format and "
        "the system are told by content; `--format` overrides both. `outspoken watch PATH` follows the same file "
        "while it grows. What was read, under which name, and what was not understood stands in the notes of the report.\n\n"
        f"| system | command | what is read |\n|---|---|---|\n{rows}\n\n"
        "Settings are read where they lie beside the log; a rule that needs one says `unknown` without it. "
        "`--config FILE` hands over what is missing, in TRL's names or in those of the system. Pickles, such as "
        "`training_args.bin`, are never opened.\n\n"
        "A signal that a system does not log cannot be judged. `outspoken.Recorder` and the hooks of each page write "
        "our own run directory instead, while training goes on: see [the recorder](../recorder.md).\n"
    )


def page_text(page: str, written: str) -> str:
    """A page with its made part renewed."""
    tables = made(page)
    if not tables:
        return written
    if BEGIN not in written or END not in written:
        raise ValueError(f"docs/systems/{page}.md lacks the marks between which its tables stand: {BEGIN} and {END}")
    before, rest = written.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END, 1)[1]}"


def pages() -> dict[str, str]:
    """File name -> text of everything in docs/systems/."""
    listed = {f"{page}.md": page_text(page, (FOLDER / f"{page}.md").read_text()) for page, *_ in SYSTEMS}
    return {"README.md": index(), **listed}


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
