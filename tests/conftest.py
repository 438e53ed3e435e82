"""Fixtures that several test files share: a tiny tokenizer and tiny models, built in memory without any download."""

import copy
import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Nothing in the suite may reach the network, and several suites run side by side on few cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# ChatML with tools. `%s` stands where the variant marks what the assistant wrote.
_CHAT_TEMPLATE = (
    "{%% if tools %%}{{ '<|im_start|>system\\nTools:' }}"
    "{%% for tool in tools %%}{{ '\\n' + (tool | tojson) }}{%% endfor %%}{{ '<|im_end|>\\n' }}{%% endif %%}"
    "{%% for message in messages %%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%% if message['role'] == 'assistant' %%}%s"
    "{{ message['content'] or '' }}"
    "{%% for call in message.get('tool_calls') or [] %%}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{%% endfor %%}"
    "{{ '<|im_end|>' }}%s{{ '\\n' }}"
    "{%% else %%}{{ message['content'] + '<|im_end|>\\n' }}{%% endif %%}"
    "{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
CHAT_TEMPLATES = {
    "plain": _CHAT_TEMPLATE % ("", ""),
    "generation": _CHAT_TEMPLATE % ("{% generation %}", "{% endgeneration %}"),
}

_CORPUS = [
    "The sky is blue and the grass is green.",
    "What color is the sky? It is blue.",
    "What is 2 + 2? It is 4. What is 3 + 4? It is 7.",
    "system user assistant tool the quick brown fox jumps over the lazy dog",
]


@pytest.fixture(scope="session")
def tiny_chat_templates():
    """ChatML templates that render the same text: "plain", and "generation" with `{% generation %}` markers."""
    return dict(CHAT_TEMPLATES)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_chat_templates):
    """A byte-level BPE tokenizer of 300 tokens: any text, `<|endoftext|>` as EOS, `<|pad|>`, ChatML with markers.

    Shared by the session: a test that changes it (or hands it to a trainer that may) takes `tiny_tokenizer_factory`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=tiny_chat_templates["generation"],
        model_max_length=4096,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_factory(tiny_tokenizer):
    """`factory(**attributes)`: a fresh copy of `tiny_tokenizer`, with attributes such as `chat_template` set."""

    def build(**attributes):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return build


@pytest.fixture(scope="session")
def tiny_model_factory(tiny_tokenizer):
    """`factory(seed=0, architecture="llama", **config)`: a float32 causal language model, the same for the same seed.

    Two layers, hidden size 32, the vocabulary of `tiny_tokenizer`; `architecture` is "llama" or "qwen2", further
    keyword arguments are fields of its config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}

    def build(seed=0, architecture="llama", **config):
        config_class, model_class = classes[architecture]
        fields = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            # The default of 0.02 leaves all logits near zero, where mistakes in the loss hide.
            "initializer_range": 0.2,
            **config,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_class(config_class(**fields))
        model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
        model.generation_config.pad_token_id = tiny_tokenizer.pad_token_id
        return model

    return build


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_model_factory, tiny_tokenizer):
    """A directory with a saved tiny model and its tokenizer, to be loaded by path. Read-only by agreement."""
    path = tmp_path_factory.mktemp("tiny-model")
    tiny_model_factory().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


# ------------------------------------------------------------------------------------------- short runs


