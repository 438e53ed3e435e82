"""`outspoken sft`, `outspoken dpo` and so on: train from a YAML file and fields on the command line."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outspoken.cli.common import BAD, FINE, clean_stdout, print_json, show

if TYPE_CHECKING:
    from outspoken.cli.settings import Fields

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file of settings; see docs/cli.md.")
]
FieldsOption = Annotated[bool, typer.Option("--fields", help="List all settings with their defaults, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document at the end, nothing else.")]


# What each training command is for, and an option that a first run needs.
METHODS = {
    "sft": ("Supervised fine-tuning", "--learning_rate 1e-5", "the adapter's"),
    "reward": ("Reward modelling from preferences", "--learning_rate 1e-4", "the adapter's"),
    "dpo": ("Direct preference optimisation and its relatives", "--loss_type apo_zero", "the adapter's"),
    "kto": ("Learning from answers that are desirable or not", "--beta 0.1", "the adapter's"),
    "grpo": (
        "Group-relative policy optimisation",
        "--reward_funcs rewards.py:score",
        "the rewards' and the adapter's",
    ),
    "rloo": (
        "REINFORCE with a leave-one-out baseline",
        "--reward_funcs rewards.py:score",
        "the rewards' and the adapter's",
    ),
    "distillation": (
        "On-policy distillation from a teacher",
        "--teacher_model_name_or_path TEACHER",
        "the adapter's",
    ),
}


def command(method: str) -> Callable[..., None]:
    """The command that trains with a method."""
    title, option, parts = METHODS[method]

    def train(
        context: typer.Context, config: ConfigOption = None, fields: FieldsOption = False, json: JsonOption = False
    ) -> None:
        _train(method, context, config, fields, json)

    train.__name__ = method
    train.__doc__ = f"""{title}: `outspoken {method} --config run.yaml {option}`.

    Every setting of the trainer's config, and the model's, the dataset's, {parts}, is a line of the YAML file or an
    option `--field value`; the option wins. `--fields` lists them.
    """
    return train


def _train(method: str, context: typer.Context, config: str | None, list_fields: bool, json: bool) -> None:
    from outspoken.cli import launch, training

    if list_fields:
        _print_fields(training.fields_of(method), json)
        return
    launched = launch.launch(method, config, context.args, json)
    if launched is not None:
        raise typer.Exit(launched)
    # What trainers print must not mix with the one document that a program reads.
    with clean_stdout() if json else contextlib.nullcontext():
        result = training.train(method, config, context.args)
    if not result.pop("main_process"):
        return
    if json:
        print_json(result)
    else:
        _print_result(result)
    raise typer.Exit(launch.told(BAD if (result["verdict"] or {}).get("state") == "broken" else FINE))


def _print_result(result: dict[str, Any]) -> None:
    from outspoken.diagnostics.sinks import verdict_line

    print(f"[outspoken] trained {result['steps']} steps; the model is in {result['output_dir']}")
    if result["verdict"] is not None:
        print(f"[outspoken] {verdict_line(result['verdict'])}")
    if result["run_dir"] is not None:
        print(f"[outspoken] more: outspoken diagnose {result['run_dir']}")


def _print_fields(fields: "Fields", json: bool) -> None:
    rows = fields.table()
    if json:
        print_json(rows)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("field", "default"):
        table.add_column(title, no_wrap=True)
    for title in ("takes", "help"):
        table.add_column(title)
    for row in rows:
        live = " Can change while it trains." if row["live"] else ""
        takes = row["takes"] if len(row["takes"]) <= 60 else row["takes"][:59] + "…"
        name = Text(row["name"], "bold" if row["live"] else "")
        table.add_row(name, Text(str(row["default"])[:24]), Text(takes), Text(row["help"] + live))
    show(table)
