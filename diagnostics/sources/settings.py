"""Settings of other systems under our names: TRL's fields, whose meanings the rules know.

Only a name that is known here is passed on: a setting read wrongly makes a wrong finding. Values are checked against the
kind of their field, and text such as "1e-5", "True" or "IntervalStrategy.STEPS" becomes what it stands for.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from outspoken.diagnostics.live import SECRET_FIELDS, SECRET_KEYS
from outspoken.diagnostics.sources.names import Family

MAX_NAMES = 20_000  # of one configuration; a YAML file of a few lines can stand for billions
MAX_DEPTH = 12
MAX_HOPS = 8  # of `${a.b}` that stand for one another

# What a value of each field must be; None is allowed for any. `count` is a whole number from 0, `word` a text.
_KINDS = {
    "count": """
        dataloader_num_workers eval_accumulation_steps generation_batch_size gradient_accumulation_steps lora_alpha lora_r
        max_completion_length max_length max_prompt_length num_generations num_generations_eval num_iterations
        pad_to_multiple_of per_device_eval_batch_size per_device_train_batch_size ref_model_sync_steps
        replay_buffer_size save_total_limit steps_per_generation vllm_max_model_length vllm_tensor_parallel_size
        world_size""",
    "whole": "data_seed max_steps seed top_k",
    "number": """
        adam_beta1 adam_beta2 adam_epsilon beta center_rewards_coefficient clip_range cliprange_value delta
        desirable_weight discopop_tau dual_clip entropy_coef epsilon epsilon_high eval_delay eval_steps
        f_alpha_divergence_coef gamma label_smoothing label_smoothing_factor lam ld_alpha learning_rate lmbda
        logging_steps lora_dropout max_grad_norm min_p neftune_noise_alpha num_train_epochs off_policy_mask_threshold
        ref_model_mixup_alpha repetition_penalty router_aux_loss_coef save_steps temperature top_entropy_quantile top_p
        undesirable_weight vllm_gpu_memory_utilization vllm_importance_sampling_cap
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min warmup_ratio warmup_steps weight_decay""",
    "flag": """
        activation_checkpointing activation_offloading assistant_only_loss auto_find_batch_size average_tokens_across_devices bf16
        cast_lm_head_to_fp32 completion_only_loss disable_dropout dynamic_sampling eval_on_start eval_packing fp16
        gradient_checkpointing group_by_length load_best_model_at_end logging_first_step logging_nan_inf_filter
        mask_truncated_completions normalize_advantages packing padding_free precompute_ref_log_probs
        shuffle_dataset sync_ref_model tf32 torch_compile use_adaptive_entropy use_bias_correction_kl use_liger_kernel
        use_peft use_vllm use_weighting vllm_enable_sleep_mode vllm_importance_sampling_correction""",
    "word": """
        advantage_estimator eval_strategy f_divergence_type importance_sampling_level kl_estimator logging_strategy
        lr_scheduler_type metric_for_best_model multi_objective_aggregation optim packing_strategy save_strategy
        truncation_mode vllm_importance_sampling_mode vllm_mode""",
    "words": "loss_type",  # one, or a list of them
    "numbers": "loss_weights reward_weights",
    "scaling": "scale_rewards",  # a word, or True or False as TRL once had it
}
FIELDS: dict[str, str] = {name: kind for kind, names in _KINDS.items() for name in names.split()}

# Names that fields had in earlier releases of transformers and TRL.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "vllm_max_model_len": "vllm_max_model_length",
}

# Names of `TrainingArguments` that other programs hardly use: where they stand, the rest is meant as there too.
_TRAINING_ARGUMENTS = frozenset(
    """gradient_accumulation_steps gradient_checkpointing logging_steps lr_scheduler_type max_grad_norm
    num_train_epochs output_dir per_device_eval_batch_size report_to save_steps save_total_limit warmup_ratio""".split()
)

# Systems whose arguments are transformers' own, with more added.
TRL_LIKE = frozenset({"trl", "unsloth", "axolotl", "llama_factory"})

AXOLOTL = {
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "sequence_len": "max_length",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "sample_packing": "packing",
    "eval_sample_packing": "eval_packing",
    "rl_beta": "beta",
    "orpo_alpha": "beta",
    "dpo_loss_type": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    **{f"trl.{name}": name for name in FIELDS},
    "trl.vllm_max_model_len": "vllm_max_model_length",
}

LLAMA_FACTORY = {
    "cutoff_len": "max_length",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "lora_rank": "lora_r",
    "enable_liger_kernel": "use_liger_kernel",
}

# Its web page writes the same under `train.`, with some names of its own.
_LLAMA_BOARD = {f"train.{theirs}": ours for theirs, ours in LLAMA_FACTORY.items()} | {
    f"train.{name}": name
    for name in """learning_rate num_train_epochs max_grad_norm gradient_accumulation_steps lr_scheduler_type
    logging_steps save_steps warmup_steps packing lora_alpha lora_dropout""".split()
}
_LLAMA_BOARD["train.batch_size"] = "per_device_train_batch_size"

# Fields that its arguments hold too, but mean otherwise: these belong to generating text, and gradients are
# checkpointed unless `disable_gradient_checkpointing` is set, whatever `gradient_checkpointing` says.
_NOT_IN_LLAMA_FACTORY = frozenset(
    {"max_length", "temperature", "top_p", "top_k", "repetition_penalty", "gradient_checkpointing"}
)

# What a loop of somebody's own calls its settings, where only one thing can be meant.
PLAIN = {
    **{
        name: name
        for name in """learning_rate weight_decay max_grad_norm gradient_accumulation_steps warmup_steps warmup_ratio
        max_steps num_train_epochs per_device_train_batch_size max_completion_length num_generations bf16 fp16 seed""".split()
    },
    **dict.fromkeys(("lr", "max_lr"), "learning_rate"),
    **dict.fromkeys(("grad_clip", "clip_grad_norm", "gradient_clip_val"), "max_grad_norm"),
    **dict.fromkeys(("grad_accum_steps", "accumulate_grad_batches"), "gradient_accumulation_steps"),
    **dict.fromkeys(("total_steps", "max_iters", "num_training_steps"), "max_steps"),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs"), "num_train_epochs"),
}

# Facts of PEFT's adapter_config.json, and of a DeepSpeed configuration ("auto" tells nothing and is passed over).
ADAPTER = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}

# What a model's own configuration holds under the same name, and fields beside which the trainer's is meant:
# transformers writes both into one W&B configuration, the trainer's over the model's.
_SHARED_WITH_MODEL = {
    "max_length": (
        "completion_only_loss",
        "precompute_ref_log_probs",
        "center_rewards_coefficient",
        "dataset_text_field",
    ),
    "loss_type": ("num_generations", "precompute_ref_log_probs", "completion_only_loss"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), ("num_generations", "lmbda")),
    "router_aux_loss_coef": (),
}
_OF_A_MODEL = ("architectures", "model_type", "transformers_version")

# Fields that follow from others: system -> field -> factors.
PRODUCTS: dict[str, dict[str, tuple[str, ...]]] = {
    "verl": {
        "generation_batch_size": ("data.train_batch_size", "actor_rollout_ref.rollout.n"),
        "world_size": ("trainer.n_gpus_per_node", "trainer.nnodes"),
    },
}

# Losses that `loss_type` may name here; another system's other words are not passed on.
_LOSSES = frozenset(
    """grpo dr_grpo dapo bnpo cispo sapo vespo luspo gpg reinforce sigmoid hinge ipo exo_pair nca_pair robust bco_pair
    sppo_hard aot aot_unpaired discopop apo_zero apo_down apo_zero_unpaired sft sigmoid_norm kto nll dft""".split()
)

# The setting that names the method: name -> value -> method.
_STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo", "kto": "kto"}
_ESTIMATORS = {"gae": "ppo", "grpo": "grpo", "group_norm": "grpo", "dr_grpo": "grpo", "rloo": "rloo"}
_AXOLOTL_RL = {
    **{name: name for name in ("dpo", "orpo", "kto", "simpo", "grpo")},
    "ipo": "dpo",
    "gdpo": "grpo",
}
_BOARD_STAGES = {
    "Pre-Training": "pretrain",
    "Supervised Fine-Tuning": "sft",
    "Reward Modeling": "reward",
    **{name.upper(): name for name in ("ppo", "dpo", "kto")},
}
_METHODS: dict[str, dict[str, dict[str, str]]] = {  # dialect or family -> setting -> value -> method
    "llama_factory": {"stage": _STAGES, "train.training_stage": _BOARD_STAGES},
    "axolotl": {"rl": _AXOLOTL_RL},
    "verl": {"algorithm.adv_estimator": _ESTIMATORS},
    "openrlhf": {"advantage_estimator": _ESTIMATORS, "algo.advantage.estimator": _ESTIMATORS},
    "trl": {"rlhf_type": {name: name for name in ("dpo", "orpo", "kto", "simpo", "cpo", "grpo", "ppo")}},
}
# Settings that only one method's arguments have, in a list of TRL's arguments.
_ONLY_IN = {
    "normalize_advantages": "rloo",
    "scale_rewards": "grpo",
    "f_divergence_type": "dpo",
    "desirable_weight": "kto",
    "center_rewards_coefficient": "reward",
    "completion_only_loss": "sft",
}
_BUILT_ON = (
    "lmbda",
    "distillation_alpha",
    "teacher_model_init_kwargs",
)  # further methods, which have those fields too

_REFERENCE = re.compile(r"^\$\{([\w.]+)\}$")
_ENUM = re.compile(r"^[A-Z]\w*\.([A-Z][A-Z_0-9]*)$")  # IntervalStrategy.STEPS
_SECRET = re.compile(r"(?i)(^|_)(api_?key|password|secret|passwd|credentials?)$")


@dataclass
class Understood:
    """What one configuration tells.

    Attributes:
        settings: under our names. unknown: names that mean nothing here. unfit: sentences on values that no field
            takes. method: the training method, where a setting names it.
        foreign: whether it is written in another system's names than ours; title: that system's.
        model: whether it is a model's configuration, which tells nothing of the training.
        training: whether it is a training configuration: a learning rate, and a size of batches under any name.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    method: str | None = None
    foreign: bool = False
    training: bool = False
    title: str = ""
    model: bool = False