@pytest.fixture(scope="session")
def short_run():
    """Settings, of any config, of a run on the CPU that leaves nothing but its log."""
    return {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def fast_collection():
    """Trainer collects garbage at each start; what is imported already need not be looked at every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def at_step():
    """`at_step(step, act)`: a callback that calls `act(args, model)` when a step has ended."""
    from transformers import TrainerCallback

    class At(TrainerCallback):
        def __init__(self, step, act):
            self.step, self.act = step, act

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == self.step:
                self.act(args, model)

    return At


@pytest.fixture(scope="session")
def gradient_tape():
    """A callback class; its `steps` are the gradients of every parameter before each optimizer step."""
    from transformers import TrainerCallback

    class GradientTape(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    return GradientTape


class CompletionScript:
    """Completions of 1 to 6 tokens, from the call's number: about half end in EOS, the rest are cut."""

    def __init__(self, eos, first=4):
        """`first`: the first of the 300 tokens that is not a special one."""
        self.eos, self.first, self.calls = eos, first, 0

    def __call__(self, prompt_ids):
        rng = random.Random(self.calls)
        self.calls += 1
        completions = []
        for _ in prompt_ids:
            ids = [rng.randrange(self.first, 290) for _ in range(rng.randint(1, 6))]
            completions.append([*ids[:-1], self.eos] if rng.random() < 0.5 else ids)
        return completions


@pytest.fixture(scope="session")
def completion_script():
    """The class `CompletionScript`."""
    return CompletionScript


# ------------------------------------------------------------------------------------------- runs with planted faults


class WatchedRun:
    """A run that really trained, as its run directory tells it afterwards.

    Attributes:
        run, verdict: the records. metrics: one a step. diagnostics: one a transition, in order.
    """

    def __init__(self, output_dir, args=None):
        folder = Path(output_dir) / "outspoken"
        self.path, self.args = folder, args
        self.run = json.loads((folder / "run.json").read_text())
        self.verdict = json.loads((folder / "verdict.json").read_text())
        self.metrics = _json_lines(folder / "metrics.jsonl")
        self.diagnostics = _json_lines(folder / "diagnostics.jsonl")

    @property
    def config(self):
        return self.run["config"]

    def first(self, code, state="firing", severity=None):
        """The record with which a rule first entered a state (at a severity); None if it never did."""
        found = (d for d in self.diagnostics if (d["code"], d["state"]) == (code, state))
        return next((d for d in found if severity in (None, d["severity"])), None)

    def fired(self):
        """Code -> step at which it first fired with a severity above info."""
        loud = [d for d in self.diagnostics if d["state"] == "firing" and d["severity"] != "info"]
        return {d["code"]: d["step"] for d in reversed(loud)}

    def series(self, name):
        """(step, value) of a signal."""
        return [(m["step"], m["signals"][name]) for m in self.metrics if m["signals"].get(name) is not None]

    def root(self, code, *, planted, within, severity, effects=(), beside=()):
        """Assert that the fault was found, and as the root: the record with which `code` fired at `severity`.

        It fires at most `within` steps after step `planted`, and nothing else fires above info but `beside`. The
        `effects` are there too, suppressed, and their causes lead back to `code`.
        """
        record = self.first(code, severity=severity)
        assert record is not None, f"{code} never fired as {severity}; fired: {self.fired()}"
        delay = record["step"] - planted
        others = {c: step for c, step in self.fired().items() if c != code}
        info = sorted({d["code"] for d in self.diagnostics if d["state"] == "firing"} - {code, *others})
        held = {d["code"] for d in self.diagnostics if d["state"] == "suppressed"}
        causes = {}
        for d in self.diagnostics:
            causes.setdefault(d["code"], set()).update(cause["code"] for cause in d["causes"])
        print(f"FAULT {code} | {planted} | {record['step']} | {delay} | {severity} | beside {others} | info {info} | "
              f"suppressed {sorted(held)}")  # fmt: skip
        assert 0 <= delay <= within, f"{code} fired {delay} steps after the fault, not within {within}"
        assert others.keys() <= set(beside), f"beside {code} fired: {others}"
        for effect in effects:
            assert effect in held, f"{effect} was not suppressed; suppressed: {sorted(held)}"
            known, new = set(), {effect}
            while new:
                known |= new
                new = {cause for e in new for cause in causes.get(e, ())} - known
            assert code in known, f"the causes of {effect} are {known - {effect}}, without {code}"
        return record

    def changes(self, record):
        """Field -> (old, new) over all patches of a diagnostic's suggestions, the first that sets a field.

        Each patch is checked like one that an agent sends, and against the config: any field counts as one that may
        be changed, because some of the fixes are for the next run, but the live ones keep their bounds, and the
        config class must take the new values together.
        """
        from outspoken.diagnostics.patches import check_patch

        bounds = {name: {} for name in self.config} | self.run["live"]
        given = {f.name: getattr(self.args, f.name) for f in dataclasses.fields(self.args) if f.init}
        derived = {"steps_per_generation", "generation_batch_size"} & given.keys()
        found = {}
        for suggestion in record["suggestions"]:
            if suggestion["patch"]:
                changes = check_patch(suggestion["patch"], self.config, bounds)
                new = {name: pair[1] for name, pair in changes.items()}
                type(self.args)(**given | dict.fromkeys(derived - changes.keys()) | new)
                found = changes | found
        return found


@pytest.fixture(scope="session")
def watched_run():
    """The class `WatchedRun`."""
    return WatchedRun


def _json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class SumsLab:
    """Trains the demo's tiny model on its sums: `sft` from scratch, `grpo` from the shared supervised model.

    Both take what the trainer takes, and return a `WatchedRun`.
    """

    SFT_STEPS, GRPO_STEPS, CAP, GROUP = 800, 100, 24, 8

    def __init__(self, folder, weights=None):
        """`weights`: a function that gives the path of the supervised model's weights."""
        from outspoken.cli import demo_task

        self.task, self.folder, self.weights = demo_task, folder, weights
        self.tokenizer = demo_task.build_tokenizer()
        self._runs = 0

    def model(self, pretrained=False):
        import torch

        torch.set_num_threads(1)
        model = self.task.build_model(self.tokenizer, seed=0)
        if pretrained:
            model.load_state_dict(torch.load(self.weights()))
        return model

    def settings(self, **own):
        self._runs += 1
        common = {
            "output_dir": str(self.folder / f"run-{self._runs}"),
            "seed": 0,
            "report_to": [],
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "use_cpu": True,
            "logging_steps": 5,
            "disable_tqdm": True,
        }
        return common | own

    def sft(self, steps, *, model=None, dataset=None, trainer=None, options=None, save_to=None, **settings):
        """`trainer`: a class to use instead of `SFTTrainer`. `options`: further arguments of the trainer."""
        from outspoken import SFTConfig, SFTTrainer

        defaults = {
            "max_steps": steps,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
        }
        return self._train(
            (trainer or SFTTrainer)(
                self.model() if model is None else model,
                args=SFTConfig(**self.settings(**defaults | settings)),
                train_dataset=self.task.solved_examples(4000, seed=1) if dataset is None else dataset,
                processing_class=self.tokenizer,
                **options or {},
            ),
            save_to,
        )

    def grpo(self, reward=None, steps=GRPO_STEPS, *, model=None, dataset=None, trainer=None, options=None, **settings):
        from outspoken import GRPOConfig, GRPOTrainer

        defaults = {
            "max_steps": steps,
            "per_device_train_batch_size": 64,
            "num_generations": self.GROUP,
            "max_completion_length": self.CAP,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
        }
        return self._train(
            (trainer or GRPOTrainer)(
                self.model(pretrained=True) if model is None else model,
                self.task.right_answer if reward is None else reward,
                args=GRPOConfig(**self.settings(**defaults | settings)),
                train_dataset=self.task.problems(2000, seed=2) if dataset is None else dataset,
                processing_class=self.tokenizer,
                **options or {},
            )
        )

    def _train(self, trainer, save_to=None):
        import torch
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if save_to is not None:
            torch.save(trainer.model.state_dict(), save_to)
        return WatchedRun(trainer.args.output_dir, trainer.args) if trainer.args.diagnose else trainer

    @staticmethod
    def schedule(model, learning_rate, factor):
        """Trainer options with AdamW and a learning rate of `learning_rate * factor(step)`, as a user may pass them."""
        import torch

        optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
        return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))}


