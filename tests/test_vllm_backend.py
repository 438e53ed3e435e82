"""Sampling with vLLM as a trainer does, colocated and with a server, in front of a stand-in for vLLM (tests/fake_vllm)."""

import copy
import json
import os
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
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM

from outspoken.trainers.rollouts import vllm_backend, vllm_server, vllm_weights
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.rollouts.vllm_backend import VLLMBackend
from outspoken.trainers.rollouts.vllm_weights import (
    Checksum,
    Sums,
    differences,
    groups_of,
    sums,
    tensor_digest,
    trained_weights,
)

FAKE = Path(__file__).parent / "fake_vllm"
WORKER = Path(__file__).with_name("vllm_worker.py")
DEEPSPEED = Path(sys.prefix) / "deepspeed"


def config(**own):
    """The fields of a trainer's config that the backend reads, with their defaults."""
    return SimpleNamespace(
        **{
            "vllm_mode": "colocate",
            "vllm_model_impl": "vllm",
            "vllm_enable_sleep_mode": False,
            "vllm_structured_outputs_regex": None,
            "vllm_server_base_url": None,
            "vllm_server_host": "0.0.0.0",
            "vllm_server_port": 8000,
            "vllm_server_timeout": 20.0,
            "vllm_group_port": 51216,
            "vllm_gpu_memory_utilization": 0.3,
            "vllm_max_model_length": None,
            "vllm_tensor_parallel_size": 1,
            "bf16": False,
            "fp16": False,
            **own,
        }
    )


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKE))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def colocated(fake, model, tiny_tokenizer):
    def build(model=model, **own):
        return VLLMBackend(model, tiny_tokenizer, config(**own), Accelerator(cpu=True))

    return build


class Server:
    """A server in a thread, which can die and return at the same address."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        self.start()

    def start(self):
        from outspoken.trainers.rollouts.vllm_engine import VLLMEngine

        self.service = vllm_server.Service(None)
        self.server = vllm_server.Server(("127.0.0.1", self.port), self.service)
        self.port = self.server.server_address[1]
        self.engine = self.service.engine = VLLMEngine(model=self.folder, dtype="float32")
        self.service.about = {"dtype": "float32", "device": "cpu", "exact_logps": self.engine.exact_logps}
        ready = threading.Event()
        self.thread = threading.Thread(target=vllm_server.serve, args=(self.server, lambda _: ready.set()))
        self.thread.start()
        ready.wait(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def die(self):
        """Refuse connections and break off the answers that are owed."""
        self.service.stop()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def server(fake, tiny_model_dir):
    running = Server(tiny_model_dir)
    yield running
    running.die()


def greedy(model, prompt, count):
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


def forced(model, prompt, completion, temperature=1.0):
    """Log-probabilities of a completion in a pass over the finished text."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def train_a_little(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


PROMPTS = [[5, 6, 7], [8, 9], [8, 9], [8, 9]]


# ------------------------------------------------------------------------------------------------------------ colocated


def test_colocated_samples_from_the_trained_weights(colocated, model):
    before = copy.deepcopy(model)
    backend = colocated()
    report = backend.push_weights(model, 0)
    assert report.pushed and report.differing == () and report.version == 0
    # Two layers of qkv, o, gate_up, down and two norms; embeddings, the last norm and the head.
    assert (report.tensors, report.compared) == (21, 15)
    assert report.bytes == sum(p.numel() * 4 for p in model.parameters())
    assert backend.generate(PROMPTS, SamplingParams(6, temperature=0.0)).completion_ids == [
        greedy(before, p, 6) for p in PROMPTS
    ]

    train_a_little(model)
    changed = backend.push_weights(model, 1)
    assert changed.checksum != report.checksum and changed.differing == ()
    sampled = backend.generate(PROMPTS, SamplingParams(6, temperature=0.0))
    assert sampled.completion_ids == [greedy(model, p, 6) for p in PROMPTS]
    assert sampled.completion_ids != [greedy(before, p, 6) for p in PROMPTS]
    assert sampled.finished == [False] * 4 and sampled.entropies is None
    metrics = changed.metrics()
    assert metrics["weights/checksum"] == int(changed.checksum[:12], 16) and metrics["weights/differing"] == 0
    backend.close()


