"""What the training commands do: settings to model, dataset, rewards and adapter, to a trainer, to a trained model."""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import outspoken
from outspoken.cli.common import BAD, CommandError, note
from outspoken.cli.settings import Fields, Given, merged, one_line, place_of, read_arguments, read_yaml

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class ModelAndData:
    """What a run needs beside its trainer's config. Names are TRL's where TRL has one."""

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Train on several processes: an accelerate config file, or the name of one that `outspoken env` lists."
        },
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "How many processes. Unset: what the accelerate config says, or one."}
    )

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model: a folder, or a name on the hub."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the hub."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Load the weights as this type. Unset: float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation to load with."})

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset's name on the hub."})
    dataset_path: str | None = field(
        default=None,
        metadata={"help": "A dataset on disk: a json, jsonl, csv or parquet file, or a folder of `save_to_disk`."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the hub."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while training instead of before; needs max_steps."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "The split to train on.", "aliases": ["--dataset_train_split"]}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the hub to evaluate on. Unset: the training dataset's."}
    )
    eval_dataset_path: str | None = field(default=None, metadata={"help": "A dataset on disk to evaluate on."})
    eval_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the hub."})
    eval_dataset_split: str | None = field(
        default=None,
        metadata={
            "help": "The split to evaluate on. Unset: 'train' of a file to evaluate on, else no evaluation dataset.",
            "aliases": ["--dataset_test_split"],
        },
    )

    datasets: list[dict] | None = field(
        default=None,
        metadata={
            "help": "A mixture instead of one dataset, in YAML: a list of mappings with `path`, and as needed `name`, "
            "`split`, `columns`, `fraction`, `data_files`."
        },
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share or number of the mixture's rows to evaluate on."}
    )

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; 'all-linear' for all linear layers."}
    )
    lora_target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    lora_task_type: str | None = field(
        default=None, metadata={"help": "The adapter's task type. Unset: CAUSAL_LM, and SEQ_CLS for reward models."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale the adapter by lora_alpha / sqrt(lora_r)."})
    use_dora: bool = field(default=False, metadata={"help": "Adapt direction and magnitude of weights (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base model in 8 bits; needs an adapter."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits; needs an adapter."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Type of 4-bit numbers.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4-bit constants too."})


@dataclass
class Rewards:
    """What is rewarded, for methods that sample."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of outspoken.trainers.rewards, my.module.function, or file.py:function."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A sequence classifier that scores completions; it counts after the functions."},
    )


@dataclass
class Reference:
    """What the policy is held to, for methods that have a reference model."""

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference model. Unset: the model as it is before training."}
    )


# Method -> the trainer's class, and what it needs beside model, dataset and config.
_TRAINERS: dict[str, tuple[str, type | None]] = {
    "sft": ("SFTTrainer", None),
    "reward": ("RewardTrainer", None),
    "dpo": ("DPOTrainer", Reference),
    "kto": ("KTOTrainer", Reference),
    "grpo": ("GRPOTrainer", Rewards),
    "rloo": ("RLOOTrainer", Rewards),
    "distillation": ("DistillationTrainer", None),
}


def fields_of(method: str) -> Fields:
    """All settings of a training command."""
    trainer, extra = _TRAINERS[method]
    config = getattr(outspoken, trainer.replace("Trainer", "Config"))
    return Fields(ModelAndData, *([extra] if extra is not None else []), config)


def train(method: str, config_file: str | None, tokens: Sequence[str]) -> dict[str, Any]:
    """Train, save the model, and tell what came of it.

    Raises:
        CommandError: a setting is wrong (exit code 2), or training failed (exit code 1).
    """
    fields = fields_of(method)
    given = merged(
        read_yaml(config_file, fields) if config_file is not None else [],
        read_arguments(tokens, fields),
    )
    built = fields.build(given)
    setup, config = built[0], built[-1]
    checkpoint = _checkpoint(config, given)
    trainer = _trainer(method, built, given, config_file)
    try:
        trained = trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if os.environ.get("OUTSPOKEN_DEBUG"):
            raise
        step = trainer.state.global_step
        raise CommandError(
            f"training failed at step {step}: {type(error).__name__}: {one_line(error)} OUTSPOKEN_DEBUG=1 shows where.",
            exit_code=BAD,
        ) from None
    trainer.save_model(config.output_dir)
    trainer.create_model_card(dataset_name=setup.dataset_name)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=setup.dataset_name)
    run_dir = os.path.join(config.output_dir, "outspoken")
    known = config.diagnose and os.path.isdir(run_dir)
    return {
        "method": method,
        "status": "finished",
        "steps": trainer.state.global_step,
        "output_dir": config.output_dir,
        "run_dir": run_dir if known else None,
        "verdict": _verdict(run_dir) if known else None,
        "metrics": trained.metrics,
        "main_process": trainer.is_world_process_zero(),
    }


def _trainer(method: str, built: tuple[Any, ...], given: Sequence[Given], config_file: str | None) -> Any:
    setup, config = built[0], built[-1]
    where = f"{config_file}: " if config_file is not None else ""
    if setup.model_name_or_path is None:
        raise CommandError(f"{where}model_name_or_path is missing; give a folder or a name on the hub.")
    model = Path(setup.model_name_or_path).expanduser()
    if not model.exists() and (model.is_absolute() or setup.model_name_or_path.startswith((".", "~"))):
        at = _place("model_name_or_path", given, where)
        raise CommandError(f"{at}model_name_or_path {str(model)!r} does not exist.")
    _check_adapter(setup, given)
    config.model_init_kwargs = {**(config.model_init_kwargs or {}), **_model_init(setup)} or None
    arguments: dict[str, Any] = {
        "model": setup.model_name_or_path,
        "args": config,
    }
    if setup.datasets is not None:
        arguments |= _mixture(setup, given, where)
    else:
        arguments["train_dataset"] = _dataset(setup, "", given, where)
        arguments["eval_dataset"] = _eval_dataset(setup, given, where)
    try:
        arguments["quantization_config"] = _quantization(setup)
        arguments["peft_config"] = _adapter(setup, "SEQ_CLS" if method == "reward" else "CAUSAL_LM")
        name, extra = _TRAINERS[method]
        if extra is Rewards:
            arguments["reward_funcs"] = _reward_functions(built[1], given, where)
        if extra is Reference and built[1].ref_model_name_or_path is not None:
            arguments["ref_model"] = _reference_model(built[1].ref_model_name_or_path, config)
        return getattr(outspoken, name)(**arguments)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("OUTSPOKEN_DEBUG"):
            raise
        at = place_of(str(error), given)
        if not at and isinstance(error, OSError):  # the hub's errors do not say what was asked for
            at = _place("model_name_or_path", given, where)
            at += f"model_name_or_path {setup.model_name_or_path!r} cannot be loaded: "
        raise CommandError(f"{at or where}{one_line(error)}") from None


def _place(name: str, given: Sequence[Given], default: str) -> str:
    return next((f"{g.where}: " for g in given if g.name == name), default)


# ---------------------------------------------------------------------- model


def _model_init(setup: ModelAndData) -> dict[str, Any]:
    named = {
        "revision": setup.model_revision,
        "dtype": setup.dtype,
        "attn_implementation": setup.attn_implementation,
    }
    return {name: value for name, value in named.items() if value is not None}


def _check_adapter(setup: ModelAndData, given: Sequence[Given]) -> None:
    if setup.use_peft:
        return
    for g in given:
        if g.name.startswith("lora_") or g.name in ("use_rslora", "use_dora"):
            note(f"{g.where}: {g.name} has no effect without use_peft: true.")
        if g.name in ("load_in_4bit", "load_in_8bit") and getattr(setup, g.name):
            raise CommandError(f"{g.where}: {g.name} needs an adapter to train; set use_peft: true.")


def _adapter(setup: ModelAndData, task_type: str) -> Any:
    if not setup.use_peft:
        return None
    from peft import LoraConfig

    targets: Any = setup.lora_target_modules
    return LoraConfig(
        task_type=setup.lora_task_type or task_type,
        r=setup.lora_r,
        lora_alpha=setup.lora_alpha,
        lora_dropout=setup.lora_dropout,
        target_modules=targets[0] if targets and len(targets) == 1 else targets,
        target_parameters=setup.lora_target_parameters,
        modules_to_save=setup.lora_modules_to_save,
        use_rslora=setup.use_rslora,
        use_dora=setup.use_dora,
    )


def _reference_model(path: str, config: Any) -> Any:
    from outspoken.trainers.loading import load_model

    return load_model(path, config.model_init_kwargs, trust_remote_code=config.trust_remote_code)


def _quantization(setup: ModelAndData) -> Any:
    if not (setup.load_in_4bit or setup.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if setup.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=setup.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=setup.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=setup.dtype if setup.dtype not in (None, "auto") else None,
    )


# ---------------------------------------------------------------------- data


def _eval_dataset(setup: ModelAndData, given: Sequence[Given], where: str) -> Any:
    if setup.eval_dataset_name or setup.eval_dataset_path:
        return _dataset(setup, "eval_", given, where)
    if setup.eval_dataset_split:
        return _dataset(setup, "", given, where, split_field="eval_dataset_split")
    return None


def _mixture(setup: ModelAndData, given: Sequence[Given], where: str) -> dict[str, Any]:
    """Train and evaluation dataset of the field `datasets`."""
    from outspoken.trainers.data.mixtures import DatasetMixtureConfig, get_dataset

    at = _place("datasets", given, where)
    for name in ("dataset_name", "dataset_path"):
        if getattr(setup, name):
            raise CommandError(f"{at}give either datasets or {name}, not both.")
    try:
        mixture = DatasetMixtureConfig(list(setup.datasets or []), setup.dataset_streaming, setup.test_split_size)  # type: ignore[arg-type]
        found = get_dataset(mixture)
    except Exception as error:  # whatever a file's or a server's content makes the loaders raise
        raise CommandError(f"{at}datasets cannot be loaded: {one_line(_deepest(error))}") from None
    return {"train_dataset": found["train"], "eval_dataset": found.get("test")}


def _dataset(
    setup: ModelAndData, prefix: str, given: Sequence[Given], where: str, split_field: str | None = None
) -> Any:
    """The dataset that the fields `<prefix>dataset_…` name."""
    name, path = getattr(setup, f"{prefix}dataset_name"), getattr(setup, f"{prefix}dataset_path")
    split_field = split_field or f"{prefix}dataset_split"
    split = getattr(setup, split_field) or "train"
    source = f"{prefix}dataset_{'path' if path else 'name'}"
    at, at_split = _place(source, given, where), _place(split_field, given, where)
    if name and path:
        raise CommandError(f"{at}give either {prefix}dataset_name or {prefix}dataset_path, not both.")
    if not name and not path:
        raise CommandError(f"{where}no dataset is named; give dataset_path (a file) or dataset_name (on the hub).")
    import datasets

    try:
        if path:
            loaded = _from_disk(path, f"{at}{source}", setup.dataset_streaming)
        else:
            loaded = datasets.load_dataset(
                name, getattr(setup, f"{prefix}dataset_config"), streaming=setup.dataset_streaming
            )
    except CommandError:
        raise
    except Exception as error:  # whatever a file's or a server's content makes the loaders raise
        raise CommandError(f"{at}{source} {path or name!r} cannot be loaded: {one_line(_deepest(error))}") from None
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        # A single file has no splits: it is 'train', whatever it is used for.
        raise CommandError(f"{at_split}{split_field} is {split!r}, but {path or name} has {', '.join(loaded)}.")
    return loaded[split]


def _from_disk(path: str, field_name: str, streaming: bool = False) -> Any:
    import datasets

    found = Path(path).expanduser()
    if not found.exists():
        raise CommandError(f"{field_name} {path!r} does not exist (looked in {Path.cwd()}).")
    if found.is_dir():
        if (found / "dataset_info.json").exists() or (found / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(found))
            if not streaming:
                return saved
            if isinstance(saved, datasets.Dataset):
                return saved.to_iterable_dataset()
            return {name: split.to_iterable_dataset() for name, split in saved.items()}
        return datasets.load_dataset(str(found), streaming=streaming)
    suffixes = [s for s in found.suffixes if s not in (".gz", ".zst", ".xz", ".bz2")]
    kind = _FILE_FORMATS.get(suffixes[-1].lower() if suffixes else "")
    if kind is None:
        raise CommandError(f"{field_name} {path!r} is no {', '.join(_FILE_FORMATS)} file.")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a file that is wrong is told once, by us
    try:
        return datasets.load_dataset(kind, data_files=str(found), streaming=streaming)
    finally:
        datasets.logging.set_verbosity(verbosity)


def _deepest(error: BaseException) -> BaseException:
    """The error behind the loaders' own, which says what is wrong with the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# ---------------------------------------------------------------------- rewards


def _reward_functions(rewards: Rewards, given: Sequence[Given], where: str) -> list[Any]:
    functions: list[Any] = [
        reward_function(name, _place("reward_funcs", given, where)) for name in rewards.reward_funcs or []
    ]
    if rewards.reward_model_name_or_path is not None:
        functions.append(rewards.reward_model_name_or_path)
    if not functions:
        raise CommandError(
            f"{where}no reward is named; give reward_funcs ({', '.join(ready_made_rewards())}, my.module.function, "
            "file.py:function) or reward_model_name_or_path."
        )
    return functions


def ready_made_rewards() -> dict[str, Callable[..., Any]]:
    """The reward functions of the library that are used by name."""
    from outspoken.trainers import rewards

    return {
        name: value
        for name, value in vars(rewards).items()
        if name.endswith("_reward") and callable(value) and not name.startswith(("_", "get_"))
    }


def reward_function(name: str, where: str = "") -> Callable[..., Any]:
    """The function that a name stands for: ready-made, `my.module.function`, or `file.py:function`.

    Raises:
        CommandError: there is none.
    """
    ready = ready_made_rewards()
    if name in ready:
        return ready[name]
    file, colon, function = name.rpartition(":")
    if colon:
        module = _module_of_file(file, name, where)
    else:
        module_name, dot, function = name.rpartition(".")
        if not dot:
            near = difflib.get_close_matches(name, ready, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"ready-made are {', '.join(ready)}."
            raise CommandError(f"{where}reward_funcs names {name!r}, which is no reward function; {hint}")
        module = _module(module_name, name, where)
    found = getattr(module, function, None)
    if not callable(found):
        what = "is no function" if found is not None else "does not exist"
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(function, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CommandError(f"{where}reward_funcs names {name!r}, but {function!r} {what} there{hint}")
    return found


def _module(module_name: str, name: str, where: str) -> Any:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # a script's own modules, as `python -m` finds them
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(
            f"{where}reward_funcs names {name!r}, but {module_name!r} cannot be imported: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from None


def _module_of_file(file: str, name: str, where: str) -> Any:
    path = Path(file).expanduser()
    if not path.is_file():
        raise CommandError(f"{where}reward_funcs names {name!r}, but there is no file {file!r} (in {Path.cwd()}).")
    module_name = f"outspoken_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise CommandError(f"{where}reward_funcs names {name!r}, but {file!r} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that its functions can be pickled for worker processes
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(
            f"{where}reward_funcs names {name!r}, but {file} fails when it is imported: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from None
    return module


# ---------------------------------------------------------------------- around training


def _checkpoint(config: Any, given: Sequence[Given]) -> str | None:
    """The checkpoint to resume from: a folder, or with `true` or `last` the newest one in the output directory."""
    wanted = config.resume_from_checkpoint
    if not wanted or str(wanted).lower() in ("false", "no"):
        return None
    if str(wanted).lower() not in ("true", "last", "yes"):
        if not Path(str(wanted)).is_dir():
            at = _place("resume_from_checkpoint", given, "")
            raise CommandError(f"{at}resume_from_checkpoint {wanted!r} is no folder; name a checkpoint, or 'last'.")
        return str(wanted)
    from outspoken.trainers.rollouts.checkpoint import last_whole

    last = last_whole(config.output_dir)  # a run that was killed while saving leaves the beginning of one behind
    if last is None:
        note(f"there is no checkpoint in {config.output_dir} yet, so training starts from the beginning")
    return last


def _verdict(run_dir: str) -> dict[str, Any] | None:
    from outspoken.diagnostics.rundir import VERDICT, read_json

    try:
        return read_json(Path(run_dir) / VERDICT)
    except (OSError, ValueError):
        return None