def _once(tmp_path_factory, name, make):
    """A folder that `make(folder)` fills once a test session, also where several processes share its tests."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the folder that `make(folder)` filled, once a test session."""
    return lambda name, make: _once(tmp_path_factory, name, make)


@pytest.fixture(scope="session")
def pretrained_sums(tmp_path_factory):
    """Folder of the demo's supervised stage, 800 healthy steps: `weights.pt` and the run in `run-1`."""
    return _once(
        tmp_path_factory,
        "pretrained-sums",
        lambda folder: SumsLab(folder).sft(SumsLab.SFT_STEPS, save_to=folder / "weights.pt"),
    )


@pytest.fixture(scope="session")
def healthy_sft(pretrained_sums):
    return WatchedRun(pretrained_sums / "run-1")


@pytest.fixture(scope="session")
def healthy_grpo(tmp_path_factory, pretrained_sums):
    """The demo's healthy GRPO run: what the runs with a fault are without it."""
    weights = pretrained_sums / "weights.pt"
    folder = _once(tmp_path_factory, "healthy-grpo", lambda folder: SumsLab(folder, lambda: weights).grpo())
    return WatchedRun(folder / "run-1")


@pytest.fixture
def sums(request, tmp_path):
    """A `SumsLab`; its `grpo` first trains the shared supervised model, once a session."""
    return SumsLab(tmp_path, lambda: request.getfixturevalue("pretrained_sums") / "weights.pt")


# ------------------------------------------------------------------------------------------- models that take images

