"""A run's own settings, where they lie beside its log.

Trainers leave their configuration in the run's folder: `args.json`, `config.yaml`, Hydra's `.hydra/`, W&B's
`files/config.yaml`, PRIME-RL's `configs/*.toml` … Only known names in the log's own folder are read, or in a folder
above it whose layout says that it belongs to the same run. Nothing is executed or unpickled, and nothing here raises: a
file that cannot be read becomes a note.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from yaml import YAMLError

from outspoken.diagnostics.patches import same_value
from outspoken.diagnostics.records import as_number
from outspoken.diagnostics.sources import mlflow_files, tensorboard, wandb_files
from outspoken.diagnostics.sources.config import load, load_yaml
from outspoken.diagnostics.sources.files import UnreadableLog, listed
from outspoken.diagnostics.sources.names import Family
from outspoken.diagnostics.sources.settings import (
    ADAPTER,
    AXOLOTL,
    DEEPSPEED,
    FIELDS,
    LLAMA_FACTORY,
    Understood,
    is_secret,
    part,
    translate,
    typed,
    understand,
    without_secrets,
)

__all__ = ["AXOLOTL", "LLAMA_FACTORY", "Beside", "contradiction", "find", "given", "translate"]

MAX_YAML = 256 * 1024  # bytes of a neighbour that is read without being asked for
MAX_ENTRIES = 1000  # of a folder, that are looked at

# Training configurations, the ones that the run wrote itself first.
_CONFIGS = (
    "args.json",
    "training_args.json",
    "training_args.yaml",
    "llamaboard_config.yaml",
    "torchtune_config.yaml",
    "run_config.json",
    "run_config.yaml",
    "run_config.yml",
    "train_config.json",
    "train_config.yaml",
    "train_config.yml",
    "config.json",
    "config.yaml",
    "config.yml",
    "hparams.yaml",
    "train.yaml",
    "train.yml",
)
_TOMLS = ("rl.toml", "trainer.toml", "orchestrator.toml", "sft.toml", "train.toml", "orch.toml")  # PRIME-RL's
_SECTIONS = {"trainer": "trainer", "train": "trainer", "orchestrator": "orchestrator", "orch": "orchestrator"}
_DEEPSPEED = ("ds_config.json", "deepspeed_config.json", "deepspeed.json")
_OF_TRAINING = {"lr", "learning_rate", "batch_size", "train_batch_size", "epochs", "num_epochs"}
_PICKLE = "training_args.bin"

# A folder of one of these names belongs to the run above it, where one of the marks shows that a run lies there.
_SUBFOLDERS = re.compile(r"(?i)^(runs|logs?|tb|tensorboard(_logs?)?|metrics|streams|trainer|orchestrator|files)$")
_MARKS = (
    _PICKLE,
    "args.json",
    "training_args.json",
    "trainer_state.json",
    "all_results.json",
    "torchtune_config.yaml",
    "configs/trainer.toml",
    "configs/sft.toml",
)
_WANDB_RUN = re.compile(r"^(offline-)?run-")
_CHECKPOINT = re.compile(r"^(checkpoint|global_step|step|epoch)[-_]\d+$")


@dataclass
class Beside:
    """What lies beside a log.

    Attributes:
        settings: by our field names. complete: whether a training configuration was found, with a learning rate and a
            size of batches, rather than a part such as adapter_config.json.
        sources: the files that were read, relative to the log's folder. notes: one sentence each.
        method: the training method, where a setting names it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    method: str | None = None