def test_an_unchanged_version_is_not_pushed_again(colocated, model):
    backend = colocated()
    first = backend.push_weights(model, 3)
    train_a_little(model)
    second = backend.push_weights(model, 3)
    assert not second.pushed and second.checksum == first.checksum
    assert backend.push_weights(model, 4).pushed


def test_weights_are_pushed_before_the_first_completion_if_nobody_did(colocated, model):
    train_a_little(model)
    assert colocated().generate([[5, 6]], SamplingParams(5, temperature=0.0)).completion_ids == [
        greedy(model, [5, 6], 5)
    ]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 3}])
def test_logps_are_those_of_a_pass_over_the_finished_text(colocated, model, settings):
    """Also under truncation, where vLLM's own are those of the truncated distribution."""
    backend = colocated()
    sampled = backend.generate(PROMPTS, SamplingParams(7, **settings))
    for prompt, completion, logps in zip(PROMPTS, sampled.completion_ids, sampled.logps):
        assert logps == pytest.approx(forced(model, prompt, completion, settings.get("temperature", 1.0)), abs=1e-4)
    if "top_k" in settings:
        theirs = backend._engine.llm.worker.model_runner.sampler
        del theirs.forward, theirs.sample
        truncated = backend.generate(PROMPTS, SamplingParams(7, seed=1, **settings))
        exact = forced(model, PROMPTS[0], truncated.completion_ids[0], settings["temperature"])
        assert max(abs(a - b) for a, b in zip(truncated.logps[0], exact)) > 0.01


