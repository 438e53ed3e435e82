"""The run's own settings beside its log: where they are looked for, what of them is understood, what is left alone."""

import importlib
import io
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken.diagnostics import callback
from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.sources import FAMILIES, OTHER, UnreadableLog, beside, read_config
from outspoken.diagnostics.sources.config import load
from outspoken.diagnostics.sources.names import Family
from outspoken.diagnostics.sources.settings import FIELDS, typed

FAMILY = {family.name: family for family in (*FAMILIES, OTHER)}
TRL = FAMILY["trl"]

ARGS = {
    "output_dir": "out",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-06,
    "num_generations": 8,
    "scale_rewards": "group",
    "logging_steps": 5,
    "max_steps": -1,
    "hub_token": "hf_secret",
}
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-06,
    "num_generations": 8,
    "scale_rewards": "group",
    "logging_steps": 5,
}


def as_text(name, content):
    if isinstance(content, bytes | str):
        return content
    return json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content)


@pytest.fixture
def lay(tmp_path):
    """`lay({name: content}, log)` makes a folder with these files and gives the path of its log."""

    def put(files, log="log.jsonl"):
        for name, content in {log: '{"step": 1, "loss": 1.0}\n', **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = as_text(name, content)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / log

    return put


# ---------------------------------------------------------------------- the list of fields


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ("GRPOConfig", "grpo"),
        ("RLOOConfig", "rloo"),
        ("SFTConfig", "sft"),
        ("DPOConfig", "dpo"),
        ("KTOConfig", "kto"),
        ("RewardConfig", "reward"),
    ],
)
def test_arguments_that_trl_wrote_are_taken_as_they_are(lay, config, method):
    import trl

    made = getattr(trl, config)(output_dir="out", report_to=[], use_cpu=True, bf16=False, hub_token="hf_secret")
    path = lay({"args.json": made.to_json_string()})
    found = beside.find(path, TRL)
    assert found.complete and found.method == method and found.sources == ["args.json"] and not found.notes
    for name, value in found.settings.items():
        own = made.to_dict()[name]
        own = own[0] if isinstance(own, list) and len(own) == 1 else own  # DPO's loss_type is a list of one
        assert value == own, name
    assert found.settings["learning_rate"] == made.learning_rate
    assert found.settings["per_device_train_batch_size"] == 8 and found.settings["max_grad_norm"] == 1.0
    assert "max_steps" not in found.settings  # -1: it is not set
    assert "secret" not in str(found)


def test_every_field_that_a_rule_reads_is_known():
    folder = Path(callback.__file__).parent
    patterns = (
        r'config\.get\("(\w+)"',
        r'config\["(\w+)"\]',
        r'"(\w+)" (?:not )?in (?:run\.|view\.)?config\b',
        r'\brun\.number\("(\w+)"',
        r'\bview\.number\("(\w+)"',
    )
    files = [folder / "signals.py", folder / "view.py", folder / "progress.py", *sorted(folder.glob("rules/*.py"))]
    text = "\n".join(file.read_text() for file in files)
    read = {name for pattern in patterns for name in re.findall(pattern, text)}
    assert {"beta", "scale_rewards", "gradient_checkpointing", "warmup_ratio", "lmbda"} <= read  # the patterns work
    # points_per_log is worked out of others, and what a trainer of ours alone knows is in no file
    assert read - FIELDS.keys() <= {"points_per_log", "diagnose"}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.settings], ids=lambda f: f.name)
