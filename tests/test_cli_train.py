"""The commands that train: settings from YAML and the command line, their mistakes, and small runs that really train."""

import json
import sys
from dataclasses import dataclass, field

import pytest

from outspoken.cli import main, settings, training
from outspoken.cli.common import CommandError
from outspoken.cli.settings import Fields, Given

SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": "false",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": "true",
    "logging_steps": 1,
    "disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def grpo_fields():
    return training.fields_of("grpo")


@pytest.fixture
def yaml_file(tmp_path):
    """`yaml_file(text or dict)` writes run.yaml."""

    def write(content):
        path = tmp_path / "run.yaml"
        if isinstance(content, dict):
            content = "".join(f"{key}: {value}\n" for key, value in content.items())
        path.write_text(content)
        return path

    return write


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.delenv("OUTSPOKEN_DEBUG", raising=False)

    def call(*arguments):
        capsys.readouterr()
        code = main.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def convert(fields, name, value):
    return fields.convert(Given(name, value, "here"))


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("learning_rate", "1e-5", 1e-5),
        ("max_steps", "100", 100),
        ("bf16", "true", True),
        ("bf16", "no", False),
        ("gradient_checkpointing", "off", None),
        ("eval_strategy", "no", "no"),
        ("reward_weights", ["1", "-0.5"], [1.0, -0.5]),
        ("reward_weights", "2", [2.0]),
        ("reward_funcs", "exact_match_reward", ["exact_match_reward"]),
        ("scale_rewards", "batch", "batch"),
        ("include_num_input_tokens_seen", "all", "all"),
        ("include_num_input_tokens_seen", "false", False),
        ("run_name", "007", "007"),
        ("run_name", "--odd", "--odd"),
        ("generation_kwargs", {"num_beams": 2}, {"num_beams": 2}),
        ("generation_kwargs", '{"num_beams": 2}', {"num_beams": 2}),
        ("epsilon_high", None, None),
        ("report_to", ["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        ("pad_to_multiple_of", "8", "8"),
        ("lora_target_modules", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_texts_become_values_by_the_types_of_the_fields(grpo_fields, name, text, value):
    if value is None and text is not None:
        with pytest.raises(CommandError, match="must be true or false, not 'off'"):
            convert(grpo_fields, name, text)
    else:
        assert convert(grpo_fields, name, text) == value


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("learning_rate", "fast", "here: learning_rate must be a number, not 'fast'."),
        ("max_steps", "1.5", "here: max_steps must be a whole number, not '1.5'."),
        ("learning_rate", ["1", "2"], "here: learning_rate must be a number, not 2 values."),
        ("learning_rate", {"a": 1}, "here: learning_rate must be a number, not a mapping."),
        ("learning_rate", None, "here: learning_rate must be a number, not null."),
        ("diagnose", "maybe", "here: diagnose must be true or false, not 'maybe'."),
        ("reward_weights", ["1", "x"], "here: reward_weights must be one or more numbers or null, not '1', 'x'."),
        ("dtype", "int7", "here: dtype must be one of auto, bfloat16, float16, float32 or null, not 'int7'."),
        ("eval_strategy", "sometimes", "here: eval_strategy must be one of no, steps, epoch, not 'sometimes'."),
        ("generation_kwargs", "{oops", "here: generation_kwargs is no JSON"),
    ],
)
def test_what_does_not_fit_is_told(grpo_fields, name, text, said):
    with pytest.raises(CommandError) as error:
        convert(grpo_fields, name, text)
    assert str(error.value).startswith(said)


def test_every_field_of_the_configs_can_be_written(grpo_fields):
    """Each default, written as text, gives the default again: no field's type is beyond the command line."""
    for fields in (grpo_fields, training.fields_of("sft")):
        for row in fields.table():
            default = row["default"]
            assert row["takes"]
            if isinstance(default, bool | int | float | str):
                assert convert(fields, row["name"], str(default)) == default, row["name"]


def test_names_with_hyphens_aliases_and_close_matches(grpo_fields):
    assert grpo_fields.resolve("learning-rate", "x") == "learning_rate"
    assert grpo_fields.resolve("dataset_train_split", "x") == "dataset_split"
    with pytest.raises(CommandError, match=r"run.yaml line 3: 'learning_rat' is no field .* 'learning_rate'"):
        grpo_fields.resolve("learning_rat", "run.yaml line 3")


def test_a_refusal_of_the_config_names_the_place(grpo_fields):
    given = [Given("num_generations", "1", "run.yaml line 7")]
    with pytest.raises(CommandError, match=r"run.yaml line 7: num_generations is 1"):
        grpo_fields.build(given)


# ---------------------------------------------------------------------- YAML


def read(yaml_file, text, fields):
    return {g.name: g for g in settings.read_yaml(yaml_file(text), fields)}


def test_yaml_gives_texts_with_their_lines(yaml_file, grpo_fields):
    text = (
        "# a comment\n"
        "learning_rate: 1e-5\n"
        "eval_strategy: no\n"
        "run-name: '007'\n"
        "epsilon_high: null\n"
        "beta:\n"
        "reward_weights: [1, -0.5]\n"
        "generation_kwargs: {num_beams: 2}\n"
        "lora_target_modules:\n"
        "  - q_proj\n"
    )
    given = read(yaml_file, text, grpo_fields)
    assert {name: g.value for name, g in given.items()} == {
        "learning_rate": "1e-5",
        "eval_strategy": "no",
        "run_name": "007",
        "epsilon_high": None,
        "beta": None,
        "reward_weights": ["1", "-0.5"],
        "generation_kwargs": {"num_beams": 2},
        "lora_target_modules": ["q_proj"],
    }
    assert given["generation_kwargs"].where.endswith("run.yaml line 8")


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rate: [1\nmax_steps: 3\n", "run.yaml line 2: this is no YAML"),
        ("a: b: c\n", "run.yaml line 1: this is no YAML"),
        ("- one\n- two\n", "run.yaml line 1: expected lines like 'learning_rate: 1e-5'"),
        ("just a text", "run.yaml line 1: expected lines like"),
        ("max_steps: 3\nlearning_rat: 1\n", "run.yaml line 2: 'learning_rat' is no field"),
        (
            "reward_weights:\n  - [1, 2]\n",
            "run.yaml line 1: reward_weights must be one or more numbers or null, not a list",
        ),
        ("? [a, b]\n: 1\n", "run.yaml line 1: a field's name must be a word"),
        ("a: !!python/object:os.system {}\n", "'a' is no field"),
        ("generation_kwargs: !!python/object/apply:os.system ['true']\n", "must be a mapping"),
        ("generation_kwargs: {a: !!python/name:os.system ''}\n", "run.yaml line 1: this is no YAML"),
        ("max_steps: \x00\n", "this is no YAML"),
        ("max_steps: 3\nmax-steps: 4\n", "run.yaml line 2: max_steps stands already at"),
    ],
)
def test_yaml_that_is_wrong(yaml_file, grpo_fields, text, said):
    with pytest.raises(CommandError) as error:
        for given in settings.read_yaml(yaml_file(text), grpo_fields):
            grpo_fields.convert(given)
    assert said in str(error.value)