def test_where_vllm_cannot_give_such_logps_there_are_none_under_truncation(colocated, caplog):
    backend = colocated()
    backend.exact_logps = False
    for plain in ({}, {"temperature": 0.5}, {"end_ids": (1,)}, {"stop": ("x",)}, {"top_p": 1.0}):
        assert backend.generate([[5]], SamplingParams(2, **plain)).logps is not None
    for cut in ({"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"extra": {"presence_penalty": 0.5}}):
        assert backend.generate([[5]], SamplingParams(2, **cut)).logps is None
    assert caplog.text.count("only log-probabilities after top-k, top-p") == 1


def test_equal_neighbours_are_one_request_and_caps_keep_them_apart(colocated):
    backend = colocated()
    backend.push_weights(backend.model, 0)
    calls = backend._engine.llm.calls
    calls.clear()
    sampled = backend.generate([*PROMPTS, [5, 6, 7]], SamplingParams(9), caps=[4, 5, 5, 2, 4])
    prompts, params = calls[0]
    assert [p["prompt_token_ids"] for p in prompts] == [[5, 6, 7], [8, 9], [8, 9], [5, 6, 7]]
    assert [(p.n, p.max_tokens) for p in params] == [(1, 4), (2, 5), (1, 2), (1, 4)]
    assert [len(ids) for ids in sampled.completion_ids] == [4, 5, 5, 2, 4]
    backend.generate([[5], [5]], SamplingParams(3, temperature=0.0))  # vLLM refuses n=2 there
    assert [(p.n, p.max_tokens) for p in calls[1][1]] == [(1, 3)]


def test_images_go_with_their_prompts(colocated, monkeypatch):
    backend = colocated()
    backend.push_weights(backend.model, 0)
    a, b = object(), object()
    backend.generate([[5], [5], [5], [6]], SamplingParams(1), images=[[a], [a], [b], None])
    assert backend._engine.llm.calls[-1][0] == [
        {"prompt_token_ids": [5], "multi_modal_data": {"image": [a]}},
        {"prompt_token_ids": [5], "multi_modal_data": {"image": [b]}},
        {"prompt_token_ids": [6]},
    ]
    assert [p.n for p in backend._engine.llm.calls[-1][1]] == [2, 1, 1]


def test_what_ends_a_completion_is_the_trainers_to_say(colocated, model, tiny_tokenizer):
    backend = colocated()
    full = greedy(model, [5, 6, 7], 12)
    end = full[4]
    stopped = backend.generate([[5, 6, 7]], SamplingParams(12, temperature=0.0, end_ids=(end,)))
    assert stopped.completion_ids == [full[: full.index(end) + 1]] and stopped.finished == [True]
    text = tiny_tokenizer.decode(full[3:5])
    by_text = backend.generate([[5, 6, 7]], SamplingParams(12, temperature=0.0, stop=(text,)))
    assert text in tiny_tokenizer.decode(by_text.completion_ids[0]) and by_text.finished == [True]
    assert len(by_text.completion_ids[0]) <= 5
    sent = backend._engine.llm.calls[-1][1][0]
    assert (sent.ignore_eos, sent.detokenize, sent.include_stop_str_in_output) == (True, True, True)


def test_every_setting_reaches_vllm(colocated, monkeypatch):
    backend = colocated(vllm_structured_outputs_regex="[ab]+")
    sampled = backend.generate(
        [[5]],
        SamplingParams(
            3, temperature=0.7, top_p=0.9, top_k=4, min_p=0.05, repetition_penalty=1.1, extra={"presence_penalty": 0.5}
        ),
    )
    sent = backend._engine.llm.calls[-1][1][0]
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (0.7, 0.9, 4, 0.05)
    assert (sent.repetition_penalty, sent.presence_penalty, sent.logprobs) == (1.1, 0.5, 0)
    assert sent.structured_outputs.regex == "[ab]+"
    assert sampled.logps is None  # vLLM's are those under the mask
    with pytest.raises(ValueError, match="SamplingParams has no field num_beams; correct generation_kwargs"):
        backend.generate([[5]], SamplingParams(3, extra={"num_beams": 4}))


def test_the_engine_is_set_up_as_the_config_says(colocated, tiny_model_dir):
    backend = colocated(vllm_max_model_length=48, vllm_gpu_memory_utilization=0.2, vllm_model_impl="transformers")
    settings = backend._engine.llm.settings
    assert settings.model == tiny_model_dir and settings.dtype == "float32" and settings.load_format == "auto"
    assert (settings.max_model_len, settings.gpu_memory_utilization) == (48, 0.2)
    assert (settings.model_impl, settings.distributed_executor_backend) == ("transformers", "external_launcher")
    assert colocated(bf16=True)._engine.llm.settings.dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"has 48 tokens, but vLLM was started for 48.*raise vllm_max_model_length"):
        backend.generate([[5] * 48], SamplingParams(3))


def test_a_half_precision_engine_gets_weights_it_holds_to_the_bit(colocated, model):
    backend = colocated(bf16=True)
    report = backend.push_weights(model, 0)
    assert report.differing == () and report.compared == 15
    assert report.bytes == sum(p.numel() * 2 for p in model.parameters())


def test_a_model_that_was_never_saved_is_sampled_from_too(colocated, tiny_model_factory):
    fresh = tiny_model_factory(seed=4)
    backend = colocated(model=fresh)
    assert backend._engine.llm.settings.load_format == "dummy"
    assert backend.generate([[5, 6]], SamplingParams(5, temperature=0.0)).completion_ids == [greedy(fresh, [5, 6], 5)]


def test_the_trainers_generators_are_left_alone_but_for_one_draw(colocated, model):
    before = torch.get_rng_state()
    backend = colocated()
    backend.push_weights(model, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    first = backend.generate(PROMPTS, SamplingParams(6)).completion_ids
    after = torch.rand(1)
    torch.manual_seed(3)
    assert backend.generate(PROMPTS, SamplingParams(6)).completion_ids == first  # a resumed run samples the same
    assert torch.equal(torch.rand(1), after)
    assert backend.generate(PROMPTS, SamplingParams(6)).completion_ids != first
    seeded = [backend.generate(PROMPTS, SamplingParams(6, seed=9)).completion_ids for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len({tuple(ids) for ids in seeded[0][1:]}) > 1  # copies of a prompt differ


def test_a_seed_is_taken_as_it_is_given_however_large(colocated, remote, model):
    """The caller gives each step another one; JSON, the generators and a process's own share leave it whole."""
    drawn = []
    for backend in (colocated(), remote):
        for version in range(2):
            backend.push_weights(model, version)
            for seed in (2**62 - 1, 2**62 - 2):
                drawn.append(backend.generate(PROMPTS, SamplingParams(6, seed=seed)).completion_ids)
    assert drawn[0::2] == [drawn[0]] * 4 and drawn[1::2] == [drawn[1]] * 4
    assert drawn[0] != drawn[1]
    backend = colocated()
    backend.accelerator = SimpleNamespace(process_index=4095, num_processes=1, device=torch.device("cpu"))
    assert backend.generate(PROMPTS, SamplingParams(6, seed=2**62 - 1)).completion_ids not in drawn


def test_a_weight_that_vllm_does_not_take_is_named(colocated, model, monkeypatch, caplog):
    backend = colocated()
    backend.push_weights(model, 0)
    monkeypatch.setenv("FAKE_VLLM_FORGETS", "layers.1.self_attn.k_proj")
    train_a_little(model)
    report = backend.push_weights(model, 1)
    assert len(report.differing) == 1
    assert "model.layers.1.self_attn.q_proj.weight" in report.differing[0] and "qkv_proj" in report.differing[0]
    assert "vLLM holds other weights than the trained ones after push 1" in caplog.text
    assert report.metrics()["weights/differing"] == 1


def test_what_was_changed_on_the_way_is_an_error(colocated, model, monkeypatch):
    backend = colocated()
    receive = backend._engine.receive

    def damage(weights):
        receive([(n, t + 1e-6 if n == "model.norm.weight" else t) for n, t in weights])

    monkeypatch.setattr(backend._engine, "receive", damage)
    with pytest.raises(RuntimeError, match=r"The weights that reached vLLM \(checksum \w{16}\) are not those sent"):
        backend.push_weights(model, 0)
    monkeypatch.setattr(backend._engine, "receive", receive)
    assert backend.push_weights(model, 0).pushed


def test_sleep_mode_frees_memory_after_sampling_and_pushes_again(colocated, model, monkeypatch):
    with pytest.raises(ValueError, match="vllm_enable_sleep_mode frees GPU memory, but this run is on the CPU"):
        colocated(vllm_enable_sleep_mode=True)
    backend = colocated()
    backend.args.vllm_enable_sleep_mode = True
    slept = backend._engine.llm.slept
    backend.push_weights(model, 0)
    backend.generate([[5]], SamplingParams(2))
    assert slept == [("wake", "weights"), ("wake", "kv_cache"), ("sleep", 2)]
    slept.clear()
    pushes = []
    monkeypatch.setattr(
        backend._engine, "finish_update", lambda f=backend._engine.finish_update: pushes.append(1) or f()
    )
    backend.generate([[5]], SamplingParams(2))  # the weights were dropped
    assert slept == [("wake", "weights"), ("wake", "kv_cache"), ("sleep", 2)] and pushes == [1]
    slept.clear()
    backend.sleep(1)
    backend.wake()
    assert slept[0] == ("sleep", 1)


def test_settings_that_cannot_be_are_one_sentence(colocated, model, tiny_tokenizer):
    with pytest.raises(ValueError, match="vllm_mode is 'remote'; it must be 'colocate' or 'server'"):
        colocated(vllm_mode="remote")
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size is 2, which does not divide the 1 processes"):
        colocated(vllm_tensor_parallel_size=2)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_no_vllm_is_one_sentence_when_the_backend_is_built(model, tiny_tokenizer):
    with pytest.raises(
        ImportError, match=r"vllm_mode='colocate' needs vLLM, which is not installed here; .*pip install"
    ):
        VLLMBackend(model, tiny_tokenizer, config(), Accelerator(cpu=True))


def test_an_old_vllm_is_named(fake, monkeypatch):
    import vllm

    from outspoken.trainers.rollouts.vllm_engine import require_vllm

    monkeypatch.setattr(vllm, "__version__", "0.11.2")
    with pytest.raises(ImportError, match=r"needs vLLM 0.22 or newer, found 0.11.2; `pip install -U vllm`"):
        require_vllm("This")


# --------------------------------------------------------------------------------------------------------------- server


# An exception in a handler's thread is how these tests break a connection off.
BREAKS_OFF = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def remote(server, model, tiny_tokenizer):
    return VLLMBackend(
        model, tiny_tokenizer, config(vllm_mode="server", vllm_server_base_url=server.url), Accelerator(cpu=True)
    )


def test_a_server_samples_from_the_trained_weights(remote, model):
    train_a_little(model)
    report = remote.push_weights(model, 1)
    assert report.differing == () and report.compared == 15
    sampled = remote.generate(PROMPTS, SamplingParams(6, temperature=0.0))
    assert sampled.completion_ids == [greedy(model, p, 6) for p in PROMPTS]
    assert sampled.logps[0] == pytest.approx(forced(model, PROMPTS[0], sampled.completion_ids[0]), abs=1e-4)
    assert remote.generate([], SamplingParams(6)).completion_ids == []


def test_colocated_and_server_push_the_same(remote, colocated, model):
    assert colocated().push_weights(model, 0).checksum == remote.push_weights(model, 0).checksum


def test_a_server_that_was_started_anew_between_steps_gets_the_weights_again(remote, server, model, caplog):
    train_a_little(model)
    remote.push_weights(model, 1)
    server.die()
    server.start()
    sampled = remote.generate(PROMPTS, SamplingParams(6, temperature=0.0))
    assert sampled.completion_ids == [greedy(model, p, 6) for p in PROMPTS]
    assert "They are pushed again." in caplog.text
    assert server.service.weights == remote._name(1)


@BREAKS_OFF
def test_a_server_that_dies_while_it_samples_and_returns_loses_no_step(remote, server, model, monkeypatch):
    train_a_little(model)
    first = remote.push_weights(model, 1)
    dying = threading.Event()

    def die(request):
        threading.Thread(target=lambda: (server.die(), time.sleep(0.5), server.start())).start()
        dying.set()
        raise SystemExit  # the connection breaks off without an answer

    monkeypatch.setattr(server.engine, "generate", die)
    monkeypatch.setattr(vllm_server.Server, "handle_error", lambda *a: None)
    sampled = remote.generate(PROMPTS, SamplingParams(6, temperature=0.0))
    assert dying.is_set()
    assert sampled.completion_ids == [greedy(model, p, 6) for p in PROMPTS]
    assert remote.report.checksum == first.checksum and server.service.weights == remote._name(1)


@BREAKS_OFF
def test_a_server_that_dies_in_the_middle_of_a_push_gets_all_of_it_again(remote, server, model, monkeypatch):
    first = remote.push_weights(model, 0)
    train_a_little(model)
    monkeypatch.setattr("outspoken.trainers.rollouts.vllm_client.CHUNK_BYTES", 20_000)
    receive, count = server.engine.receive, []

    def die(weights):
        count.append(1)
        if len(count) == 2:
            threading.Thread(target=lambda: (server.die(), server.start())).start()
            raise SystemExit
        receive(weights)

    monkeypatch.setattr(server.engine, "receive", die)
    monkeypatch.setattr(vllm_server.Server, "handle_error", lambda *a: None)
    report = remote.push_weights(model, 1)
    assert report.restarts >= 1 and report.differing == () and report.checksum != first.checksum
    assert remote.generate(PROMPTS, SamplingParams(6, temperature=0.0)).completion_ids == [
        greedy(model, p, 6) for p in PROMPTS
    ]


def test_a_server_that_does_not_return_is_waited_for_so_long_and_no_longer(remote, server, model):
    remote.push_weights(model, 0)
    remote._client.connection_timeout = 0.5
    server.die()
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"at {server.url} within vllm_server_timeout=0.5 seconds"):
        remote.generate(PROMPTS, SamplingParams(6))
    with pytest.raises(ConnectionError, match=r"vllm_server_timeout=0\.5"):
        remote.push_weights(model, 1)
    assert time.monotonic() - started < 30
    server.start()
    assert remote.push_weights(model, 1).pushed  # and it can go on


@BREAKS_OFF
def test_a_server_that_always_dies_is_given_up(remote, server, monkeypatch):
    remote.push_weights(remote.model, 0)

    def die(request):
        raise SystemExit

    monkeypatch.setattr(server.engine, "generate", die)
    monkeypatch.setattr(vllm_server.Server, "handle_error", lambda *a: None)
    with pytest.raises(RuntimeError, match="went away 5 times while it sampled the same prompts"):
        remote.generate(PROMPTS, SamplingParams(6))


def test_two_trainers_on_one_server_do_not_sample_from_each_others_weights(remote, server, model, tiny_tokenizer):
    other_model = copy.deepcopy(model)
    train_a_little(other_model)
    other = VLLMBackend(other_model, tiny_tokenizer, remote.args, Accelerator(cpu=True))
    remote.push_weights(model, 1)
    other.push_weights(other_model, 1)
    assert remote.generate(PROMPTS, SamplingParams(6, temperature=0.0)).completion_ids == [
        greedy(model, p, 6) for p in PROMPTS
    ]
    assert other.generate(PROMPTS, SamplingParams(6, temperature=0.0)).completion_ids == [
        greedy(other_model, p, 6) for p in PROMPTS
    ]


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_digest_sees_every_bit_and_its_place(dtype, monkeypatch):
    torch.manual_seed(0)
    tensor = torch.randn(37, 5).to(dtype) if dtype is not torch.bool else torch.randn(37, 5) > 0
    first, kept = tensor_digest(tensor), tensor.clone()
    monkeypatch.setattr(vllm_weights, "_CHUNK", 16)
    assert tensor_digest(tensor) == first  # however it is cut
    assert tensor_digest(tensor.T.contiguous().T) == first and torch.equal(tensor, kept)
    swapped = tensor.clone()
    a, b = next((i, j) for i in range(30) for j in range(30) if tensor[i, 0] != tensor[j, 0])
    swapped[a, 0], swapped[b, 0] = tensor[b, 0], tensor[a, 0]
    assert tensor_digest(swapped) != first
    changed = tensor.clone()
    changed[36, 4] = ~tensor[36, 4] if dtype is torch.bool else tensor[36, 4] + 1
    assert tensor_digest(changed) != first
    assert 0 <= first < 1 << 64


def test_a_checksum_knows_names_and_shapes_but_no_order():
    a, b = torch.arange(6.0), torch.ones(2, 3)

    def of(*named):
        checksum = Checksum()
        for name, tensor in named:
            checksum.add(name, tensor)
        return checksum.hex

    assert of(("a", a), ("b", b)) == of(("b", b), ("a", a))
    assert of(("a", a), ("b", b)) != of(("b", a), ("a", b))
    assert of(("a", a)) != of(("a", a.view(2, 3)))
    assert of(("a", a)) != of(("a", a.double()))
    assert len(of()) == 16


def test_sums_against_arithmetic(monkeypatch):
    monkeypatch.setattr(vllm_weights, "_CHUNK", 4)
    assert sums(torch.arange(11.0, dtype=torch.bfloat16)) == Sums(55.0, 385.0, 11, "bfloat16")


def test_groups_join_what_vllm_fused():
    loaded = {"q": ["qkv"], "n": ["n"], "k": ["qkv"], "gone": [], "wide": ["x", "y"], "y": ["y"]}
    groups = {(tuple(names), tuple(sorted(parameters))) for names, parameters in groups_of(loaded)}
    assert groups == {(("q", "k"), ("qkv",)), (("n",), ("n",)), (("wide", "y"), ("x", "y"))}


def test_differences_between_what_was_sent_and_what_workers_hold():
    torch.manual_seed(0)
    q, k, norm, embed = torch.randn(8, 4), torch.randn(4, 4), torch.randn(4), torch.randn(10, 4)
    sent = {"q": sums(q), "k": sums(k), "norm": sums(norm), "embed_tokens": sums(embed)}
    groups = [(["q", "k"], ["qkv"]), (["norm"], ["norm"]), (["embed_tokens"], ["embed_tokens"])]
    padded = torch.cat([embed, torch.zeros(6, 4)])
    workers = [
        {
            "qkv": sums(torch.cat([q[4 * i : 4 * i + 4], k[2 * i : 2 * i + 2]])),
            "norm": sums(norm),
            "embed_tokens": sums(padded[8 * i : 8 * i + 8]),
        }
        for i in range(2)
    ]
    assert differences(sent, groups, workers) == ([], 3)
    whole = {"qkv": sums(torch.cat([q, k]).T), "norm": sums(norm), "embed_tokens": sums(embed)}
    assert differences(sent, groups, [whole]) == ([], 3)

    stale = k.clone()
    stale[0, 0] += 1e-5
    found, compared = differences(sent, groups, [{**whole, "qkv": sums(torch.cat([q, stale]))}])
    assert compared == 3 and len(found) == 1 and found[0].startswith("q, k (sum of squares")
    # One worker of two has an old norm.
    found, _ = differences(sent, groups, [workers[0], {**workers[1], "norm": sums(norm + 1e-4)}])
    assert len(found) == 1 and found[0].startswith("norm ")
    # Key and value heads that workers hold twice cannot be told apart by sums, nor can what is not readable.
    doubled = [{**w, "qkv": sums(torch.cat([q[:4], k]))} for w in workers]
    assert differences(sent, groups, doubled) == ([], 2)
    assert differences(sent, groups, [{"norm": sums(norm)}]) == ([], 1)
    half = {
        name: sums(t.bfloat16()) for name, t in (("qkv", torch.cat([q, k])), ("norm", norm), ("embed_tokens", embed))
    }
    assert differences(sent, groups, [half]) == ([], 3)
    nan = torch.full((4,), torch.nan)
    assert differences({**sent, "norm": sums(nan)}, groups, [{**whole, "norm": sums(nan)}]) == ([], 3)
    assert len(differences(sent, groups, [{**whole, "norm": sums(nan)}])[0]) == 1


ADAPTERS = {
    "lora": LoraConfig(target_modules=["q_proj", "gate_proj"], r=4, lora_alpha=16),
    "rslora": LoraConfig(target_modules=["v_proj"], r=4, use_rslora=True),
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], r=4, use_dora=True),
    "embedding": LoraConfig(target_modules=["embed_tokens", "k_proj"], r=4),
    "head too": LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head", "norm"]),
    "tokens": LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=[3, 4]),
    "tokens only": TrainableTokensConfig(token_indices=[1, 2]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged_into_what_is_pushed_and_not_into_the_model(kind, tiny_model_factory):
    torch.manual_seed(1)
    base = tiny_model_factory(seed=2)
    model = get_peft_model(copy.deepcopy(base), ADAPTERS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    pushed = {name: tensor.clone() for name, tensor in trained_weights(model)}

    merged = copy.deepcopy(model).merge_and_unload()
    wanted = dict(merged.named_parameters())
    assert pushed.keys() == wanted.keys() == dict(base.named_parameters()).keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(pushed[name], tensor, atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(pushed[name], p) for name, p in base.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # And the model that those weights make says what the adapted one says.
    base.load_state_dict(pushed, strict=False)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_half_precision_base_weights_do_not_drift_with_the_pushes(tiny_model_factory):
    model = get_peft_model(tiny_model_factory().bfloat16(), ADAPTERS["dora"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = {name: tensor.clone() for name, tensor in trained_weights(model)}
    for _ in range(5):
        last = dict(trained_weights(model))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(torch.equal(first[name], tensor) for name, tensor in last.items())


def test_tied_weights_are_sent_once_and_conv1d_as_it_is(tiny_model_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    tied = tiny_model_factory(tie_word_embeddings=True)
    names = [name for name, _ in trained_weights(tied)]
    assert "lm_head.weight" not in names and len(names) == len(set(names)) == 20
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    adapted = get_peft_model(gpt2, LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    with torch.no_grad():
        adapted.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.normal_()
    pushed = {name: tensor.clone() for name, tensor in trained_weights(adapted)}
    wanted = dict(copy.deepcopy(adapted).merge_and_unload().named_parameters())
    assert pushed.keys() == wanted.keys()
    torch.testing.assert_close(
        pushed["transformer.h.0.attn.c_attn.weight"], wanted["transformer.h.0.attn.c_attn.weight"], atol=1e-6, rtol=0
    )


def test_weights_have_their_checkpoints_names(tmp_path):
    """What transformers fuses when it loads (experts) goes to vLLM as it is stored, which is what vLLM reads."""
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        )
    )
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".experts.3.w2" in name for name in stored)
    pushed = dict(trained_weights(model))
    assert pushed.keys() == stored.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in stored.items())


def test_of_a_large_model_some_weights_are_read_back_at_each_push_in_turn(colocated, model, monkeypatch):
    monkeypatch.setattr(vllm_backend, "_READ_BACK", 6000)
    backend = colocated()
    seen = []
    original = backend._engine.weight_sums
    monkeypatch.setattr(backend._engine, "weight_sums", lambda names: seen.append(set(names)) or original(names))
    compared = [backend.push_weights(model, version).compared for version in range(8)]
    assert all(0 < count < 15 for count in compared)
    assert len(set.union(*seen)) == 15


# -------------------------------------------------------------------------------------------------------- two processes


def two_processes(task, what, model_dir, folder, **environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(DEEPSPEED)] if what == "zero3" and DEEPSPEED.is_dir() else []
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), task, what, model_dir, str(folder)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def results(processes, folder):
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in told)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["ddp", "fsdp1", "fsdp2", "zero3"])
def test_sharded_weights_are_gathered_and_adapters_merged(spread, tiny_model_dir, tmp_path):
    if spread == "zero3" and not (DEEPSPEED.is_dir() or find_spec("deepspeed")):
        pytest.skip("deepspeed is not installed; `make test-all` installs it where it can")
    for rank in results(two_processes("weights", spread, tiny_model_dir, tmp_path), tmp_path):
        for kind, found in rank.items():
            if (kind, spread) == ("dora", "fsdp2"):
                assert "cannot be merged under FSDP; use a plain LoRA" in found["refused"]
                continue
            assert found["missing"] == found["unknown"] == [], kind
            assert found["off"] < 1e-6, kind
            assert found["digests"][0] == found["digests"][1], kind