def test_the_tables_of_systems_name_fields_that_exist(family):
    assert set(family.settings.values()) <= FIELDS.keys()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", "2.0E-6", 2e-6),
        ("gradient_accumulation_steps", "8", 8),
        ("gradient_accumulation_steps", 8.0, 8),
        ("bf16", "True", True),
        ("use_vllm", "false", False),
        ("max_length", "None", None),
        ("max_length", None, None),
        ("eval_strategy", "IntervalStrategy.STEPS", "steps"),
        ("lr_scheduler_type", "SchedulerType.COSINE_WITH_RESTARTS", "cosine_with_restarts"),
        ("eval_strategy", False, "no"),  # YAML 1.1 reads `no` so
        ("scale_rewards", True, "group"),
        ("scale_rewards", "False", "none"),
        ("loss_type", ["sigmoid"], "sigmoid"),
        ("loss_type", "['sigmoid', 'sft']", ["sigmoid", "sft"]),
        ("reward_weights", "[1.0, 0.5]", [1.0, 0.5]),
    ],
)
def test_values_are_what_their_text_stands_for(name, value, expected):
    made = typed(name, value)
    assert made == expected and type(made) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "auto"),
        ("learning_rate", True),
        ("learning_rate", "nan"),
        ("learning_rate", [1e-5]),
        ("gradient_accumulation_steps", 2.5),
        ("gradient_accumulation_steps", -1),
        ("bf16", "auto"),
        ("bf16", 1),
        ("reward_weights", "one"),
        ("optim", 3),
        ("max_length", "9" * 5000),
        ("reward_weights", "[" * 3000),
    ],
)
def test_a_value_that_no_field_takes_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        typed(name, value)


# ---------------------------------------------------------------------- where it is looked for

HYDRA = "\n".join(
    [
        "data: {train_batch_size: 64, max_response_length: 1024}",
        "lr: 1e-6",
        "actor_rollout_ref:",
        "  actor: {optim: {lr: '${lr}'}, ppo_micro_batch_size_per_gpu: 4, clip_ratio_low: 0.2}",
        "  rollout: {n: 8, temperature: '${oc.env:TEMPERATURE,1.0}'}",
        "algorithm: {adv_estimator: grpo}",
        "trainer: {n_gpus_per_node: 8, nnodes: 2}",
    ]
)
HYDRA_SETTINGS = {
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 4,
    "num_generations": 8,
    "epsilon": 0.2,
    "max_completion_length": 1024,
    "generation_batch_size": 64 * 8,  # prompts times completions of each
    "world_size": 8 * 2,
}
WANDB = {
    "_wandb": {"desc": None, "value": {"cli_version": "0.16", "python_version": "3.11"}},
    "wandb_version": 1,
    **{name: {"desc": None, "value": value} for name, value in ARGS.items()},
}