_VISION_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
_VISION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for b in m['content'] %}"
    "{% if b['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ b['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_vision_processor():
    """`factory()`: a new processor of Qwen2-VL's kind: byte-level tokens, ChatML with blocks of text and images."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class StillsProcessor(Qwen2VLProcessor):
        """Qwen's processor without videos, which need torchvision."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def build():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=_VISION_TOKENS, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(_CORPUS, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>",
            extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        )  # fmt: skip
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=32 * 32
        )
        return StillsProcessor(images, tokenizer, chat_template=_VISION_TEMPLATE)

    return build


@pytest.fixture(scope="session")
def tiny_vision_model():
    """`factory(seed=0, width=32)`: a Qwen2.5-VL of two layers with the tokens of `tiny_vision_processor`."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def build(seed=0, width=32):
        text = {
            "vocab_size": 300, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": None,
            "eos_token_id": 3, "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [1, 1, width // 8 - 2], "rope_theta": 10000.0
            },
        }  # fmt: skip
        vision = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": width, "window_size": 16,
            "fullatt_block_indexes": [1], "in_channels": 3, "initializer_range": 0.2,
        }  # fmt: skip
        ids = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 4, "vision_end_token_id": 5}
        torch.set_num_threads(1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 1
        return model

    return build


# ------------------------------------------------------------------------------------------- runs of two processes

# How a model is spread -> the accelerate config that comes with the package. Accelerate itself shards over accelerators
# only, so the workers let it take the CPU for one; what loads and moves weights for GPUs is switched off.
SPREAD = {"ddp": "ddp_cpu", "fsdp1": "fsdp1", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # where `make test-all` puts it, beside the environment


@pytest.fixture(params=SPREAD)
def spread(request):
    """Each way to spread a model over two processes; for some of them, parametrize it indirectly."""
    if request.param.startswith("zero") and not (DEEPSPEED.is_dir() or find_spec("deepspeed")):
        pytest.skip("deepspeed is not installed; `make test-all` installs it where it can")
    return request.param


@pytest.fixture(scope="session")
def launch():
    """`launch(script, spread, folder, *arguments, seconds=900)`: the exit code of `script FOLDER *arguments`.

    It is a script of this folder, run in one process (`spread` None) or two; what they print goes to FOLDER/log.txt.
    """
    import yaml

    from outspoken.cli.env import accelerate_config

    def run(script, spread, folder, *arguments, seconds=900):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTSPOKEN_LOG": "off", "TOKENIZERS_PARALLELISM": "false"}
        launcher = []
        if spread is not None:
            config = yaml.safe_load(accelerate_config(SPREAD[spread]).read_text())
            config |= {"num_processes": 2, "mixed_precision": "no"}
            for option in ("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"):
                if option in config.get("fsdp_config", {}):
                    config["fsdp_config"][option] = False
            file = folder / "accelerate.yaml"
            file.write_text(yaml.safe_dump(config))
            launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
            if spread.startswith("zero"):
                environment["DS_ACCELERATOR"] = "cpu"
                if DEEPSPEED.is_dir():
                    environment["PYTHONPATH"] = os.pathsep.join([str(DEEPSPEED), environment.get("PYTHONPATH", "")])
        command = [sys.executable, *launcher, str(Path(__file__).with_name(script)), str(folder), *arguments]
        with open(folder / "log.txt", "a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise

    return run


@pytest.fixture(scope="session")
def left_by():
    """`left_by(folder, case)`: the folder that a case of a launched script left; fails with its error if it did not."""

    def find(folder, case):
        if not (folder / case / "result.json").exists():
            told = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("*/error-*.txt")))
            pytest.fail(f"{case} left no result. {told or (folder / 'log.txt').read_text()[-3000:]}")
        return folder / case

    return find


@pytest.fixture(scope="session")
def saved_weights():
    """`saved_weights(folder)`: name -> tensor of what a model was saved in."""
    from safetensors.torch import load_file

    def load(folder):
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        assert found, f"no weights in {folder}"
        return found

    return load


@pytest.fixture(scope="session")
def assert_same_weights(saved_weights):
    """`assert_same_weights(folder, expected_folder, tolerance, only="")`; `only`: those with this in their names."""
    import torch

    def compare(actual, expected, tolerance, only=""):
        actual, expected = ({n: v for n, v in saved_weights(f).items() if only in n} for f in (actual, expected))
        assert actual.keys() == expected.keys() and actual
        for name in expected:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )

    return compare
