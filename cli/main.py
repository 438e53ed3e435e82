"""The console script `outspoken`. Each command is one module; nothing heavy is loaded before a command needs it."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

import typer

import outspoken
from outspoken.cli import apply, diagnose, env, explain, gate, rules, train, vllm_serve, watch
from outspoken.cli.common import CANNOT_JUDGE, CommandError, print_json

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PIPE_CLOSED = 141  # … and for a reader that went away

app = typer.Typer(
    name="outspoken",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TRAIN = {"allow_extra_args": True, "ignore_unknown_options": True}
for method in train.METHODS:
    app.command(context_settings=_TRAIN)(train.command(method))
if find_spec("outspoken.cli.demo") is not None:
    from outspoken.cli.demo_command import demo

    app.command()(demo)
app.command()(diagnose.diagnose)
app.command()(watch.watch)
app.command()(explain.explain)
app.command()(rules.rules)
app.command()(apply.apply)
app.command()(gate.gate)
app.command()(env.env)
app.command("vllm-serve", context_settings=_TRAIN)(vllm_serve.vllm_serve)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"outspoken {outspoken.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Post-training whose trainers say what is wrong with a run, why, and which setting to change.

    Exit codes: 0 fine, 1 the run is bad, 2 it cannot be judged or the input is bad.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. What goes wrong is one sentence, never a traceback.

    `OUTSPOKEN_DEBUG=1` shows tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="outspoken", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get("OUTSPOKEN_DEBUG"):
            raise
        if isinstance(error, CommandError):
            sentence, code = str(error), error.exit_code
        elif hasattr(error, "format_message"):  # typer's errors of usage; their common base is not public
            sentence, code = error.format_message(), CANNOT_JUDGE
        else:
            sentence, code = f"{type(error).__name__}: {error} (OUTSPOKEN_DEBUG=1 shows where)", CANNOT_JUDGE
        sentence = " ".join(sentence.split())
        if "--json" in arguments:
            print_json({"error": sentence})
        else:
            from outspoken.diagnostics.sinks import escaped

            sys.stderr.write(f"outspoken: {escaped(sentence, 2000)}\n")
        return code


if __name__ == "__main__":
    sys.exit(main())