@pytest.mark.parametrize(
    ("files", "log", "family", "expected", "source"),
    [
        ({"args.json": ARGS}, "log.jsonl", "trl", SETTINGS, "args.json"),
        ({"config.yaml": ARGS}, "log.jsonl", "other", SETTINGS, "config.yaml"),  # told by its own names
        (
            {"config.yml": {"training": ARGS, "model": {"temperature": 2.0}}},
            "log.jsonl",
            "trl",
            SETTINGS,
            "config.yml",
        ),
        ({"training_args.json": ARGS}, "checkpoint-500/trainer_state.json", "trl", SETTINGS, "../training_args.json"),
        (
            {"training_args.json": ARGS},
            "runs/Aug01_10-00-00_host/events.out.tfevents.1",
            "trl",
            SETTINGS,
            "../../training_args.json",
        ),
        ({"training_args.json": ARGS}, "logs/train.log", "trl", SETTINGS, "../training_args.json"),
        ({"run/files/config.yaml": WANDB}, "run/run-abc.wandb", "trl", SETTINGS, "files/config.yaml"),
        ({"run-1/files/config.yaml": WANDB}, "run-1/files/output.log", "trl", SETTINGS, "config.yaml"),
        ({"wandb/run-1-a/files/config.yaml": WANDB}, "t.log", "trl", SETTINGS, "wandb/run-1-a/files/config.yaml"),
        (
            {"outputs/2026-08-01/10-00-00/.hydra/config.yaml": HYDRA},
            "outputs/2026-08-01/10-00-00/main_ppo.log",
            "verl",
            HYDRA_SETTINGS,
            ".hydra/config.yaml",
        ),
        (
            {".hydra/config.yaml": HYDRA},
            "logs/metrics/train.jsonl",
            "verl",
            HYDRA_SETTINGS,
            "../../.hydra/config.yaml",
        ),
        (
            {".hydra/config.yaml": "attempts: ${finetune.attempts}\nfinetune: {attempts: 8, learning_rate: 1e-6}"},
            "streams/stats/0/0/0.jsonl",
            "pipeline_rl",
            {"num_generations": 8, "learning_rate": 1e-6},
            "../../../../.hydra/config.yaml",
        ),
        (
            {
                ".hydra/config.yaml": "a: [",
                ".hydra/overrides.yaml": "- actor_rollout_ref.rollout.n=8\n- +data.max_response_length=1024\n- ~x",
            },
            "metrics.jsonl",
            "verl",
            {"num_generations": 8, "max_completion_length": 1024},
            ".hydra/overrides.yaml",
        ),
        (
            {
                "config.json": {
                    "learning_rate": 4e-05,
                    "max_tokens": 512,
                    "temperature": 1.0,
                    "kl_penalty_coef": 0.0,
                    "dataset_builder": {"batch_size": 128, "group_size": 16},
                    "log_path": "/tmp/x",
                    "model_name": "m",
                }
            },
            "metrics.jsonl",
            "tinker",
            {"learning_rate": 4e-05, "max_completion_length": 512, "beta": 0.0, "num_generations": 16},
            "config.json",
        ),
        (
            {
                "torchtune_config.yaml": {
                    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5},
                    "batch_size": 4,
                }
            },
            "log_1.txt",
            "torchtune",
            {"learning_rate": 2e-5},
            "torchtune_config.yaml",
        ),
        (
            {
                "wandb-metadata.json": {
                    "args": ["--learning_rate", "1e-6", "--bf16", "--per-device-train-batch-size=4", "--seed", "-1"]
                }
            },
            "output.log",
            "trl",
            {"learning_rate": 1e-6, "bf16": True, "per_device_train_batch_size": 4, "seed": -1},
            "wandb-metadata.json",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_layouts(lay, files, log, family, expected, source):
    found = beside.find(lay(files, log), FAMILY[family])
    assert expected.items() <= found.settings.items(), found
    assert found.sources == [source]
    assert found.complete == ("learning_rate" in expected and family != "pipeline_rl")  # with a size of batches
    assert "hub_token" not in found.settings and "secret" not in str(found)


def test_settings_of_a_resolved_reference_and_none_of_one_that_is_not(lay):
    found = beside.find(lay({".hydra/config.yaml": HYDRA}), FAMILY["verl"])
    assert found.settings["learning_rate"] == 1e-6  # ${lr}
    assert "temperature" not in found.settings  # ${oc.env:…} depends on a machine that is not this one
    assert found.method == "grpo"


def test_prime_rl_keeps_a_file_for_each_process(lay):
    files = {
        "configs/trainer.toml": "max_steps = 200\n[optim]\nlr = 3e-6\nmax_norm = 1.0\n",
        "configs/orchestrator.toml": "batch_size = 512\nrollouts_per_example = 16\n[sampling]\nmax_tokens = 2048\n",
        "configs/inference.toml": "[model]\nname = 'm'\n",
    }
    found = beside.find(lay(files, "logs/trainer.log"), FAMILY["prime_rl"])
    assert found.sources == ["../configs/trainer.toml", "../configs/orchestrator.toml"]
    assert found.settings == {
        "max_steps": 200,
        "learning_rate": 3e-6,
        "max_grad_norm": 1.0,
        "num_generations": 16,
        "max_completion_length": 2048,
    }


@pytest.mark.parametrize(
    ("files", "log"),
    [
        # nothing says that the folder above belongs to the run
        ({"args.json.bak": ARGS, "config.yaml": ARGS}, "runs/a/events.out.tfevents.1"),
        ({"config.yaml": ARGS}, "a/log.jsonl"),
        ({"config.yaml": ARGS}, "logs/train.log"),
        ({"args.json": ARGS}, "some_run/log.jsonl"),
        ({"args.json": ARGS}, "a/b/checkpoint-5/trainer_state.json"),
        ({"b.yaml": ARGS, "settings.json": ARGS}, "log.jsonl"),
    ],
)
def test_a_folder_that_may_be_another_runs_is_not_read(lay, files, log):
    found = beside.find(lay(files, log), TRL)
    assert found == beside.Beside()


def test_the_log_may_be_a_directory(lay, tmp_path):
    lay({"run-9/files/config.yaml": WANDB}, "run-9/files/wandb-summary.json")
    assert beside.find(tmp_path / "run-9", TRL).settings == SETTINGS


def test_of_two_wandb_runs_none_is_taken(lay):
    path = lay({f"wandb/{run}/files/config.yaml": WANDB for run in ("run-1", "offline-run-2")}, "train.log")
    found = beside.find(path, TRL)
    assert not found.settings and not found.sources
    (note,) = found.notes
    assert note.startswith("2 W&B runs lie in wandb;") and "--config" in note


# ---------------------------------------------------------------------- what is no training configuration


def test_a_models_configuration_is_none_of_the_run(lay):
    model = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_length": 20, "temperature": 0.7}
    found = beside.find(lay({"config.json": model}), TRL)
    assert found == beside.Beside()


def test_wandb_holds_the_models_settings_under_the_same_names(lay):
    """transformers updates one W&B configuration with the model's first and the trainer's over it."""
    model = {"model_type": "qwen2", "architectures": ["Q"], "max_length": 20, "temperature": 0.7, "top_p": 0.9}

    def read(args):
        wrapped = {name: {"value": value} for name, value in {**model, **args}.items()}
        return beside.find(lay({"files/config.yaml": {"_wandb": {}, **wrapped}}, "x.wandb"), TRL).settings

    plain = read({k: v for k, v in ARGS.items() if k not in ("num_generations", "scale_rewards")})
    assert plain["learning_rate"] == 1e-6 and not plain.keys() & {"max_length", "temperature", "top_p"}
    sft = read({**ARGS, "completion_only_loss": None, "max_length": 1024, "num_generations": 8})
    assert sft["max_length"] == 1024
    grpo = read({**ARGS, "temperature": 1.0})
    assert grpo["temperature"] == 1.0 and "max_length" not in grpo


def test_an_adapter_and_an_engine_tell_a_part(lay):
    adapter = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj"]}
    engine = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"params": {"lr": "auto"}},
    }
    found = beside.find(lay({"adapter_config.json": adapter, "ds_config.json": engine}), TRL)
    assert found.settings == {
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.5,
        "bf16": True,
    }
    assert not found.complete and found.sources == ["adapter_config.json", "ds_config.json"]


