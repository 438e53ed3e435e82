"""The trainer's side of `outspoken vllm-serve`: JSON and safetensors over HTTP, nothing that is ever unpickled."""

import http.client
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from outspoken.trainers.rollouts.vllm_weights import Sums

logger = logging.getLogger(__name__)

SERVER = "outspoken vllm-serve"
CHUNK_BYTES = 128 << 20  # weights go in requests of about this size
_CONNECT_SECONDS = 5.0
_CONTROL_SECONDS = 60.0  # for what the server answers at once
_BUSY = (502, 503, 504)  # a proxy without its server, or a server that is starting


class ServerUnavailable(ConnectionError):
    """The server cannot be reached, or went away during a request. It may come back."""


class WeightsLost(Exception):
    """The server does not hold the weights that the request was made for: it was started anew, or another trainer's."""


class VLLMClient:
    """Talks to one `outspoken vllm-serve`.

    Args:
        base_url: like `http://host:8000`; None: made of `host` and `server_port`.
        group_port: port on this machine where the NCCL group of the weights meets.
        connection_timeout: how many seconds to wait for a server that is not there, at first and whenever it goes away.
        request_timeout: how many seconds a server that is there may take for one request.

    Raises:
        ConnectionError: no server in time.
        RuntimeError: something else answers at that address.
    """

    def __init__(
        self,
        base_url: str | None = None,
        host: str = "0.0.0.0",
        server_port: int = 8000,
        group_port: int = 51216,
        connection_timeout: float = 0.0,
        request_timeout: float = 3600.0,
    ):
        self.base_url = (base_url or f"http://{host}:{server_port}").rstrip("/")
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"vllm_server_base_url is {self.base_url!r}; it must be like http://host:8000.")
        self.host: str = address.hostname
        self.port: int = address.port or (443 if address.scheme == "https" else 80)
        self._prefix = address.path
        self._https = address.scheme == "https"
        self.group_port = group_port
        self.connection_timeout = connection_timeout
        self.request_timeout = request_timeout
        self.communicator: Any = None
        self._communicator_epoch: str | None = None
        self._pending: list[tuple[str, Tensor]] = []
        self._pending_bytes = 0
        self.info = self.check_server(connection_timeout)

    # HTTP

    def _request(
        self, method: str, path: str, body: Any = None, *, timeout: float = _CONTROL_SECONDS, raw: bytes | None = None
    ) -> dict[str, Any]:
        """One request; its answer.

        Raises:
            ServerUnavailable: no connection, a connection that broke, or a server that is busy starting.
            WeightsLost: the server says so.
            TimeoutError: no answer within `timeout` seconds.
            ValueError: the server refuses the request.
            RuntimeError: the server failed.
        """
        data = raw if raw is not None else b"" if body is None else _json(body)
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
            _keep_alive(connection.sock)
            connection.sock.settimeout(timeout)
            content = "application/octet-stream" if raw is not None else "application/json"
            connection.request(method, self._prefix + path, data, {"Content-Type": content, "Connection": "close"})
            response = connection.getresponse()
            status, text = response.status, response.read()
        except TimeoutError as error:
            if connection.sock is None:
                raise ServerUnavailable(f"no connection within {_CONNECT_SECONDS:g} seconds") from error
            raise TimeoutError(
                f"The vLLM server at {self.base_url} did not answer {path} within {timeout:g} seconds; restart it, its "
                "engine hangs."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnavailable(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if status in _BUSY:
            raise ServerUnavailable(f"status {status}")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RuntimeError(
                f"What answers at {self.base_url} is no `{SERVER}` ({path} gave status {status}); correct "
                "vllm_server_base_url, or vllm_server_host and vllm_server_port."
            )
        if status == 200:
            return answer
        sentence = str(answer.get("error", f"status {status}"))
        if status == 409:
            raise WeightsLost(sentence)
        if status == 404:
            raise RuntimeError(f"The vLLM server at {self.base_url} knows no {path}; start it with `{SERVER}`.")
        if 400 <= status < 500:
            raise ValueError(sentence)
        raise RuntimeError(f"The vLLM server at {self.base_url} failed: {sentence}")

    def check_server(self, total_timeout: float | None = None, retry_interval: float = 2.0) -> dict[str, Any]:
        """Wait for the server, at most `total_timeout` seconds (None: `connection_timeout`).

        Args:
            retry_interval: the longest pause between two tries; the first ones are shorter.

        Returns:
            What the server says of itself: `epoch` (another one whenever it is started), `weights`, `dtype`, `device`,
            `world_size`, `max_model_len`.

        Raises:
            ConnectionError: it did not come.
        """
        limit = self.connection_timeout if total_timeout is None else total_timeout
        deadline, pause, waiting = time.monotonic() + limit, 0.1, False
        while True:
            try:
                info = self._request("GET", "/health/", timeout=10.0)
            except (ServerUnavailable, TimeoutError) as error:
                if time.monotonic() + pause > deadline:
                    raise ConnectionError(
                        f"No vLLM server answered at {self.base_url} within vllm_server_timeout={limit:g} seconds "
                        f"({error}); start one with `{SERVER} --model … --port {self.port}`, or correct "
                        "vllm_server_base_url (or vllm_server_host and vllm_server_port)."
                    ) from error
                if not waiting:
                    logger.warning(
                        f"Waiting up to {limit:g} seconds for the vLLM server at {self.base_url} ({error})."
                    )
                    waiting = True
                time.sleep(pause)
                pause = min(2 * pause, retry_interval)
                continue
            if info.get("server") != SERVER:
                raise RuntimeError(
                    f"What answers at {self.base_url} is no `{SERVER}`; start one there, or correct vllm_server_base_url."
                )
            self.info = info
            return info

    def get_world_size(self) -> int:
        """How many workers vLLM spreads the model over."""
        return int(self._request("GET", "/get_world_size/")["world_size"])

    # Sampling

    def generate(self, request: Mapping[str, Any], weights: str | None = None) -> dict[str, Any]:
        """Sample completions; `request` and the answer are those of `VLLMEngine.generate`.

        Args:
            weights: the weights to sample with, as named in `start_update`; None: whatever the server holds.

        Raises:
            WeightsLost: the server holds other weights.
        """
        body = {**request, "weights": weights}
        if request.get("images"):
            body["images"] = [None if p is None else [_png(image) for image in p] for p in request["images"]]
        answer = self._request("POST", "/generate/", body, timeout=self.request_timeout)
        # JSON has no NaN and no infinity.
        answer["logps"] = [[math.nan if v is None else v for v in row] for row in answer["logps"]]
        return answer

    def reset_prefix_cache(self) -> None:
        self._request("POST", "/reset_prefix_cache/", {})

    # Weights

    def start_update(self, weights: str) -> None:
        """Before the first tensor; until `finish_update` the server samples nothing.

        Args:
            weights: a name for these weights, unique to this trainer and version.
        """
        self._pending, self._pending_bytes = [], 0
        self._request("POST", "/start_weight_update/", {"weights": weights}, timeout=self.request_timeout)

    def send(self, name: str, tensor: Tensor) -> None:
        """One tensor: over NCCL where there is a group, else in the body of a request together with others."""
        if self.communicator is not None:
            self.update_named_param(name, tensor)
            return
        self._pending.append((name, tensor))
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save

        if self._pending:
            # Tensors of one file may share no memory.
            body = save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in self._pending})
            self._pending, self._pending_bytes = [], 0
            self._request("POST", "/update_named_params/", raw=body, timeout=self.request_timeout)

    def finish_update(self) -> dict[str, Any]:
        """After the last tensor: what `VLLMEngine.finish_update` returns."""
        self._flush()
        return self._request("POST", "/finish_weight_update/", {}, timeout=self.request_timeout)

    def weight_sums(self, names: Sequence[str]) -> list[dict[str, Sums]]:
        answer = self._request("POST", "/weight_sums/", {"names": list(names)}, timeout=self.request_timeout)
        return [
            {name: Sums(*[math.nan if v is None else v for v in values]) for name, values in worker.items()}  # type: ignore[arg-type]
            for worker in answer["workers"]
        ]

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """Meet vLLM's workers in a NCCL group, over which weights then go. This process is its rank 0.

        Args:
            device: this process's GPU.
        """
        from outspoken.trainers.rollouts.vllm_engine import nccl_communicator

        self.close_communicator()
        world_size = self.get_world_size() + 1
        host = self._own_address()
        place = {"host": host, "port": self.group_port, "world_size": world_size}
        # The server answers when its workers have joined, so both sides must be under way at once.
        self.communicator = self._beside(
            lambda: self._request("POST", "/init_communicator/", place, timeout=self.request_timeout),
            lambda: nccl_communicator(host, self.group_port, 0, world_size, device),
        )
        self._communicator_epoch = self.info["epoch"]

    def update_named_param(self, name: str, weights: Tensor) -> None:
        """Broadcast one tensor to vLLM's workers."""
        spec = [name, str(weights.dtype).removeprefix("torch."), list(weights.shape)]
        self._beside(
            lambda: self._request("POST", "/update_named_param/", {"specs": [spec]}, timeout=self.request_timeout),
            lambda: self.communicator.broadcast(weights.contiguous(), src=0),
        )

    def close_communicator(self) -> None:
        self.communicator = None

    def drop_dead_communicator(self) -> bool:
        """Forget the NCCL group if the server that was in it is gone; whether it was."""
        gone = self.communicator is not None and self._communicator_epoch != self.info["epoch"]
        if gone:
            self.communicator = None
        return gone

    def _beside(self, request: Callable[[], Any], mine: Callable[[], Any]) -> Any:
        """A request in a thread and our part of the same collective; the result of our part."""
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            future = pool.submit(request)
            result = mine()
            future.result()
            return result
        finally:
            pool.shutdown(wait=False)  # if our part failed, the server waits for it in vain, and we not for the server

    def _own_address(self) -> str:
        """The address of this machine on the way to the server."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.host, self.port))  # sends nothing
            return probe.getsockname()[0]


def _json(body: Any) -> bytes:
    try:
        return json.dumps(body).encode()
    except TypeError as error:
        raise ValueError(
            f"generation_kwargs holds something that cannot be sent to the vLLM server ({error}); use numbers, strings, "
            "lists and dicts."
        ) from error


def _png(image: Any) -> str:
    import base64
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _keep_alive(sock: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone, also while it owes an answer for an hour."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
