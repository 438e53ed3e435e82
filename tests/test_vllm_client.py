"""The vLLM server and its client over real HTTP, in front of a stand-in for vLLM's engine (tests/fake_vllm)."""

import http.client
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from outspoken.trainers.rollouts import vllm_client, vllm_server
from outspoken.trainers.rollouts.vllm_client import ServerUnavailable, VLLMClient, WeightsLost
from outspoken.trainers.rollouts.vllm_weights import Checksum, sums

FAKE = Path(__file__).parent / "fake_vllm"
SAMPLING = {"temperature": 1.0, "stop_token_ids": [], "ignore_eos": True}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """A server in a thread of this process."""

    def __init__(self, folder, monkeypatch, port=0, **settings):
        monkeypatch.syspath_prepend(str(FAKE))
        from outspoken.trainers.rollouts.vllm_engine import VLLMEngine

        self.service = vllm_server.Service(None)
        self.server = vllm_server.Server(("127.0.0.1", port), self.service)
        self.service.engine = VLLMEngine(model=folder, dtype="float32", **settings)
        self.service.about = {
            "dtype": "float32",
            "device": "cpu",
            "max_model_len": self.service.engine.max_model_len,
            "exact_logps": self.service.engine.exact_logps,
        }
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        ready = threading.Event()
        self.thread = threading.Thread(target=vllm_server.serve, args=(self.server, lambda _: ready.set()))
        self.thread.start()
        ready.wait(10)

    def stop(self):
        self.service.stop()
        self.thread.join(10)
        self.server.server_close()


@pytest.fixture
def start(tiny_model_dir, monkeypatch):
    running = []

    def start(**settings):
        running.append(Running(tiny_model_dir, monkeypatch, **settings))
        return running[-1]

    yield start
    for one in running:
        one.stop()
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def raw(port, method, path, body=b"", kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {"Content-Type": kind})
    response = connection.getresponse()
    status, text = response.status, response.read()
    connection.close()
    return status, json.loads(text)


def request(prompts, n=None, max_tokens=None, seed=0, **sampling):
    return {
        "prompts": prompts,
        "n": n or [1] * len(prompts),
        "max_tokens": max_tokens or [4] * len(prompts),
        "sampling": {**SAMPLING, **sampling},
        "seed": seed,
    }


def test_a_server_says_what_it_is_and_samples(start):
    running = start(max_model_len=64)
    client = VLLMClient(base_url=running.url)

    assert client.info["server"] == "outspoken vllm-serve" and client.info["weights"] is None
    assert client.get_world_size() == 1
    answer = client.generate(request([[5, 6], [7]], n=[2, 1], max_tokens=[3, 5]))
    assert [len(ids) for ids in answer["completion_ids"]] == [3, 3, 5]
    assert [len(row) for row in answer["logps"]] == [3, 3, 5]
    assert answer["finished"] == [False] * 3
    again = client.generate(request([[5, 6], [7]], n=[2, 1], max_tokens=[3, 5]))
    assert again["completion_ids"] == answer["completion_ids"]  # the same seed
    other = client.generate(request([[5, 6], [7]], n=[2, 1], max_tokens=[3, 5], seed=1))
    assert other["completion_ids"] != answer["completion_ids"]


def test_weights_travel_in_several_requests_and_change_what_is_sampled(start, tiny_model_factory, monkeypatch):
    running = start()
    client = VLLMClient(base_url=running.url)
    posts = []
    original = client._request
    monkeypatch.setattr(client, "_request", lambda *a, **k: (posts.append(a[1]), original(*a, **k))[1])
    monkeypatch.setattr(vllm_client, "CHUNK_BYTES", 10_000)
    greedy = request([[5, 6, 7]], max_tokens=[8], temperature=0.0)
    before = client.generate(greedy)["completion_ids"]

    model = tiny_model_factory(seed=7)
    checksum = Checksum()
    client.start_update("a-1")
    with pytest.raises(WeightsLost, match="half of an update"):
        client.generate(greedy)
    for name, parameter in model.named_parameters():
        checksum.add(name, parameter)
        client.send(name, parameter)
    answer = client.finish_update()

    assert answer["checksum"] == checksum.hex
    assert posts.count("/update_named_params/") > 3
    assert answer["loaded"]["model.layers.0.self_attn.k_proj.weight"] == ["model.layers.0.self_attn.qkv_proj.weight"]
    assert client.check_server()["weights"] == "a-1"
    after = client.generate(greedy, weights="a-1")["completion_ids"]
    expected = model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert after == [expected[0, 3:].tolist()] and after != before
    held = client.weight_sums(["model.norm.weight"])[0]["model.norm.weight"]
    assert held == pytest.approx(sums(model.model.norm.weight))
    assert running.service.engine.llm.calls.count("reset_prefix_cache") == 1
    with pytest.raises(WeightsLost, match="'a-1', not 'a-2'"):
        client.generate(greedy, weights="a-2")