def test_of_a_home_made_configuration_only_what_can_mean_one_thing_is_taken(lay):
    raw = {"lr": 1e-3, "batch_size": 32, "temperature": 0.5, "max_length": 77, "beta": 0.9, "epochs": 3}
    found = beside.find(lay({"config.yaml": raw}), OTHER)
    assert found.settings == {"learning_rate": 1e-3, "num_train_epochs": 3} and found.complete and not found.notes
    unknown = beside.find(lay({"config.yaml": {"batch_size": 32, "max_length": 77}}), OTHER)
    assert not unknown.settings and not unknown.complete
    assert unknown.notes == [
        "config.yaml lies beside the log, but none of its names has a meaning that is known here. Give settings by "
        "--config."
    ]


def test_the_learning_rate_alone_is_read_and_no_whole_configuration(lay):
    found = beside.find(lay({"hparams.yaml": {"learning_rate": 1e-2}}), OTHER)
    assert found.settings == {"learning_rate": 1e-2} and not found.complete


def test_settings_handed_over_for_a_home_made_loop():
    handed = beside.given({"lr": 1e-3, "grad_clip": 1.0, "dropout": 0.1}, OTHER)
    assert {"learning_rate": 1e-3, "max_grad_norm": 1.0}.items() <= handed.settings.items() and not handed.notes


def test_files_that_contradict_one_another_are_not_mixed(lay):
    path = lay({"args.json": ARGS, "train.yaml": {**ARGS, "learning_rate": 5e-5, "beta": 0.1}})
    found = beside.find(path, TRL)
    assert found.settings == SETTINGS and found.sources == ["args.json"]
    assert found.notes == ["train.yaml was left out: it says learning_rate 5e-05, args.json says 1e-06."]
    agreeing = beside.find(lay({"train.yaml": {**ARGS, "beta": 0.1}}), TRL)
    assert agreeing.settings == {**SETTINGS, "beta": 0.1} and agreeing.sources == ["args.json", "train.yaml"]


