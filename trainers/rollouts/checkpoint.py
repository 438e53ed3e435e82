"""What a trainer that samples holds between steps, kept with its checkpoints: so a resumed run goes on as it was."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from outspoken.trainers.measuring import is_raised_together, on_any_process
from outspoken.trainers.rollouts.batch import RolloutBatch

logger = logging.getLogger(__name__)

_STEP = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)$")


@contextlib.contextmanager
def saved_on_failure(trainer: Any) -> Iterator[None]:
    """Leave a checkpoint of the last finished update step behind when sampling or scoring fails for good.

    Several processes all write their part, so only where they fail together (`raise_together`).
    """
    try:
        yield
    except Exception as error:
        step, folder = trainer.state.global_step, _folder(trainer, None)
        together = trainer.accelerator.num_processes == 1 or is_raised_together(error)
        if trainer._is_sampling and step > 0 and together:
            if not on_any_process(trainer.accelerator, os.path.isdir(folder)):
                trainer._save_checkpoint(trainer.model, None)
            error.add_note(f"The run is saved up to step {step} in {folder}; resume from there.")
        raise


def save(trainer: Any, state: dict[str, Any], trial: Any) -> None:
    """Write this process's state into the checkpoint that the trainer is about to write.

    Before the rest: a checkpoint that has a `trainer_state.json`, which comes last, has the state of every process.
    """
    accelerator = trainer.accelerator
    state = {**state, "processes": accelerator.num_processes}
    save_state(_folder(trainer, trial), accelerator.process_index, state)
    accelerator.wait_for_everyone()


def load(trainer: Any, folder: str | None) -> dict[str, Any] | None:
    """This process's state from a checkpoint; None without one.

    None also where the state of some process is missing, or of another number of processes: they sample together, so
    that all go on with what they have, or none. All processes must call it.
    """
    if folder is None:
        return None
    accelerator = trainer.accelerator
    state = load_state(folder, accelerator.process_index)
    processes = None if state is None else state.pop("processes", None)
    fits = torch.tensor([processes == accelerator.num_processes], device=accelerator.device)
    gathered: Any = accelerator.gather(fits)
    if bool(gathered.all()):
        return state
    if accelerator.is_main_process:
        what = "is not there or cannot be read" if processes is None else f"is of {processes} process(es)"
        logger.warning(
            f"What was sampled and not yet used up at {folder} {what} (there are {accelerator.num_processes} now); the "
            "rest of that generation batch is sampled anew."
        )
    return None


def last_whole(folder: str) -> str | None:
    """The newest checkpoint in an output directory that was written to its end; None if there is none.

    A run that is killed while it saves leaves the beginning of a checkpoint behind.
    """
    places = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    whole = [place for place in places if _STEP.search(place) and _is_whole(place)]
    return max(whole, key=lambda place: int(_STEP.search(place)[1]), default=None)  # type: ignore[index]


def _is_whole(checkpoint: str) -> bool:
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE_NAME)) as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False


def _folder(trainer: Any, trial: Any) -> str:
    return os.path.join(trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")


def _path(folder: str, process: int) -> str:
    return os.path.join(folder, f"rollouts_{process}.pt")


def save_state(folder: str, process: int, state: dict[str, Any]) -> None:
    """Write a process's state: numbers, texts, tensors, `RolloutBatch`es, and lists and dicts of them.

    A file that cannot be written is told of, and does not end the run: it costs a resumed run the rest of one
    generation batch.
    """
    path = _path(folder, process)
    try:
        os.makedirs(folder, exist_ok=True)
        torch.save(_plain(state), f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}); a run resumed from it samples its first batch anew.")


def load_state(folder: str, process: int) -> dict[str, Any] | None:
    """What `save_state` wrote, on the CPU; None if there is nothing that can be read. Nothing in it is executed."""
    path = _path(folder, process)
    if not os.path.exists(path):
        return None
    try:
        return _rich(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        logger.warning(f"{path} cannot be read ({type(error).__name__}); the first batch is sampled anew.")
        return None


_BATCH = "__rollout_batch__"


def _plain(value: Any) -> Any:
    if isinstance(value, RolloutBatch):
        return {_BATCH: {f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a slice would be saved with the whole it is cut from
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        if _BATCH in value:
            return RolloutBatch(**{name: _rich(item) for name, item in value[_BATCH].items()})
        return {key: _rich(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rich(item) for item in value]
    return value