def test_images_travel_as_png_and_arrive_as_they_were(start, monkeypatch):
    from PIL import Image

    running = start()
    seen = []
    monkeypatch.setattr(
        running.service.engine,
        "generate",
        lambda asked: seen.append(asked) or {"completion_ids": [[1]], "logps": [[float("nan")]], "finished": [True]},
    )
    picture = Image.new("RGB", (3, 2), (10, 200, 30))
    answer = VLLMClient(base_url=running.url).generate({**request([[5]]), "images": [[picture]]})
    assert seen[0]["images"][0][0].tobytes() == picture.tobytes()
    assert answer["logps"][0][0] != answer["logps"][0][0]  # NaN has no JSON, and comes back as NaN


def test_what_is_wrong_with_a_request_is_one_sentence(start):
    running = start(max_model_len=16)
    client = VLLMClient(base_url=running.url)
    with pytest.raises(ValueError, match=r"SamplingParams has no field top_q; correct generation_kwargs"):
        client.generate(request([[5]], top_q=1))
    with pytest.raises(ValueError, match=r"refuses the sampling settings: top_p must be in \(0, 1\], got 3"):
        client.generate(request([[5]], top_p=3))
    with pytest.raises(ValueError, match=r"may not set logprobs"):
        client.generate(request([[5]], logprobs=5))
    with pytest.raises(ValueError, match=r"has 20 tokens, but vLLM was started for 16.*vllm_max_model_length"):
        client.generate(request([[5] * 20]))
    with pytest.raises(ValueError, match="none of them empty"):
        client.generate(request([[]], n=[1], max_tokens=[1]))
    with pytest.raises(ValueError, match="`n` must be a list with one integer for each of the 1 prompts"):
        client.generate(request([[5]], n=[1, 1]))
    with pytest.raises(ValueError, match=r"generation_kwargs holds something that cannot be sent"):
        client.generate(request([[5]], structured_outputs=object()))
    client.generate(request([[5]], logit_bias={7: -1.5}))  # whose keys are strings in JSON
    assert running.service.engine.llm.calls[-1][1][0].logit_bias == {7: -1.5}
    assert client.generate(request([[5] * 14], max_tokens=[50]))["finished"] == [False]  # cut where the window ends


def test_the_server_takes_no_pickles_no_other_types_and_no_unknown_paths(start, tmp_path):
    running = start()
    trap = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (trap,))

    client = VLLMClient(base_url=running.url)
    client.start_update("x")
    for path in ("/update_named_params/", "/generate/"):
        for kind in ("application/json", "application/octet-stream"):
            status, answer = raw(running.port, "POST", path, pickle.dumps(Evil()), kind)
            assert status in (400, 500) and answer["error"]
    assert not trap.exists()
    assert raw(running.port, "POST", "/generate/", b"{}", "text/plain")[0] == 415
    assert raw(running.port, "POST", "/../etc/passwd", b"{}")[0] == 404
    assert raw(running.port, "GET", "/generate/")[0] == 404
    assert raw(running.port, "POST", "/generate/", b"[1]") == (400, {"error": "The body must be a JSON object."})
    assert raw(running.port, "POST", "/start_weight_update/", b"{}") == (400, {"error": "The body lacks 'weights'."})
    assert raw(running.port, "GET", "/health")[1]["status"] == "ok"


def test_weights_without_an_update_are_refused(start):
    running = start()
    body = save({"model.norm.weight": torch.zeros(32)})
    status, answer = raw(running.port, "POST", "/update_named_params/", body, "application/octet-stream")
    assert status == 409 and "No update of the weights is under way" in answer["error"]