# ---------------------------------------------------------------------- pickles, broken and hostile neighbours


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_training_args_bin_is_never_opened(lay, tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    path = lay({"training_args.bin": pickle.dumps(Evil(touched))})
    opened = []
    real = io.open

    def spy(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("io.open", spy)
    monkeypatch.setattr("builtins.open", spy)
    found = beside.find(path, TRL)
    report = diagnose(path, method="sft")
    assert opened and not any(name.endswith(".bin") for name in opened) and not touched.exists()
    assert not found.settings and not found.sources
    (note,) = found.notes
    assert note.startswith("training_args.bin holds settings of the run") and "--config" in note
    assert any("training_args.bin" in each for each in report["source"]["notes"]) and not report["config_known"]
    # pickle.loads would have run it
    pickle.loads(pickle.dumps(Evil(touched)))
    assert touched.exists()


def test_training_args_bin_is_not_mentioned_where_it_is_not_needed(lay):
    found = beside.find(lay({"training_args.bin": b"\x80\x02", "args.json": ARGS}), TRL)
    assert found.complete and not found.notes


BOMB = "\n".join(
    ["a0: &a0 [x]", *(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 12))]
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1, 2\nb: {", "line "),
        (b"\x00\x01\x02\xff\xfe" * 100, "is not UTF-8 text"),
        (b"PK\x03\x04" + b"\0" * 100, "ReaderError"),
        ("[1, 2, 3]", "must hold settings as `name: value`, not a list"),
        ("just words", "must hold settings as `name: value`, not a str"),
        ("", "must hold settings as `name: value`, not a NoneType"),
        ('{"learning_rate": 1e-5', "line 1 is not valid JSON"),
        ("x: !!python/object/apply:os.system ['touch pwned']", "line 1 is not valid YAML"),
        ("[" * 5_000, "RecursionError"),
        ("#" + "x" * 300_000, "larger than 256 KiB"),
    ],
    ids=["cut", "binary", "zip", "list", "text", "empty", "json", "object", "deep", "long"],
)
def test_a_broken_neighbour_is_a_note(lay, content, expected):
    found = beside.find(lay({"config.yaml": content, "args.json": ARGS}), TRL)
    assert found.settings == SETTINGS and found.complete
    (note,) = found.notes
    assert note.startswith("config.yaml lies beside the log and was not read: ") and expected in note
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [BOMB, "a: &a\n  b: *a\n  learning_rate: 1e-5\n"], ids=["bomb", "loop"])
def test_yaml_that_refers_to_itself(lay, content):
    found = beside.find(lay({"config.yaml": content}), TRL)
    assert found.settings.get("learning_rate") in (None, 1e-5)


def test_files_that_are_none(lay, tmp_path):
    path = lay({"big.bin": b""})
    with (tmp_path / "big.bin").open("wb") as handle:
        handle.truncate(100 * 1024 * 1024)
    (tmp_path / "config.json").symlink_to(tmp_path / "big.bin")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "config.yml")
    (tmp_path / "config.yml").symlink_to(tmp_path / "config.yaml")
    (tmp_path / "train.yaml").symlink_to("/dev/zero")
    (tmp_path / "training_args.json").mkdir()
    os.mkfifo(tmp_path / "args.json")
    (tmp_path / ".hydra").symlink_to(tmp_path)
    (tmp_path / "wandb").symlink_to(tmp_path)
    found = beside.find(path, TRL)
    assert not found.settings and not found.sources
    (note,) = found.notes
    assert (
        note == "config.json lies beside the log and was not read: is larger than 10 MiB, which no configuration is."
    )


def test_a_log_that_is_not_there(tmp_path):
    assert not beside.find(tmp_path / "nowhere" / "log.jsonl", TRL).settings


def test_a_reader_that_fails_is_a_note(lay, monkeypatch):
    from outspoken.diagnostics.sources import tensorboard

    def broken(paths):
        raise RuntimeError("boom")

    monkeypatch.setattr(tensorboard, "settings", broken)
    found = beside.find(lay({"args.json": ARGS}, "events.out.tfevents.1"), TRL)
    assert found.settings == SETTINGS
    assert found.notes == ["The settings inside events.out.tfevents.1 could not be read (boom)."]


