"""Training on several processes: `--accelerate_config zero2` or `--num_processes 4` starts the command anew through
accelerate, once for each process.

`python -m outspoken.cli.launch …` is what the processes run.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outspoken.cli.common import BAD, FINE, CommandError

# Set in the processes that were started here: the file that takes the exit code of the first one.
LAUNCHED = "OUTSPOKEN_LAUNCHED"


def launch(method: str, config_file: str | None, tokens: Sequence[str], json: bool) -> int | None:
    """Start the processes that the settings ask for, and return the exit code; None if this process is to train.

    Raises:
        CommandError: a setting is wrong.
    """
    if LAUNCHED in os.environ:
        return None
    from outspoken.cli import training
    from outspoken.cli.settings import merged, read_arguments, read_yaml

    fields = training.fields_of(method)
    given = merged(
        read_yaml(config_file, fields) if config_file is not None else [],
        read_arguments(tokens, fields),
    )
    asked = {g.name: g for g in given if g.name in ("accelerate_config", "num_processes") and g.value is not None}
    if not asked:
        return None
    values: dict[str, Any] = {name: fields.convert(g) for name, g in asked.items()}
    file, processes = settle(values.get("accelerate_config"), values.get("num_processes"))
    return _run(file, processes, [method, *(["--config", config_file] if config_file else []), *tokens], json)


def settle(name: str | None, processes: int | None) -> tuple[Path, int]:
    """The accelerate config to launch with, and how many processes to start.

    Raises:
        CommandError: there is no such config, or not as many devices as it needs.
    """
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    from outspoken.cli.env import accelerate_config, accelerate_configs

    if processes is not None and processes < 1:
        raise CommandError(f"num_processes is {processes}; start at least one.")
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if name is None:
        name = "single_gpu" if processes == 1 else "multi_gpu" if gpus else "ddp_cpu"
    file = accelerate_config(name)
    try:
        config: Any = load_config_from_file(str(file))
    except Exception as error:
        raise CommandError(f"accelerate_config {str(file)!r} cannot be read: {error}") from None
    if processes is None:
        # What comes with the package cannot know this machine.
        own = file in accelerate_configs().values() and not config.use_cpu and config.num_processes > 1
        processes = gpus if own else int(config.num_processes)
    if not config.use_cpu and config.num_machines == 1 and processes > max(gpus, 1):
        raise CommandError(
            f"accelerate_config {name!r} starts one process a GPU, {processes} in all, and this machine has {gpus}; lower "
            "num_processes, or take ddp_cpu."
        )
    if processes < 1:
        raise CommandError(
            f"accelerate_config {name!r} starts one process a GPU, and this machine has none; take ddp_cpu, or give "
            "num_processes."
        )
    return file, processes


def _run(file: Path, processes: int, arguments: Sequence[str], json: bool) -> int:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(file))
    options = ["--config_file", str(file), "--num_processes", str(processes)]
    if config.main_process_port is None and config.num_machines == 1:
        options += ["--main_process_port", "0"]  # any that is free
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(folder) / "exit_code"
        environment = {**os.environ, LAUNCHED: str(code_file)}
        if config.use_cpu:
            environment["ACCELERATE_USE_CPU"] = "true"  # which accelerate forgets where it starts several processes
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--module", __spec__.name, *arguments]
        found = subprocess.call([*command, *(["--json"] if json else [])], env=environment)
        # The launcher knows only whether all went well; the first process knows what did not.
        return int(code_file.read_text()) if code_file.exists() else BAD if found else FINE


def told(code: int) -> int:
    """The exit code of a run that ended by itself, for this process: to the launcher that is a success."""
    if LAUNCHED not in os.environ:
        return code
    Path(os.environ[LAUNCHED]).write_text(str(code))
    return FINE


if __name__ == "__main__":
    from outspoken.cli.main import main

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        os.dup2(2, 1)  # a program reads one document, that of the first process
    exit_code = main()
    if first and exit_code != FINE:
        Path(os.environ[LAUNCHED]).write_text(str(exit_code))
    sys.exit(exit_code)
