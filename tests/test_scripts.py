"""What a script needs, beside TRL's: arguments from YAML and command line, adapters, quantization, mixtures, copies."""

import dataclasses
import logging
import os
import warnings
from dataclasses import dataclass, field

import pytest
import torch
import trl
from datasets import Dataset

import outspoken
from outspoken.trainers.data.mixtures import DatasetConfig, DatasetMixtureConfig, get_dataset
from outspoken.trainers.scripts import ModelConfig, ScriptParser, get_peft_config, get_quantization_config


@dataclass
class Arguments:
    steps: int
    rate: float = 0.1
    names: list[str] = field(default_factory=list)
    flag: bool = False
    maybe: int | None = 3


@dataclass
class More:
    text: str = "a"
    options: dict | None = None


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", ["ScriptArguments", "ModelConfig", "DatasetMixtureConfig"])
def test_fields_and_defaults_are_trls(name):
    def described(cls):
        return {f.name: (f.default, f.default_factory, f.metadata.get("choices")) for f in dataclasses.fields(cls)}

    mine, theirs = getattr(outspoken, name), getattr(trl, name)
    assert described(mine) == described(theirs)
    assert list(described(mine)) == list(described(theirs))
    assert all(f.metadata["help"] for f in dataclasses.fields(mine))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["--steps", "3", "--names", "x", "y", "--flag"]),
        ("steps: 3\nrate: 1e-5\nnames: [x, y]\nflag: true\nmaybe: null\noptions: {a: 1}\n", []),
        ("steps: 3\nrate: 0.5\n", ["--rate", "0.25", "--maybe", "none", "--text", "b"]),
        ("steps: 3\ntext: 7\n", ["--flag", "false"]),
    ],
)
def test_parsing_equals_trl(text, words, config):
    prefix = [] if text is None else ["--config", config(text)]
    expected = trl.TrlParser([Arguments, More]).parse_args_and_config(prefix + words)
    assert ScriptParser([Arguments, More]).parse_args_and_config(prefix + words) == expected
    if prefix:
        joined = [f"--config={prefix[1]}"]
        assert ScriptParser((Arguments, More)).parse_args_and_config(words + joined) == expected


@pytest.mark.parametrize("separate", [True, False])
def test_what_nobody_knows_is_returned_as_trl_does(separate, config):
    words = ["--config", config("steps: 3\nunknown: 1\nother: [1, 2]\n"), "--strange", "4"]
    kwargs = {"return_remaining_strings": True, "separate_remaining_strings": separate}
    expected = trl.TrlParser(Arguments).parse_args_and_config(words, **kwargs)
    assert ScriptParser(Arguments).parse_args_and_config(words, **kwargs) == expected
    one = ScriptParser(Arguments).parse_args_and_config(words[:2], fail_with_unknown_args=False)
    assert one == trl.TrlParser(Arguments).parse_args_and_config(words[:2], fail_with_unknown_args=False)
    with pytest.raises(ValueError, match=r"config.yaml: no argument is called 'unknown', 'other'; remove or rename"):
        ScriptParser(Arguments).parse_args_and_config(words[:2])


def test_subparsers_take_the_values_of_the_file(config):
    def parse(cls):
        parser = cls(prog="prog")
        subparsers = parser.add_subparsers(dest="command", parser_class=cls)
        subparsers.add_parser("train", dataclass_types=Arguments)
        return parser.parse_args_and_config(["train", "--config", config("steps: 3\n"), "--rate", "0.5"])

    assert parse(ScriptParser) == parse(trl.TrlParser)


def test_the_environment_is_set(config, monkeypatch):
    monkeypatch.setenv("OUTSPOKEN_TEST_ONE", "before")
    monkeypatch.delenv("OUTSPOKEN_TEST_TWO", raising=False)
    words = ["--config", config("steps: 1\nenv: {OUTSPOKEN_TEST_ONE: 1, OUTSPOKEN_TEST_TWO: b}\n")]
    assert ScriptParser(Arguments).parse_args_and_config(words) == (Arguments(1),)
    assert (os.environ["OUTSPOKEN_TEST_ONE"], os.environ.pop("OUTSPOKEN_TEST_TWO")) == ("1", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\n  rate: 2\n", r"config.yaml, line 2: no valid YAML \(mapping values are not allowed here\)."),
        ("- 1\n- 2\n", r"must hold `name: value` lines \(a YAML mapping\), but holds \[1, 2\]"),
        ("steps: 1\nenv: x\n", "config.yaml: `env` must be a mapping of environment variables, but is 'x'"),
        (None, r"`--config` is '.*config.yaml', which cannot be read \(No such file or directory\)."),
    ],
)
def test_files_that_cannot_be_used(text, message, config, tmp_path):
    path = config(text) if text is not None else str(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=message):
        ScriptParser(Arguments).parse_args_and_config(["--config", path])