@pytest.mark.parametrize(
    ("module", "log", "given_folder", "asked"),
    [
        ("tensorboard", "events.out.tfevents.1", False, ["events.out.tfevents.1"]),
        ("tensorboard", "events.out.tfevents.1", True, ["."]),  # a folder is looked through by the reader itself
        ("wandb_files", "run-abc.wandb", False, "run-abc.wandb"),
        ("wandb_files", "run-abc.wandb", True, "."),
        ("mlflow_files", "meta.yaml", True, "."),
    ],
)
def test_settings_inside_a_log_are_asked_of_its_reader(lay, tmp_path, monkeypatch, module, log, given_folder, asked):
    reader = importlib.import_module(f"outspoken.diagnostics.sources.{module}")
    calls = []

    def read(argument):
        calls.append(argument)
        return {name: str(value) for name, value in ARGS.items()}  # MLflow keeps text

    monkeypatch.setattr(reader, "settings", read, raising=False)
    monkeypatch.setattr(reader, "is_mlflow", lambda path: True, raising=False)
    path = lay({}, log)
    found = beside.find(tmp_path if given_folder else path, TRL)
    here = [tmp_path / name for name in asked] if isinstance(asked, list) else tmp_path / asked
    assert here in calls and found.settings == SETTINGS and found.complete


# ---------------------------------------------------------------------- names of other systems

AXOLOTL = {
    "base_model": "m",
    "model_type": "LlamaForCausalLM",
    "rl": "grpo",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": "2e-4",
    "num_epochs": 3,
    "sequence_len": 2048,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch",
    "sample_packing": True,
    "adapter": "qlora",
    "lora_r": 32,
    "bf16": "auto",
    "trl": {
        "beta": 0.001,
        "num_generations": 8,
        "use_vllm": True,
        "max_completion_length": 512,
        "scale_rewards": False,
    },
    "datasets": [{"path": "d", "type": "t"}],
}
FACTORY = {
    "stage": "dpo",
    "model_name_or_path": "m",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "cutoff_len": 2048,
    "max_length": 1024,  # of text that it generates
    "temperature": 0.95,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "gradient_checkpointing": False,  # it checkpoints all the same
}
BOARD = {
    "top.finetuning_type": "lora",
    "train.training_stage": "Supervised Fine-Tuning",
    "train.batch_size": 2,
    "train.learning_rate": "1e-4",
    "train.max_grad_norm": "1.0",
    "train.num_train_epochs": "15",
    "train.cutoff_len": 2048,
    "train.pref_beta": 0.1,
    "train.pref_loss": "sigmoid",
    "train.compute_type": "bf16",
    "train.lora_rank": 8,
    "train.extra_args": '{"optim": "adamw_torch", "max_grad_norm": 0.5}',
    "train.swanlab_api_key": "secret",
}