def test_yaml_files_that_cannot_be_read(tmp_path, grpo_fields):
    with pytest.raises(CommandError, match=r"missing.yaml cannot be read: No such file"):
        settings.read_yaml(tmp_path / "missing.yaml", grpo_fields)
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match="not UTF-8"):
        settings.read_yaml(path, grpo_fields)
    path.write_text("")
    assert settings.read_yaml(path, grpo_fields) == []


# ---------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (["--learning_rate", "1e-5"], {"learning_rate": "1e-5"}),
        (["--learning-rate=1e-5"], {"learning_rate": "1e-5"}),
        (["--bf16"], {"bf16": "true"}),
        (["--no_diagnose"], {"diagnose": "false"}),
        (["--no-diagnose"], {"diagnose": "false"}),
        (["--reward_weights", "1", "-0.5", "--beta", "-1"], {"reward_weights": ["1", "-0.5"], "beta": "-1"}),
        (["--run_name=--x"], {"run_name": "--x"}),
        (["--epsilon_high", "none"], {"epsilon_high": None}),
        (["--report_to", "none"], {"report_to": "none"}),
        (["--dataset_test_split", "test"], {"eval_dataset_split": "test"}),
    ],
)
def test_the_command_line(grpo_fields, tokens, expected):
    assert {g.name: g.value for g in settings.read_arguments(tokens, grpo_fields)} == expected


@pytest.mark.parametrize(
    "tokens, said",
    [
        (["--learning_rat", "1"], "command line: 'learning_rat' is no field"),
        (["run.yaml"], "'run.yaml' stands alone"),
        (["-x"], "'-x' stands alone"),
        (["--learning_rate"], "--learning_rate needs a value: a number."),
        (["--no_learning_rate"], "'no_learning_rate' is no field"),
    ],
)
def test_a_command_line_that_is_wrong(grpo_fields, tokens, said):
    with pytest.raises(CommandError) as error:
        settings.read_arguments(tokens, grpo_fields)
    assert said in str(error.value)