def test_arguments_that_cannot_be_used():
    @dataclass
    class Reserved:
        config: str = ""

    with pytest.raises(ValueError, match="Reserved has a field 'config', but `--config` names the YAML file"):
        ScriptParser(Reserved)
    with pytest.raises(ValueError, match="`--config` has no value; give the path"):
        ScriptParser(Arguments).parse_args_and_config(["--steps", "1", "--config"])


def test_a_script_reads_all_it_needs(config):
    text = (
        "model_name_or_path: some/model\nlora_target_modules: [all-linear]\nuse_peft: true\nlearning_rate: 1e-6\n"
        "output_dir: out\nbeta: 0.1\ndatasets:\n  - path: one\n    fraction: 0.5\n  - {path: two, fraction: 0.5}\n"
    )
    types = (outspoken.ScriptArguments, outspoken.GRPOConfig, ModelConfig, DatasetMixtureConfig)
    script, grpo, model, mixture = outspoken.TrlParser(types).parse_args_and_config(
        ["--config", config(text), "--dataset_name", "three"]
    )
    assert script.dataset_name == "three"
    assert (grpo.learning_rate, grpo.beta) == (1e-6, 0.1)
    assert (model.model_name_or_path, model.lora_target_modules) == ("some/model", "all-linear")
    assert mixture.datasets == [DatasetConfig("one", fraction=0.5), DatasetConfig("two", fraction=0.5)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_peft": True},
        {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]},
        {"use_peft": True, "lora_target_modules": ["all-linear"], "use_rslora": True, "use_dora": True},
        {"use_peft": True, "lora_task_type": "SEQ_CLS", "lora_modules_to_save": ["score"]},
        {"use_peft": True, "lora_target_parameters": ["mlp.experts.down_proj"]},
    ],
)
def test_adapters_are_trls(fields):
    mine = get_peft_config(ModelConfig(**fields))
    assert mine == trl.get_peft_config(trl.ModelConfig(**fields))
    assert (mine is None) == (not fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "dtype": "bfloat16", "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    ],
)
def test_quantization_is_trls(fields):
    mine = get_quantization_config(ModelConfig(**fields))
    theirs = trl.get_quantization_config(trl.ModelConfig(**fields))
    assert (mine and mine.to_dict()) == (theirs and theirs.to_dict())
    assert (mine is None) == (not fields)


def test_what_trl_cannot_quantize():
    automatic = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="auto"))
    assert automatic.bnb_4bit_compute_dtype is torch.float32  # TRL raises AttributeError
    with pytest.raises(ValueError, match="`load_in_8bit` and `load_in_4bit` are both set; choose one"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)


def test_quiet_start_logs_errors_only(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # as at the start of a program
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.setattr(warnings, "showwarning", None)
    outspoken.init_zero_verbose()
    assert logging.root.level == logging.ERROR
    logging.root.info("quiet")
    logging.root.error("loud")
    warnings.showwarning("look", UserWarning, "file.py", 3)
    shown = "".join(capsys.readouterr())
    assert "loud" in shown and "quiet" not in shown and "look" not in shown
    logging.root.setLevel(logging.WARNING)
    warnings.showwarning("look", UserWarning, "file.py", 3)
    assert "UserWarning: look" in " ".join("".join(capsys.readouterr()).split())


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """JSON files with 10 and 20 rows, as a mapping of their name to their path."""
    paths = {}
    for name, rows in (("one", 10), ("two", 20)):
        paths[name] = str(tmp_path / f"{name}.jsonl")
        Dataset.from_dict({"text": [f"{name}{i}" for i in range(rows)], "n": list(range(rows))}).to_json(paths[name])
    return paths


@pytest.mark.parametrize(
    "fields",
    [
        ({}, {}),
        ({"columns": ["text"]}, {"columns": ["text"]}),
        ({"fraction": 0.5}, {"fraction": 0.5}),
        ({"fraction": 3}, {"fraction": 1}),
        ({"fraction": 0}, {"fraction": 1}),
        ({"split": "train[:30%]"}, {"fraction": None}),
    ],
)
def test_mixtures_equal_trl(fields, files):
    entries = [{"path": "json", "data_files": path, **f} for path, f in zip(files.values(), fields)]
    mine = get_dataset(DatasetMixtureConfig(datasets=[dict(e) for e in entries]))
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=[dict(e) for e in entries]))
    assert mine["train"].to_dict() == theirs["train"].to_dict()
    assert list(mine) == list(theirs) == ["train"]