@pytest.mark.parametrize(
    ("raw", "family", "expected", "method"),
    [
        (
            AXOLOTL,
            "trl",
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
                "learning_rate": 2e-4,
                "num_train_epochs": 3,
                "max_length": 2048,
                "lr_scheduler_type": "cosine",
                "optim": "adamw_torch",
                "packing": True,
                "use_peft": True,
                "lora_r": 32,
                "beta": 0.001,
                "num_generations": 8,
                "use_vllm": True,
                "max_completion_length": 512,
                "scale_rewards": "none",
            },
            "grpo",
        ),
        (
            {"base_model": "m", "micro_batch_size": 1, "rl": "ipo", "rl_beta": 0.2},
            "trl",
            {"per_device_train_batch_size": 1, "beta": 0.2, "loss_type": "ipo"},
            "dpo",
        ),
        (
            FACTORY,
            "llama_factory",
            {
                "use_peft": True,
                "lora_r": 8,
                "beta": 0.1,
                "loss_type": "sigmoid",
                "max_length": 2048,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8,
                "learning_rate": 5e-6,
            },
            "dpo",
        ),
        (
            {**FACTORY, "pref_loss": "simpo", "disable_gradient_checkpointing": True},
            "trl",  # its trainer_state.json looks like TRL's
            {
                "use_peft": True,
                "lora_r": 8,
                "beta": 0.1,
                "max_length": 2048,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8,
                "learning_rate": 5e-6,
                "gradient_checkpointing": False,
            },
            "simpo",
        ),
        (
            BOARD,
            "llama_factory",
            {
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-4,
                "max_grad_norm": 0.5,  # the arguments at the end win
                "num_train_epochs": 15,
                "max_length": 2048,
                "lora_r": 8,
                "use_peft": True,
                "bf16": True,
                "fp16": False,
                "optim": "adamw_torch",
            },
            "sft",
        ),
        (
            {"max_seq_length": 512, "evaluation_strategy": "steps"},
            "trl",
            {"max_length": 512, "eval_strategy": "steps"},
            None,
        ),
        (
            {"args": {"actor.adam.lr": 5e-7, "micro_train_batch_size": 8}, "algo/kl/init-coef": 0.01},
            "openrlhf",
            {"learning_rate": 5e-7, "per_device_train_batch_size": 8, "beta": 0.01},
            None,
        ),
    ],
    ids=["axolotl", "axolotl-ipo", "factory", "factory-simpo", "board", "old", "openrlhf"],
)
def test_translations(raw, family, expected, method):
    translated, unknown = beside.translate(raw, FAMILY[family])
    assert translated == expected
    assert not {"learning_rate", "micro_batch_size", "stage", "rl", "cutoff_len"} & set(unknown)
    assert beside.given(raw, FAMILY[family]).method == method


def test_what_means_nothing_here_is_not_passed_on():
    table = Family("x", "X", settings={"opt.lr": "learning_rate", "mode": "loss_type", "clip": "epsilon"})
    raw = {"opt": {"lr": 1e-5, "temperature": 3}, "mode": "vanilla", "clip": None, "max_length": 7, "beta": 1}
    translated, unknown = beside.translate(raw, table)
    assert translated == {"learning_rate": 1e-5}  # no loss of that name here, and no clip
    assert unknown == ["opt.temperature", "max_length", "beta"]