def test_the_last_one_counts():
    first = [Given("a", "1", "file line 1"), Given("b", "2", "file line 2")]
    second = [Given("a", "3", "--a"), Given("a", "4", "--a")]
    assert {g.name: g.value for g in settings.merged(first, second)} == {"a": "4", "b": "2"}


def test_fields_of_any_dataclasses():
    @dataclass
    class Settings:
        rate: float = 0.1
        names: list[str] = field(default_factory=list)

    (built,) = Fields(Settings).build([Given("rate", "0.5", "x"), Given("names", ["a", "b"], "x")])
    assert built == Settings(0.5, ["a", "b"])


# ---------------------------------------------------------------------- rewards


def test_reward_functions_by_name_module_and_file(tmp_path, monkeypatch):
    from outspoken.trainers import rewards

    assert training.reward_function("exact_match_reward") is rewards.exact_match_reward
    dotted = "outspoken.trainers.rewards.think_format_reward"
    assert training.reward_function(dotted) is rewards.think_format_reward
    (tmp_path / "mine.py").write_text("def score(completions, **_):\n    return [len(c) for c in completions]\n")
    by_file = training.reward_function(f"{tmp_path}/mine.py:score")
    assert by_file(completions=["ab"]) == [2] and by_file.__name__ == "score"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert training.reward_function("mine.score")(completions=["abc"]) == [3]


@pytest.mark.parametrize(
    "name, said",
    [
        ("exact_match", "did you mean 'exact_match_reward'?"),
        ("nothing", "ready-made are accuracy_reward"),
        ("no.such.module", "'no.such' cannot be imported: ModuleNotFoundError"),
        ("math.squirt", "'squirt' does not exist there; did you mean 'sqrt'?"),
        ("math.pi", "'pi' is no function there"),
        ("missing.py:f", "there is no file 'missing.py'"),
        ("{tmp}/broken.py:f", "fails when it is imported: ZeroDivisionError"),
        ("{tmp}/fine.py:scor", "did you mean 'score'?"),
        ("{tmp}/text.txt:f", "is no Python file"),
    ],
)
def test_reward_functions_that_are_not_there(tmp_path, name, said):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "fine.py").write_text("def score(**_): return []\n")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CommandError) as error:
        training.reward_function(name.format(tmp=tmp_path), "run.yaml line 4: ")
    assert str(error.value).startswith("run.yaml line 4: reward_funcs names") and said in str(error.value)


# ---------------------------------------------------------------------- runs


@pytest.fixture
def data(tmp_path):
    """A folder with small datasets for both methods."""
    rows = [{"prompt": "What is 2 + 2?", "completion": " It is 4.", "answer": "4"}] * 16
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(c) % 3) for c in completions]\n"
        "def fails(completions, **_):\n    raise KeyError('answer')\n"
    )
    return tmp_path