def test_streamed_mixture_and_test_split(files):
    entries = [{"path": "json", "data_files": path} for path in files.values()]
    stream = get_dataset(DatasetMixtureConfig(datasets=list(entries), streaming=True))
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=list(entries), streaming=True))
    assert list(stream["train"]) == list(theirs["train"])

    split = get_dataset(DatasetMixtureConfig(datasets=list(entries), test_split_size=0.2))
    again = get_dataset(DatasetMixtureConfig(datasets=list(entries), test_split_size=0.2))
    assert (len(split["train"]), len(split["test"])) == (24, 6)
    assert split["test"].to_dict() == again["test"].to_dict()  # TRL draws another one in every process
    assert {*split["train"]["text"][:]}.isdisjoint(split["test"]["text"][:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DatasetMixtureConfig(datasets=[{"path": "a", "weight": 1}]),
            r"`datasets\[0\]` has the unknown field w",
        ),
        (lambda: DatasetMixtureConfig(datasets=[DatasetConfig("a"), {"name": "b"}]), r"`datasets\[1\]` has no path;"),
        (lambda: DatasetMixtureConfig(datasets=["a"]), r"`datasets\[0\]` has the unknown field 'a'"),
        (lambda: get_dataset(DatasetMixtureConfig()), "The mixture has no dataset; name at least one in `datasets`."),
        (
            lambda: get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig("a", fraction=1), DatasetConfig("b")])),
            "Dataset 'b' has no `fraction`, but others have",
        ),
        (
            lambda: get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig("a", fraction=-1)])),
            r"The datasets' fractions are \[-1\]; none may be negative",
        ),
        (
            lambda: get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig("a", fraction=1)], streaming=True)),
            "The length of a stream is unknown, so `fraction` does not go with `streaming`",
        ),
        (
            lambda: get_dataset(DatasetMixtureConfig([DatasetConfig("a")], streaming=True, test_split_size=0.1)),
            "A stream cannot be split, so `test_split_size` does not go with `streaming`",
        ),
    ],
)
def test_mixtures_that_do_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- reference models -------------------------------------------------------------------------------------------------


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2))


@pytest.mark.parametrize("shared", [None, 0, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reference_model_equals_trl(shared, family, tiny_model_factory):
    from trl.experimental.utils import create_reference_model as theirs

    build = tiny_model_factory if family == "llama" else _gpt2
    torch.manual_seed(0)
    model = build()
    model.train()
    other = build()
    other.load_state_dict(model.state_dict())
    reference, expected = outspoken.create_reference_model(model, shared), theirs(other, shared)

    def sharing(one, copy):
        return [a.data_ptr() == b.data_ptr() for a, b in zip(one.parameters(), copy.parameters())]

    assert sharing(model, reference) == sharing(other, expected)
    assert any(sharing(model, reference)) == (shared is not None)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training and model.training
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))


def test_layers_that_are_not_there(tiny_model_factory):
    model = tiny_model_factory()
    with pytest.raises(ValueError, match="No parameter belongs to layer 9 "):
        outspoken.create_reference_model(model, 9)
    # TRL freezes the whole model, and warns.
    with pytest.raises(ValueError, match=r"No parameter belongs to layer 1 \(blocks.\{layer\}\)"):
        outspoken.create_reference_model(model, 1, pattern="blocks.{layer}")
    assert all(p.requires_grad for p in model.parameters())
    named = outspoken.create_reference_model(model, 1, pattern="layers.{layer}")
    assert named.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert named.model.layers[1].mlp.up_proj.weight.data_ptr() != model.model.layers[1].mlp.up_proj.weight.data_ptr()