def find(path: Path, family: Family, header: Mapping[str, Any] | None = None) -> Beside:
    """The settings that lie beside a log, or in it.

    Args:
        path: the log: a file, or a directory of TensorBoard, W&B or MLflow.
        family: the system that wrote it.
        header: what the log's rows before the first step say of the run.
    """
    found = Beside()
    try:
        here = path if path.is_dir() else path.parent
        if header:
            _take(understand(header, family), here, here, found)
        for folder in _folders(here):
            _read_configs(folder, here, family, found)
        _read_log_itself(path, here, family, found)
        for folder in _folders(here):
            _read_parts(folder, here, found)
            if not found.complete and _is_file(folder / _PICKLE):
                found.notes.append(
                    f"{_shown(folder / _PICKLE, here)} holds settings of the run, but it is a pickle, which can run "
                    "code, and is never opened. Give settings by --config."
                )
    except OSError as error:
        found.notes.append(f"What lies beside the log could not be looked at ({error.strerror or error}).")
    return found


def given(config: Mapping[str, Any], family: Family) -> Beside:
    """Settings that a user hands over, in our names or in those of the system that wrote the log.

    Names of our own are taken as they are, as are unknown ones of a flat configuration. One in another system's names is
    translated, and the note says what of it was understood. Keys and passwords are left out.

    Args:
        config: as `read_config` gives it.
    """
    if not config:
        return Beside()
    seen = understand(config, family)
    nested = any(isinstance(v, Mapping) and k not in FIELDS and not k.endswith("_kwargs") for k, v in config.items())
    if not seen.foreign and not (nested and seen.unknown):
        settings = {}
        for name, value in config.items():
            if not is_secret(name):
                settings[name] = _typed_if_fit(name, without_secrets(value))
        return Beside({**seen.settings, **settings}, True, method=seen.method)
    count = len(seen.settings)
    whose = f"{seen.title}'s names" if seen.foreign else "sections"
    note = f"The configuration that was given is in {whose}; {count} of its settings were understood"
    note += f" ({listed(sorted(seen.settings))})" if count else ""
    unknown = [name for name in seen.unknown if not is_secret(name)]
    note += f"; these are of no use here: {listed(unknown)}." if unknown else "."
    notes = [note, *(f"In the configuration that was given, {each}; it was passed over." for each in seen.unfit)]
    return Beside(seen.settings, count > 0, notes=notes, method=seen.method)


def contradiction(settings: Mapping[str, Any], known: Mapping[str, Any], top_rate: float | None = None) -> str | None:
    """Why settings found beside a log cannot be this run's; None if nothing speaks against it.

    Args:
        known: settings that the log itself holds (`config_of_state`).
        top_rate: the highest learning rate that the log shows.
    """
    for name in ("logging_steps", "save_steps", "eval_steps"):
        mine, its = as_number(settings.get(name)), as_number(known.get(name))
        if mine is not None and its is not None and mine >= 1 and its >= 1 and not same_value(mine, its):
            return f"they say {name} {mine:g}, the log {its:g}"
    rate = as_number(settings.get("learning_rate"))
    if rate is not None and top_rate is not None and 0 < 1.01 * rate < top_rate:
        return f"they say learning_rate {rate:g}, but the log shows {top_rate:g}"
    return None


# ---------------------------------------------------------------------- where to look


def _folders(here: Path) -> list[Path]:
    """The log's folder, and those above it that belong to the same run, nearest first."""
    here = here.absolute()
    folders = [here]
    if _CHECKPOINT.match(here.name):
        folders.append(here.parent)
    elif here.parent.name == "runs" and _has_marks(here.parent.parent):  # transformers' output_dir/runs/<date>_<host>
        folders.append(here.parent.parent)
    elif _SUBFOLDERS.match(here.name) and (_WANDB_RUN.match(here.parent.name) or _has_marks(here.parent)):
        folders.append(here.parent)
    streams = [above.parent for above in (here, *here.parents)[:4] if above.name == "streams"]  # PipelineRL
    for above in (here.parent, here.parent.parent, *streams):
        if above not in folders and _is_file(above / ".hydra" / "config.yaml"):  # Hydra marks a run's folder
            folders.append(above)
            break
    return folders