def test_sft_trains_and_tells(cli, data, yaml_file, tiny_model_dir):
    content = {**SMALL, "model_name_or_path": tiny_model_dir, "dataset_path": data / "rows.jsonl"}
    content |= {"output_dir": data / "out", "learning_rate": "1e-3", "max_steps": 3}
    code, out, err = cli("sft", "--config", yaml_file(content), "--max_steps", "2", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 2 and result["status"] == "finished"  # the command line wins over the file
    assert result["verdict"]["schema"] == "outspoken.verdict/1"
    assert (data / "out" / "model.safetensors").exists()
    run = json.loads((data / "out" / "outspoken" / "run.json").read_text())
    assert run["config"]["learning_rate"] == 1e-3 and run["method"] == "sft"


def test_grpo_trains_an_adapter_with_a_function_of_a_file(cli, data, yaml_file, tiny_model_dir):
    content = {**SMALL, "model_name_or_path": tiny_model_dir, "dataset_path": data / "rows.jsonl"}
    content |= {"output_dir": data / "out", "reward_funcs": f"['{data}/rewards.py:length', think_format_reward]"}
    content |= {"num_generations": 2, "max_completion_length": 8, "reward_weights": "[1, 0.5]"}
    content |= {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}
    code, out, err = cli("grpo", "--config", yaml_file(content), "--diagnostics_ignore", "RL002")
    assert code == 0, err
    assert "[outspoken] trained 2 steps; the model is in" in out and "outspoken diagnose" in out
    assert (data / "out" / "adapter_model.safetensors").exists()
    lines = (data / "out" / "outspoken" / "metrics.jsonl").read_text().splitlines()
    assert "rewards/length/mean" in json.loads(lines[0])["signals"]


def test_a_run_without_diagnostics(cli, data, tiny_model_dir):
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    options += [f"--model_name_or_path={tiny_model_dir}", f"--dataset_path={data / 'rows.jsonl'}", "--no_diagnose"]
    code, out, err = cli("sft", *options, f"--output_dir={data / 'out'}", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["verdict"] is None and result["run_dir"] is None
    assert not (data / "out" / "outspoken").exists()


def test_evaluation_on_another_file(data, tiny_model_dir):
    (data / "eval.csv").write_text("text\nThe sky is blue.\nIt is 7.\n")
    options = [f"--{key}={value}" for key, value in {**SMALL, "max_steps": 1, "eval_strategy": "steps"}.items()]
    options += [f"--model_name_or_path={tiny_model_dir}", f"--dataset_path={data / 'eval.csv'}", "--eval_steps=1"]
    options += [f"--eval_dataset_path={data / 'eval.csv'}", f"--output_dir={data / 'out'}"]
    training.train("sft", None, options)
    signals = {}
    for line in (data / "out" / "outspoken" / "metrics.jsonl").read_text().splitlines():
        signals |= json.loads(line)["signals"]
    assert "eval_loss" in signals


def test_training_that_fails_exits_with_one(cli, data, tiny_model_dir):
    options = [f"--{key}={value}" for key, value in {**SMALL, "num_generations": 2}.items()]
    options += [f"--model_name_or_path={tiny_model_dir}", f"--dataset_path={data / 'rows.jsonl'}"]
    options += [f"--reward_funcs={data / 'rewards.py'}:fails", f"--output_dir={data / 'out'}"]
    code, out, err = cli("grpo", *options, "--max_completion_length=4", "--json")
    error = json.loads(out)["error"]
    assert code == 1
    assert error.startswith("training failed at step 0: RuntimeError: Reward function 'fails' raised KeyError")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"model_name_or_path": None}, "run.yaml: model_name_or_path is missing"),
        ({"dataset_path": None}, "run.yaml: no dataset is named"),
        ({"dataset_path": "missing.jsonl"}, "dataset_path 'missing.jsonl' does not exist"),
        ({"dataset_path": "{tmp}/rewards.py"}, "is no .json, .jsonl"),
        ({"dataset_path": "{tmp}/bad.jsonl"}, "cannot be loaded: "),
        ({"dataset_name": "some/name"}, "either dataset_name or dataset_path"),
        ({"dataset_split": "tst"}, "dataset_split is 'tst', but"),
        ({"reward_funcs": None}, "run.yaml: no reward is named; give reward_funcs (accuracy_reward"),
        ({"reward_funcs": "exact_mach_reward"}, "did you mean 'exact_match_reward'?"),
        ({"model_name_or_path": "/nowhere/model"}, "model_name_or_path '/nowhere/model' does not exist."),
        ({"model_name_or_path": "no-such-model-here"}, "no-such-model-here"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'."),
        ({"learning_rat": "1"}, "did you mean 'learning_rate'?"),
        ({"loss_type": "grop"}, "loss_type"),
        ({"num_generations": "7"}, "num_generations"),
        ({"load_in_4bit": "true"}, "load_in_4bit needs an adapter to train; set use_peft: true."),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint 'nowhere' is no folder"),
        ({"diagnostics_params": "{RL016: {nope: 1}}"}, "nope"),
    ],
)
def test_wrong_settings_are_one_sentence(cli, data, yaml_file, tiny_model_dir, changed, said):
    (data / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    content = {**SMALL, "model_name_or_path": tiny_model_dir, "dataset_path": data / "rows.jsonl"}
    content |= {"output_dir": data / "out", "reward_funcs": "exact_match_reward", "num_generations": 2}
    content |= {"max_completion_length": 4, **changed}
    written = {k: str(v).replace("{tmp}", str(data)) for k, v in content.items() if v is not None}
    path = yaml_file(written)
    code, out, err = cli("grpo", "--config", path)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "") and said in last and last.startswith("outspoken: ")
    assert "Traceback" not in err
    # The sentence names the file; and the line, unless the fault is that something is missing or several do not fit.
    (name,) = changed
    assert "run.yaml" in last
    if changed[name] is not None and name not in ("dataset_name", "num_generations"):
        assert f"run.yaml line {list(written).index(name) + 1}: " in last