KEYS = st.sampled_from([*SETTINGS, *AXOLOTL, *FACTORY, *BOARD, "trl", "trainer.optim.lr", "_wandb", "value", "${x}"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["${lr}", "[1,", "{"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(raw=st.dictionaries(KEYS, VALUES, max_size=8), family=st.sampled_from(list(FAMILY.values())))
def test_whatever_a_configuration_holds_it_is_read(raw, family):
    handed = beside.given(raw, family)
    assert all(isinstance(note, str) for note in handed.notes)
    translated, unknown = beside.translate(raw, family)
    assert translated.keys() <= FIELDS.keys() and all(isinstance(name, str) for name in unknown)
    for name, value in translated.items():
        assert typed(name, value) == value  # every value is one that its field takes


# ---------------------------------------------------------------------- settings that are handed over


def test_given_settings_in_our_names_stay_as_they_are():
    config = {"learning_rate": "1e-5", "beta": 0.04, "my_own": [1], "generation_kwargs": {"api_key": "s", "top_k": 3}}
    handed = beside.given({**config, "hub_token": "s3cret"}, TRL)
    assert handed.settings == {"learning_rate": 1e-5, "beta": 0.04, "my_own": [1], "generation_kwargs": {"top_k": 3}}
    assert handed.complete and not handed.notes
    assert beside.given({}, TRL) == beside.Beside()
    # the same for a log of a system that calls some settings as we do
    assert beside.given({"learning_rate": 1e-5, "max_grad_norm": 1.0}, FAMILY["tinker"]).settings == {
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
    }


def test_given_settings_in_a_systems_names_are_translated(tmp_path):
    (tmp_path / "run.yaml").write_text(HYDRA + "\nwandb: {api_key: s3cret, mode: online}\n")
    handed = beside.given(read_config(tmp_path / "run.yaml"), FAMILY["verl"])
    assert HYDRA_SETTINGS.items() <= handed.settings.items() and handed.method == "grpo" and handed.complete
    (note,) = handed.notes
    assert note.startswith(f"The configuration that was given is in veRL's names; {len(handed.settings)} of its ")
    assert (
        "of no use here: " in note
        and "adv_estimator" not in note
        and "wandb.mode" in note
        and "s3cret" not in str(handed)
        and "api_key" not in note
    )


def test_a_value_that_does_not_fit_is_told():
    handed = beside.given(AXOLOTL, TRL)
    assert handed.notes[0].startswith("The configuration that was given is in Axolotl's names; 15 of its settings")
    assert handed.notes[1:] == [
        "In the configuration that was given, bf16 is 'auto', not true or false; it was passed over."
    ]


def test_configurations_in_toml(tmp_path):
    (tmp_path / "rl.toml").write_text("max_steps = 5\n[trainer.optim]\nlr = 1e-6\n")
    assert read_config(tmp_path / "rl.toml") == {"max_steps": 5, "trainer": {"optim": {"lr": 1e-6}}}
    (tmp_path / "bad.toml").write_text("max_steps = \n")
    with pytest.raises(UnreadableLog, match=r"bad\.toml: is not valid TOML"):
        load(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("found", "known", "rate", "expected"),
    [
        ({"learning_rate": 1e-5}, {}, 1e-5, None),
        ({"learning_rate": 1e-5}, {}, 9e-6, None),  # a schedule lowers it
        ({"learning_rate": 1e-5}, {}, 2e-4, "they say learning_rate 1e-05, but the log shows 0.0002"),
        ({"logging_steps": 10}, {"logging_steps": 10.0}, None, None),
        ({"logging_steps": 10}, {"logging_steps": 5}, None, "they say logging_steps 10, the log 5"),
        ({"eval_steps": 0.1}, {"eval_steps": 50}, None, None),  # a share of the run
        ({}, {"save_steps": 500}, 1.0, None),
    ],
)
def test_settings_of_another_run_contradict_the_log(found, known, rate, expected):
    assert beside.contradiction(found, known, rate) == expected


# ---------------------------------------------------------------------- what it is for


def tiny_groups(path):
    """60 steps of 8 groups each, half of which differ in reward by less than 2 % of its range, and keep an advantage.

    Groups that tie keep nothing, all others everything: 1 - 0.125 of a full advantage on average.
    """
    rows = [
        {
            "step": step,
            "loss": 0.01,
            "learning_rate": 1e-6,
            "reward": 0.5 + 0.01 * (step % 3),
            "reward_std": 0.2,
            "rewards/range": 1.0,
            "groups/count": 8,
            "groups/tiny_std": 0.5,
            "groups/zero_std": 0.125,
            "groups/attenuation": 0.875,
            "frac_reward_zero_std": 0.125,
        }
        for step in range(1, 61)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_rule_that_needs_a_setting_judges_with_it_and_says_so_without(tmp_path):
    path = tiny_groups(tmp_path / "log.jsonl")
    blind = diagnose(path, method="grpo")
    reasons = {entry["code"]: entry["reason"] for entry in blind["not_checked"]}
    assert reasons["RL023"] == "scale_rewards is not known" and not blind["config_known"]
    assert "RL023" not in {d["code"] for d in blind["diagnostics"]}

    (tmp_path / "args.json").write_text(json.dumps(ARGS))
    seeing = diagnose(path, method="grpo")
    assert seeing["config_known"] and "RL023" not in {entry["code"] for entry in seeing["not_checked"]}
    found = {d["code"]: d for d in seeing["diagnostics"]}["RL023"]
    assert found["state"] == "firing"
    patch = found["suggestions"][0]["patch"]
    assert {"op": "replace", "path": "/scale_rewards", "value": "batch"} in patch
    assert any("args.json" in note for note in seeing["source"]["notes"])

    # with the other normalisation there is nothing to find, and it is judged too
    (tmp_path / "args.json").write_text(json.dumps({**ARGS, "scale_rewards": False}))
    other = diagnose(path, method="grpo")
    assert "RL023" not in {d["code"] for d in other["diagnostics"]} | {e["code"] for e in other["not_checked"]}
