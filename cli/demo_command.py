"""`outspoken demo`: the command around `cli/demo.py`, which loads torch."""

import contextlib
import dataclasses
from typing import Annotated

import typer

from outspoken.cli.common import CommandError, clean_stdout, print_json


def demo(
    fault: Annotated[str, typer.Option(help="What is planted: truncation or learning_rate.")] = "truncation",
    seed: Annotated[int, typer.Option(help="Seed of the model, the data and the sampling.")] = 0,
    output_dir: Annotated[str, typer.Option(metavar="DIR", help="Where the runs are written.")] = "outspoken-demo",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end, nothing else.")] = False,
) -> None:
    """A healthy run, then one with a planted fault that is named, fixed while it trains, and checked. Takes minutes."""
    from outspoken.cli.demo import FAULTS
    from outspoken.cli.demo import demo as show_it

    if fault not in FAULTS:
        raise CommandError(f"--fault {fault!r} is not known; choose one of {', '.join(FAULTS)}.")
    with clean_stdout() if json else contextlib.nullcontext():
        outcomes = show_it(fault=fault, seed=seed, output_dir=output_dir)
    if json:
        healthy, faulty = (dataclasses.asdict(outcome) for outcome in outcomes)
        print_json({"fault": fault, "seed": seed, "healthy": healthy, "faulty": faulty})