def test_fields_are_listed(cli):
    code, out, _ = cli("grpo", "--fields")
    assert code == 0 and "max_completion_length" in out and "Can change while it trains." in out
    rows = {row["name"]: row for row in json.loads(cli("sft", "--fields", "--json")[1])}
    assert rows["learning_rate"] == {
        "name": "learning_rate",
        "takes": "a number",
        "default": 2e-5,
        "live": True,
        "help": "Peak learning rate.",
    }
    assert rows["lora_r"]["default"] == 16 and "reward_funcs" not in rows


def test_an_adapter_setting_without_an_adapter_is_told(data, tiny_model_dir, capsys):
    options = [f"--{key}={value}" for key, value in {**SMALL, "max_steps": 1, "lora_r": 4}.items()]
    options += [f"--model_name_or_path={tiny_model_dir}", f"--dataset_path={data / 'rows.jsonl'}"]
    training.train("sft", None, [*options, f"--output_dir={data / 'out'}"])
    assert "--lora_r: lora_r has no effect without use_peft: true." in capsys.readouterr().err


def test_resuming_from_the_last_checkpoint(data, tiny_model_dir):
    options = [f"--{key}={value}" for key, value in {**SMALL, "save_strategy": "steps", "save_steps": 2}.items()]
    options += [f"--model_name_or_path={tiny_model_dir}", f"--dataset_path={data / 'rows.jsonl'}"]
    options += [f"--output_dir={data / 'out'}", "--resume_from_checkpoint=last"]
    assert training.train("sft", None, options)["steps"] == 2
    assert training.train("sft", None, [*options, "--max_steps=4"])["steps"] == 4
    lines = (data / "out" / "outspoken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)["signals"]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch):
    """The files in examples/ as they are, for fewer steps."""
    import shutil
    import subprocess
    from pathlib import Path

    import outspoken

    root = Path(outspoken.__file__).parent
    shutil.copytree(root / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("tiny"))
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "examples/make_tiny.py"], check=True, timeout=120)
    for method in ("sft", "grpo"):
        result = training.train(method, f"examples/{method}.yaml", ["--max_steps", "5", "--disable_tqdm"])
        assert result["steps"] == 5
        assert (tmp_path / "examples" / "tiny" / "runs" / method / "outspoken" / "verdict.json").exists()


def test_a_mixture_of_datasets_in_yaml(cli, yaml_file, tmp_path, tiny_model_dir):
    for name, text in (("one", "a b c"), ("two", "d e f")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(8)))
    entry = "  - path: json\n    data_files: {0}/{1}.jsonl\n    columns: [text]\n"
    mixture = "datasets:\n" + "".join(entry.format(tmp_path, name) for name in ("one", "two"))
    settings = "".join(f"{key}: {value}\n" for key, value in SMALL.items())
    config = yaml_file(f"model_name_or_path: {tiny_model_dir}\noutput_dir: {tmp_path}/out\n{settings}{mixture}")
    code, out, err = cli("sft", "--config", config, "--test_split_size", "4", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 2

    code, _, err = cli("sft", "--config", config, "--dataset_path", "x.jsonl")
    assert code == 2 and "give either datasets or dataset_path, not both." in err
    wrong = yaml_file(config.read_text().replace("columns", "colums"))
    code, _, err = cli("sft", "--config", wrong)
    assert code == 2 and "`datasets[0]` has the unknown field colums" in err and "run.yaml line" in err
    listed = yaml_file(f"model_name_or_path: {tiny_model_dir}\ndatasets: [json, csv]\noutput_dir: {tmp_path}/out\n")
    code, _, err = cli("sft", "--config", listed)
    assert code == 2 and "datasets must be a list of mappings or null" in err


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", {"prompt": "2+2=", "chosen": "4", "rejected": "5"}),
        ("reward", {"prompt": "2+2=", "chosen": "4", "rejected": "5"}),
        ("kto", {"prompt": "2+2=", "completion": "4", "label": True}),
    ],
)
def test_offline_methods_train_from_yaml(method, row, cli, yaml_file, tmp_path, tiny_model_dir):
    rows = [{**row, "prompt": f"{i}+2="} for i in range(8)]
    if "label" in row:
        rows = [{**r, "label": bool(i % 2), "completion": str(i)} for i, r in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"model_name_or_path": tiny_model_dir, "dataset_path": tmp_path / "rows.jsonl", **SMALL}
    config = yaml_file({**settings, "output_dir": tmp_path / "out"})
    extra = ["--ref_model_name_or_path", tiny_model_dir] if method != "reward" else ["--use_peft", "true"]
    code, out, err = cli(method, "--config", config, *extra, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["method"], result["steps"]) == (method, 2)
    assert json.loads((tmp_path / "out" / "outspoken" / "run.json").read_text())["method"] == method