def test_health_answers_while_the_engine_samples(start, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VLLM_SLOW", "1.0")
    monkeypatch.setenv("FAKE_VLLM_MARK", str(tmp_path / "sampling"))
    running = start()
    client = VLLMClient(base_url=running.url)
    thread = threading.Thread(target=client.generate, args=(request([[5]]),))
    thread.start()
    while not (tmp_path / "sampling").exists():
        time.sleep(0.01)
    assert raw(running.port, "GET", "/health/")[0] == 200
    assert thread.is_alive()
    thread.join()


def test_no_server_is_one_sentence_after_the_time_given():
    port = free_port()
    with pytest.raises(
        ConnectionError,
        match=rf"No vLLM server answered at http://127.0.0.1:{port} within vllm_server_timeout=0.3 seconds "
        r"\(ConnectionRefusedError.*start one with `outspoken vllm-serve --model … --port .*vllm_server_base_url",
    ):
        VLLMClient(host="127.0.0.1", server_port=port, connection_timeout=0.3)
    with pytest.raises(
        ValueError, match=r"vllm_server_base_url is 'localhost:8000'; it must be like http://host:8000"
    ):
        VLLMClient(base_url="localhost:8000")


def test_a_server_that_comes_late_is_waited_for(start):
    port = free_port()
    late = threading.Timer(0.5, lambda: start(port=port))
    late.start()
    client = VLLMClient(host="127.0.0.1", server_port=port, connection_timeout=20)
    assert client.info["status"] == "ok"
    late.join()


def answering(text):
    """A server that gives one answer to whatever is asked; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(text)

    threading.Thread(target=serve, daemon=True).start()
    return listener


def test_another_kind_of_server_is_named():
    for text in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",  # `vllm serve`
        b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    ):
        with answering(text) as listener:
            port = listener.getsockname()[1]
            with pytest.raises(
                RuntimeError, match=rf"127.0.0.1:{port} is no `outspoken vllm-serve`.*vllm_server_base"
            ):
                VLLMClient(host="127.0.0.1", server_port=port)


def test_a_connection_that_breaks_is_told_from_an_answer_that_takes_too_long(start, monkeypatch, tmp_path):
    client = VLLMClient(base_url=start().url)
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{") as listener:
        client.port = listener.getsockname()[1]
        with pytest.raises(ServerUnavailable):
            client.get_world_size()
    with answering(b"HTTP/1.1 503 busy\r\nContent-Length: 0\r\n\r\n") as listener:
        client.port = listener.getsockname()[1]
        with pytest.raises(ServerUnavailable, match="503"):
            client.get_world_size()
    monkeypatch.setenv("FAKE_VLLM_SLOW", "2")
    monkeypatch.setenv("FAKE_VLLM_MARK", str(tmp_path / "sampling"))
    slow = VLLMClient(base_url=start().url, request_timeout=0.2)
    with pytest.raises(TimeoutError, match=r"did not answer /generate/ within 0.2 seconds; restart it"):
        slow.generate(request([[5]]))


def test_nccl_both_sides_join_at_once_and_tensors_arrive(start, tiny_model_factory, monkeypatch):
    """The order of calls of the path over NCCL, with a queue in the place of NCCL: there is no GPU here."""
    import queue

    from outspoken.trainers.rollouts import vllm_engine

    wire, joined = queue.Queue(), []

    class Group:
        def __init__(self, rank):
            self.rank = rank

        def broadcast(self, tensor, src):
            wire.put(tensor.clone()) if self.rank == src else tensor.copy_(wire.get(timeout=5))

    both = threading.Barrier(2, timeout=5)

    def meet(host, port, rank, world_size, device):
        both.wait()  # as NCCL does
        joined.append((rank, world_size, port))
        return Group(rank)

    monkeypatch.setattr(vllm_engine, "nccl_communicator", meet)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"synchronize": lambda self: None})())
    client = VLLMClient(base_url=start().url, group_port=5555)
    client.init_communicator("cpu")
    assert sorted(joined) == [(0, 2, 5555), (1, 2, 5555)]

    model, checksum = tiny_model_factory(seed=3), Checksum()
    client.start_update("n-1")
    for name, parameter in model.named_parameters():
        checksum.add(name, parameter)
        client.send(name, parameter.detach())
    assert client.finish_update()["checksum"] == checksum.hex
    assert not client.drop_dead_communicator()
    client.info = {**client.info, "epoch": "another"}
    assert client.drop_dead_communicator() and client.communicator is None


@pytest.fixture
def command(tiny_model_dir):
    """`command(port, **environment)`: `outspoken vllm-serve` in a process of its own."""
    processes = []

    def run(port, *options, **environment):
        options = ("--dtype", "float32", *options)
        code = "import sys; from outspoken.cli.main import main; sys.exit(main())"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "vllm-serve", "--model", tiny_model_dir, "--port", str(port), *options],
                env={**os.environ, "PYTHONPATH": str(FAKE), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(command):
    port = free_port()
    server = command(port, "--max-model-len", "32", "--kv_cache_dtype=fp8")
    client = VLLMClient(host="127.0.0.1", server_port=port, connection_timeout=60)
    assert client.info["max_model_len"] == 32 and client.info["dtype"] == "float32"
    assert client.info["exact_logps"] is True
    assert len(client.generate(request([[5]]))["completion_ids"][0]) == 4
    server.send_signal(signal.SIGTERM)
    out, _ = server.communicate(timeout=20)
    assert server.returncode == 0 and f"Serving at http://127.0.0.1:{port}" in out


@pytest.mark.slow
def test_the_commands_errors_are_one_sentence(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = command(port)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 2 and f"Cannot listen on 127.0.0.1:{port}" in err and "Traceback" not in err
    server = command(0, "--swap_spaces", "3")
    _, err = server.communicate(timeout=60)
    assert server.returncode == 2 and "vLLM's engine has no setting swap_spaces; leave it out." in err
    server = command(0, PYTHONPATH="")
    _, err = server.communicate(timeout=60)
    assert server.returncode == 2
    assert "`outspoken vllm-serve` needs vLLM, which is not installed here; install it with `pip install vllm`." in err


def test_options_beyond_ours_become_settings_of_the_engine():
    from outspoken.cli.common import CommandError
    from outspoken.cli.vllm_serve import _further

    assert _further(["--kv-cache-memory-bytes", "1000", "--load_format=dummy", "--enable_lora", "--x", "0.5"]) == {
        "kv_cache_memory_bytes": 1000,
        "load_format": "dummy",
        "enable_lora": True,
        "x": 0.5,
    }
    with pytest.raises(CommandError, match="'oops' is no option"):
        _further(["oops"])