def _has_marks(folder: Path) -> bool:
    return any(_is_file(folder / mark) for mark in _MARKS) or next(_entries(folder, "checkpoint-*"), None) is not None


def _entries(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from islice(sorted(folder.glob(pattern)), MAX_ENTRIES)
    except OSError:
        return


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


# ---------------------------------------------------------------------- what to read


def _read_configs(folder: Path, here: Path, family: Family, found: Beside) -> None:
    """The training configurations of one folder."""
    hydra = folder / ".hydra" / "config.yaml"
    if not (_is_file(hydra) and _try(hydra, here, family, found)):
        overrides = folder / ".hydra" / "overrides.yaml"
        if _is_file(overrides):
            _try(overrides, here, family, found, _overrides)
    for name in ("files/config.yaml", *_CONFIGS):
        if _is_file(folder / name):
            _try(folder / name, here, family, found)
    for toml in _tomls(folder, family):
        _try(toml, here, family, found)
    runs = [run for kind in ("run-*", "offline-run-*") for run in _entries(folder / "wandb", kind) if run.is_dir()]
    if len(runs) == 1 and _is_file(runs[0] / "files" / "config.yaml"):
        _try(runs[0] / "files" / "config.yaml", here, family, found)
    elif len(runs) > 1 and not found.complete:
        found.notes.append(
            f"{len(runs)} W&B runs lie in {_shown(folder / 'wandb', here)}; which one is this run's is not told, so "
            "their settings were not read. Give settings by --config."
        )
    for command in (folder / "wandb-metadata.json", folder / "files" / "wandb-metadata.json"):
        if not found.complete and _is_file(command):
            _try(command, here, family, found, _command_of)


def _tomls(folder: Path, family: Family) -> list[Path]:
    if family.name != "prime_rl":
        return []
    known = [folder / place / name for place in ("configs", "") for name in _TOMLS]
    known = [path for path in known if _is_file(path)]
    alone = [path for path in _entries(folder, "*.toml") if _is_file(path) and path.name != "pyproject.toml"]
    return known or (alone if len(alone) == 1 else [])


def _read_parts(folder: Path, here: Path, found: Beside) -> None:
    """Files of one folder that hold some settings, but are no training configuration."""
    adapter = folder / "adapter_config.json"
    if _is_file(adapter):
        raw = _load(adapter, here, found)
        if raw and "peft_type" in raw:
            told: dict[str, Any] = {"use_peft": True}
            _merge({**told, **(part(raw, ADAPTER) if raw["peft_type"] == "LORA" else {})}, adapter, here, found)
    engines = [folder / name for name in _DEEPSPEED if _is_file(folder / name)]
    if len(engines) == 1:
        raw = _load(engines[0], here, found)
        if raw and (told := part(raw, DEEPSPEED)):
            _merge(told, engines[0], here, found)


def _read_log_itself(path: Path, here: Path, family: Family, found: Beside) -> None:
    """Settings inside the log: W&B's file, MLflow's parameters, the text that transformers puts into TensorBoard."""
    try:
        raw = _settings_inside(path)
    except Exception as error:  # settings are a bonus: whatever is wrong with them, the log itself can be read
        found.notes.append(f"The settings inside {path.name} could not be read ({str(error)[:200]}).")
        return
    if raw:
        _take(understand(raw, family), path, here, found)


def _settings_inside(path: Path) -> Mapping[str, Any]:
    """What a container's reader tells of the run's settings, by its own names; nothing if it holds none."""
    if path.is_dir() or path.suffix == ".db":
        if mlflow_files.is_mlflow(path):
            return mlflow_files.settings(path)
        if wandb_files.is_wandb_directory(path):
            return wandb_files.settings(path)
    elif path.suffix == ".wandb":
        return wandb_files.settings(path)
    return tensorboard.settings([path]) if path.is_dir() or "tfevents" in path.name else {}


# ---------------------------------------------------------------------- reading one file


def _load(path: Path, here: Path, found: Beside) -> dict[str, Any] | None:
    try:
        return load(path, MAX_YAML)
    except UnreadableLog as error:
        why = str(error).removeprefix(f"{path}: ")
        found.notes.append(f"{_shown(path, here)} lies beside the log and was not read: {why}")
    return None


def _try(
    path: Path,
    here: Path,
    family: Family,
    found: Beside,
    read: Callable[[Path, Path, Beside], Mapping[str, Any] | None] = _load,
) -> bool:
    """Whether the file at `path` gave settings."""
    raw = read(path, here, found)
    if not raw:
        return False
    if path.suffix == ".toml" and path.stem in _SECTIONS:
        raw = {_SECTIONS[path.stem]: raw}
    seen = understand(raw, family)
    last = {name.rpartition(".")[2] for name in seen.unknown}
    if not seen.settings and not seen.model and last & _OF_TRAINING:
        found.notes.append(
            f"{_shown(path, here)} lies beside the log, but none of its names has a meaning that is known here. Give "
            "settings by --config."
        )
    return _take(seen, path, here, found)


def _take(seen: Understood, path: Path, here: Path, found: Beside) -> bool:
    if not seen.settings or not _merge(seen.settings, path, here, found):
        return False
    found.complete |= seen.training or _is_training(found.settings)
    found.method = found.method or seen.method
    found.notes.extend(f"In {_shown(path, here)}, {each}; it was passed over." for each in seen.unfit)
    return True


def _is_training(settings: Mapping[str, Any]) -> bool:
    sizes = ("per_device_train_batch_size", "generation_batch_size")
    return "learning_rate" in settings and any(name in settings for name in sizes)


def _merge(settings: Mapping[str, Any], path: Path, here: Path, found: Beside) -> bool:
    """Add what one file tells; one that says otherwise than one before is of another run, or stale, and left out."""
    for name, value in settings.items():
        if name in found.settings and not same_value(found.settings[name], value):
            found.notes.append(
                f"{_shown(path, here)} was left out: it says {name} {_said(value)}, {found.sources[0]} says "
                f"{_said(found.settings[name])}."
            )
            return False
    new = settings.keys() - found.settings.keys()
    if not new:
        return True
    found.settings.update({name: value for name, value in settings.items() if name in new})
    found.sources.append(_shown(path, here))
    return True


def _overrides(path: Path, here: Path, found: Beside) -> Mapping[str, Any] | None:
    """Hydra's overrides.yaml, a list of `a.b=c`."""
    try:
        with path.open("rb") as handle:
            items = load_yaml(handle.read(MAX_YAML))
    except (OSError, YAMLError, ValueError, RecursionError) as error:
        found.notes.append(f"{_shown(path, here)} was not read ({type(error).__name__}).")
        return None
    return command_line([item for item in items if isinstance(item, str)]) if isinstance(items, list) else None


def _command_of(path: Path, here: Path, found: Beside) -> Mapping[str, Any] | None:
    """The settings on the command line that wandb-metadata.json recorded."""
    raw = _load(path, here, found) or {}
    words = raw.get("args")
    return command_line([str(word) for word in words]) if isinstance(words, list) else None


def command_line(words: Sequence[str]) -> dict[str, Any]:
    """Settings of a command line: `--name value`, `--name=value`, `--flag`, and Hydra's `a.b=value`."""
    settings: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            settings[name] = value if equals else True
            name = None if equals else name
        elif name is not None:
            before = settings[name]
            settings[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
        elif "=" in word and not word.startswith("~"):
            key, _, value = word.lstrip("+").partition("=")
            settings[key] = value
    return settings


# ---------------------------------------------------------------------- words


def _typed_if_fit(name: str, value: Any) -> Any:
    if name not in FIELDS:
        return value
    try:
        return typed(name, value)
    except ValueError:
        return value


def _shown(path: Path, here: Path) -> str:
    return os.path.relpath(path, here)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:60]