@pytest.mark.slow
def test_two_processes_with_uneven_prompts_share_a_server_and_its_errors(server, tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    stop = tmp_path / "stop"
    processes = two_processes("sample", server.url, tiny_model_dir, tmp_path, STOP=str(stop))
    while not stop.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.1)
    server.die()
    stop.unlink(missing_ok=True)
    first, second = results(processes, tmp_path)
    server.start()
    assert first["checksum"] == second["checksum"]
    assert first["completions"] == [greedy(model, [5, 6], 3), greedy(model, [7, 8, 9], 6), greedy(model, [7, 8, 9], 6)]
    assert second["completions"] == [greedy(model, [7, 8, 9], 6), greedy(model, [4], 2)]
    assert first["few"] == [] and second["few"] == [greedy(model, [5, 6], 2)]
    for rank in (first, second):
        assert rank["errors"][0].startswith("ValueError: vLLM's SamplingParams has no field top_q")
        assert rank["errors"][1].startswith(f"ConnectionError: No vLLM server answered at {server.url} within")
        assert rank["together"] == [True, True]  # so the trainer leaves a checkpoint behind


@pytest.mark.slow
def test_two_colocated_processes_stop_together_where_one_fails(tiny_model_dir, tmp_path):
    first, second = results(
        two_processes("colocate", "1", tiny_model_dir, tmp_path, PYTHONPATH=str(FAKE)),
        tmp_path,
    )
    for rank in (first, second):
        assert rank["differing"] == [] and rank["checksum"] == first["checksum"]
        assert rank["greedy"][0] == rank["greedy"][1]
        assert rank["together"] is True
    drawn = [tuple(ids) for ids in first["random"] + second["random"]]
    assert len(set(drawn)) == 8  # the same prompt in both processes is not answered alike
    assert first["error"].startswith("ValueError: vLLM's SamplingParams has no field top_q")
    assert second["error"].startswith(
        "RuntimeError: Process 0 failed, so this one stops too. There: ValueError: vLLM's SamplingParams"
    )