def translate(raw: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """A system's settings under our names, and those of its names that mean nothing here.

    Args:
        raw: as its file holds them, nested or with names joined by "." or "/".
        family: the system that wrote the log. LLaMA-Factory's and Axolotl's names are recognised by themselves, since
            their logs look like TRL's.
    """
    made = understand(raw, family)
    return made.settings, made.unknown


def understand(raw: Mapping[str, Any], family: Family) -> Understood:
    """`translate`, with all that the configuration tells."""
    flat = _resolved(dict(_leaves(unwrapped(raw))))
    if is_model(flat):
        return Understood(unknown=list(flat), model=True)
    dialect = _dialect(flat, family)
    made = Understood(title=_TITLES.get(dialect, family.title or family.name))
    used: set[str] = set()

    def take(theirs: str, ours: str, foreign: bool) -> None:
        value = flat.get(theirs)
        if theirs not in flat or ours not in FIELDS:
            return
        used.add(theirs)
        made.foreign |= foreign and theirs != ours
        if isinstance(value, str) and "${" in value:
            return
        try:
            value = typed(ours, value)
        except ValueError as error:
            made.unfit.append(str(error))
            return
        if foreign and (value is None or (ours == "loss_type" and not _is_loss(value))):
            return
        made.settings.setdefault(ours, value)

    if dialect in TRL_LIKE:
        refused = _refused(flat, dialect)
        own = dialect != "trl" or family.name in TRL_LIKE
        for prefix in [""] if dialect != "trl" else _sections(flat, whole=own):
            for name in FIELDS.keys() - refused:
                take(prefix + name, name, foreign=False)
            for old, name in RENAMED.items():
                take(prefix + old, name, foreign=False)
    sections = {name.partition(".")[0] for name in flat if "." in name}
    for table in (family.settings, *_TABLES.get(dialect, ())):
        for theirs, ours in table.items():
            take(_in(flat, sections, theirs), ours, foreign=True)
    if dialect == "other":
        for theirs, ours in PLAIN.items():
            take(_in(flat, sections, theirs), ours, foreign=False)
    if dialect == "axolotl":
        _add_axolotl(flat, made, used)
    elif dialect == "llama_factory":
        _add_llama_factory(flat, made, used)
    for ours, factors in PRODUCTS.get(family.name, {}).items():
        numbers = [flat[name] for name in factors if name in flat]
        if len(numbers) == len(factors) and all(_whole(n) and n > 0 for n in numbers):
            made.settings.setdefault(ours, int(math.prod(numbers)))
            used.update(factors)
    if not _positive(made.settings.get("max_steps")):
        made.settings.pop("max_steps", None)  # -1: as many as the epochs have
    made.method = made.method or _method(flat, dialect)
    used |= flat.keys() & _METHODS.get(dialect, {}).keys()
    made.unknown = [name for name in flat if name not in used]
    batch = any("batch_size" in name.rsplit(".", 1)[-1] and _positive(value) for name, value in flat.items())
    made.training = _positive(made.settings.get("learning_rate")) and (
        batch or _positive(made.settings.get("gradient_accumulation_steps"))
    )
    return made


_TITLES = {"axolotl": "Axolotl", "llama_factory": "LLaMA-Factory"}
_TABLES: dict[str, tuple[Mapping[str, str], ...]] = {
    "axolotl": (AXOLOTL,),
    "llama_factory": (LLAMA_FACTORY, _LLAMA_BOARD),
}


def part(raw: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a file which is no training configuration tells, by a table of its names."""
    flat = dict(_leaves(raw))
    settings: dict[str, Any] = {}
    for theirs, ours in table.items():
        if flat.get(theirs) is not None:
            try:
                settings[ours] = typed(ours, flat[theirs])
            except ValueError:
                continue  # "auto"
    return settings


# ---------------------------------------------------------------------- which system's names


def _dialect(flat: Mapping[str, Any], family: Family) -> str:
    """Whose names these are. A LLaMA-Factory or Axolotl run logs as TRL does, so the settings themselves tell."""
    if family.name not in TRL_LIKE and family.settings:
        return family.name
    if "micro_batch_size" in flat and ("base_model" in flat or "sequence_len" in flat):
        return "axolotl"
    if {"cutoff_len", "finetuning_type", "train.training_stage"} & flat.keys():
        return "llama_factory"
    if family.name in TRL_LIKE or _sections(flat, whole=False):
        return "trl"
    return family.name


def _sections(flat: Mapping[str, Any], whole: bool) -> list[str]:
    """Prefixes ("" or "training.") under which transformers' arguments stand; `whole`: the top level is one anyway."""
    seen: dict[str, set[str]] = {}
    for name in flat:
        section, _, last = name.rpartition(".")
        if section.count(".") == 0:
            seen.setdefault(f"{section}." if section else "", set()).add(last)
    found = [
        prefix
        for prefix, names in seen.items()
        if "per_device_train_batch_size" in names or len(names & _TRAINING_ARGUMENTS) >= 3
    ]
    top = [""] if "" in found or (whole and not found) else []
    return top + [prefix for prefix in found if prefix]


def is_model(flat: Mapping[str, Any]) -> bool:
    """Whether this is a model's `config.json`, which holds lengths and temperatures of its own."""
    of_model = any(name in flat for name in _OF_A_MODEL)
    return (
        of_model
        and "micro_batch_size" not in flat
        and not _sections(flat, whole=False)
        and "learning_rate" not in flat
    )


def _refused(flat: Mapping[str, Any], dialect: str) -> set[str]:
    """Fields whose value here need not be the trainer's."""
    refused = set(_NOT_IN_LLAMA_FACTORY) if dialect == "llama_factory" else set()
    if "architectures" in flat or ("model_type" in flat and dialect == "trl"):
        for name, proofs in _SHARED_WITH_MODEL.items():
            if not any(proof in flat for proof in proofs):
                refused.add(name)
    return refused


def _in(flat: Mapping[str, Any], sections: set[str], theirs: str) -> str:
    """A table's name as it stands here: below a section of a run's parts, or without one."""
    if theirs in flat:
        return theirs
    section, _, rest = theirs.partition(".")
    if section in _PARTS and section not in sections:
        return rest
    return next((f"{part}.{theirs}" for part in _PARTS if f"{part}.{theirs}" in flat), theirs)


_PARTS = ("config", "args", "trainer", "orchestrator")


# ---------------------------------------------------------------------- what no table can say


def _add_axolotl(flat: Mapping[str, Any], made: Understood, used: set[str]) -> None:
    if str(flat.get("adapter")) in ("lora", "qlora"):
        made.settings.setdefault("use_peft", True)
        used.add("adapter")
    if str(flat.get("rl")) == "ipo":
        made.settings.setdefault("loss_type", "ipo")
    if flat.get("reward_model") is True:
        made.method = "reward"
        used.add("reward_model")
    if "rl" in flat:
        used.add("rl")


def _add_llama_factory(flat: Mapping[str, Any], made: Understood, used: set[str]) -> None:
    stage = _method(flat, "llama_factory")
    loss = flat.get("pref_loss", flat.get("train.pref_loss"))
    if stage == "dpo" and loss in ("orpo", "simpo"):  # methods of their own
        made.method = str(loss)
    if stage != "dpo" or made.method is not None:
        made.settings.pop("loss_type", None)
    if stage not in ("dpo", "kto"):  # its page writes a beta for any stage
        made.settings.pop("beta", None)
    if str(flat.get("finetuning_type", flat.get("top.finetuning_type"))) == "lora":
        made.settings.setdefault("use_peft", True)
    disabled = flat.get("disable_gradient_checkpointing")
    if isinstance(disabled, bool):
        made.settings.setdefault("gradient_checkpointing", not disabled)
    precision = {"bf16": (True, False), "fp16": (False, True), "fp32": (False, False)}.get(
        str(flat.get("train.compute_type"))
    )
    if precision is not None:
        made.settings.setdefault("bf16", precision[0])
        made.settings.setdefault("fp16", precision[1])
    extra = _plain(flat.get("train.extra_args"))
    if isinstance(extra, dict):  # they win over the page's other fields
        for name, value in extra.items():
            if name in FIELDS and name not in _NOT_IN_LLAMA_FACTORY:
                try:
                    made.settings[name] = typed(name, value)
                except ValueError as error:
                    made.unfit.append(str(error))
    used |= {
        name
        for name in flat
        if name.removeprefix("train.").removeprefix("top.")
        in (
            "stage",
            "training_stage",
            "finetuning_type",
            "compute_type",
            "disable_gradient_checkpointing",
            "extra_args",
        )
    }


def _method(flat: Mapping[str, Any], dialect: str) -> str | None:
    for name, methods in _METHODS.get(dialect, {}).items():
        value = flat.get(name)
        if isinstance(value, str) and value.strip() in methods:
            return methods[value.strip()]
    if dialect == "trl":
        told = {method for name, method in _ONLY_IN.items() if name in flat}
        return told.pop() if len(told) == 1 and not any(name in flat for name in _BUILT_ON) else None
    return None


def _is_loss(value: Any) -> bool:
    return all(each in _LOSSES for each in (value if isinstance(value, list) else [value]))


# ---------------------------------------------------------------------- names and values


def unwrapped(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A W&B `config.yaml` without the `{"desc": …, "value": …}` around each value and its own notes."""
    if "_wandb" not in raw and "wandb_version" not in raw:
        return raw
    return {
        name: value["value"] if isinstance(value, Mapping) and "value" in value else value
        for name, value in raw.items()
        if name not in ("_wandb", "wandb_version")
    }


def _leaves(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting, nested names joined by "."; items of a list also by their number."""
    budget = MAX_NAMES

    def walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
        nonlocal budget
        budget -= 1
        if budget < 0:
            return
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            for key, inner in value.items():
                if budget < 0:
                    return
                part = str(key).replace("/", ".").replace("-", "_")
                yield from walk(inner, f"{name}.{part}" if name else part, depth + 1)
        elif not isinstance(value, Mapping):
            yield name, value

    for name, value in walk(raw, "", 0):
        yield name, value
        if isinstance(value, list) and len(value) <= 4:
            for i, item in enumerate(value):
                if isinstance(item, int | float | str):
                    yield f"{name}.{i}", item


def _resolved(flat: dict[str, Any]) -> dict[str, Any]:
    """The same with `${a.b}`, as Hydra writes them, replaced by the value of `a.b`."""

    def value_of(value: Any) -> Any:
        for _ in range(MAX_HOPS):
            match = _REFERENCE.match(value) if isinstance(value, str) else None
            if match is None or match.group(1) not in flat:
                return value
            value = flat[match.group(1)]
        return value

    return {name: value_of(value) for name, value in flat.items()}


def typed(name: str, value: Any) -> Any:
    """A value of the field as Python has it.

    Raises:
        ValueError: it is none that the field takes; one sentence.
    """
    kind = FIELDS[name]
    value = _plain(value)
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML 1.1 reads as false
    if isinstance(value, bool) and kind == "scaling":
        return "group" if value else "none"
    if value is None:
        return None
    fits, wanted = _FITS[kind]
    if not fits(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not {wanted}")
    if kind in ("count", "whole"):
        return int(value)
    return value[0] if kind == "words" and isinstance(value, list) and len(value) == 1 else value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value: Any) -> bool:
    return _finite(value) and float(value).is_integer()


def _listing(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(fits(each) for each in value)


def _word(value: Any) -> bool:
    return isinstance(value, str)


_FITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda v: _whole(v) and v >= 0, "a whole number"),
    "whole": (_whole, "a whole number"),
    "number": (_finite, "a number"),
    "flag": (lambda v: isinstance(v, bool), "true or false"),
    "word": (_word, "a word"),
    "words": (lambda v: _word(v) or _listing(v, _word), "a word or a list of them"),
    "numbers": (lambda v: _listing(v, _finite), "a list of numbers"),
    "scaling": (_word, "a word"),
}


def _plain(value: Any) -> Any:
    """Text as the value that it stands for."""
    if not isinstance(value, str) or len(value) > 4000:
        return value
    text = value.strip()
    if text.lower() in ("", "none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    match = _ENUM.match(text)
    if match is not None:
        return match.group(1).lower()
    try:
        if text.lstrip("+-").isdecimal():
            return int(text)
        if text[-1].isdigit():
            return float(text)
    except ValueError:
        return text
    if text[0] in "[{":
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return text


def _positive(value: Any) -> bool:
    value = _plain(value)
    return _finite(value) and value > 0


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a key or a password."""
    last = name.rsplit(".", 1)[-1].lower()
    return last in SECRET_FIELDS or last in SECRET_KEYS or _SECRET.search(last) is not None


def without_secrets(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A setting's value without the keys and passwords inside it."""
    if isinstance(value, Mapping) and depth > 0:
        return {k: without_secrets(v, depth - 1) for k, v in value.items() if not is_secret(str(k))}
    if isinstance(value, list | tuple) and depth > 0:
        return [without_secrets(v, depth - 1) for v in value]
    return value
