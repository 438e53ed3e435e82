"""`outspoken vllm-serve`: vLLM's engine behind HTTP, for a trainer that pushes its weights into it.

What comes in is JSON or safetensors; nothing is unpickled and nothing executed. There is no authentication: whoever
reaches the port can sample and replace the weights, so it listens on 127.0.0.1 unless told otherwise.
"""

import base64
import io
import json
import logging
import math
import queue
import re
import secrets
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from outspoken.trainers.rollouts.vllm_client import SERVER

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 30
_TYPES = ("application/json", "application/octet-stream")
_IDLE_SECONDS = 600.0  # a connection that stays silent so long in the middle of a request is dropped


class Refused(Exception):
    """A request that is not carried out."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass
class Service:
    """The engine, what it holds, and the one thread that may touch it.

    Attributes:
        engine: a `VLLMEngine`.
        epoch: differs each time a server is started, so that a trainer notices a restart.
        weights: name of the weights that the engine holds; None: those it was started with, or half an update.
    """

    engine: Any
    about: Mapping[str, Any] = field(default_factory=dict)
    epoch: str = field(default_factory=lambda: secrets.token_hex(8))
    weights: str | None = None
    updating: str | None = None

    def __post_init__(self) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future] | None] = queue.Queue()

    def run(self) -> None:
        """Carry out jobs until `stop`: GPU contexts and thread pools belong to the thread that built the engine."""
        while (job := self._jobs.get()) is not None:
            work, future = job
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def stop(self) -> None:
        self._jobs.put(None)

    def _in_turn(self, work: Callable[[], Any]) -> Any:
        future: Future = Future()
        self._jobs.put((work, future))
        return future.result()

    # One method per endpoint: JSON in, JSON out.

    def health(self, _: Any) -> dict[str, Any]:
        return {"status": "ok", "server": SERVER, "epoch": self.epoch, "weights": self.weights, **self.about}

    def get_world_size(self, _: Any) -> dict[str, Any]:
        return {"world_size": self.engine.world_size}

    def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = _checked_request(body)

        def work() -> dict[str, Any]:
            wanted = body.get("weights")
            if wanted is not None and wanted != self.weights:
                raise Refused(409, f"The server holds the weights {self.weights!r}, not {wanted!r}.")
            if self.updating is not None:
                raise Refused(409, "The server holds half of an update of its weights.")
            return self.engine.generate(request)

        answer = self._in_turn(work)
        finite = [[v if math.isfinite(v) else None for v in row] for row in answer["logps"]]
        return {**answer, "logps": finite, "epoch": self.epoch, "exact_logps": self.engine.exact_logps}

    def start_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        def work() -> None:
            self.weights, self.updating = None, str(body["weights"])
            self.engine.start_update()

        self._in_turn(work)
        return {}

    def update_named_params(self, body: bytes) -> dict[str, Any]:
        def work() -> None:
            self._require_update()
            self.engine.receive(body)

        self._in_turn(work)
        return {}

    def update_named_param(self, body: Mapping[str, Any]) -> dict[str, Any]:
        def work() -> None:
            self._require_update()
            self.engine.receive_broadcast(body["specs"])

        self._in_turn(work)
        return {}

    def finish_weight_update(self, _: Any) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            self._require_update()
            answer = self.engine.finish_update()
            self.weights, self.updating = self.updating, None
            return answer

        return self._in_turn(work)

    def weight_sums(self, body: Mapping[str, Any]) -> dict[str, Any]:
        workers = self._in_turn(lambda: self.engine.weight_sums(body["names"]))
        strict = [
            {
                name: [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]
                for name, values in worker.items()
            }
            for worker in workers
        ]
        return {"workers": strict}

    def reset_prefix_cache(self, _: Any) -> dict[str, Any]:
        self._in_turn(self.engine.reset_prefix_cache)
        return {}

    def init_communicator(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self._in_turn(
            lambda: self.engine.init_communicator(str(body["host"]), int(body["port"]), int(body["world_size"]))
        )
        return {}

    def close_communicator(self, _: Any) -> dict[str, Any]:
        self._in_turn(self.engine.close_communicator)
        return {}

    def _require_update(self) -> None:
        if self.updating is None:
            raise Refused(409, "No update of the weights is under way; the server may have been started anew.")


GET = ("health", "get_world_size")
POST = (
    "generate",
    "start_weight_update",
    "update_named_params",
    "update_named_param",
    "finish_weight_update",
    "weight_sums",
    "reset_prefix_cache",
    "init_communicator",
    "close_communicator",
)


def _checked_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """What `VLLMEngine.generate` takes, from what came in."""

    def tokens(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in value
        )

    prompts = body.get("prompts")
    if not isinstance(prompts, list) or not all(p and tokens(p) for p in prompts):
        raise Refused(400, "`prompts` must be a list of lists of token ids, none of them empty.")
    request: dict[str, Any] = {"prompts": prompts, "sampling": body.get("sampling") or {}, "seed": body.get("seed")}
    for name in ("n", "max_tokens"):
        value = body.get(name)
        if not tokens(value) or len(value) != len(prompts):  # type: ignore[arg-type]
            raise Refused(400, f"`{name}` must be a list with one integer for each of the {len(prompts)} prompts.")
        request[name] = value
    if body.get("images"):
        request["images"] = [None if row is None else [_image(text) for text in row] for row in body["images"]]
    return request


def _image(text: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]).convert("RGB")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: "Server"

    def do_GET(self) -> None:
        self._answer(GET)

    def do_POST(self) -> None:
        self._answer(POST)

    def _answer(self, endpoints: tuple[str, ...]) -> None:
        name = self.path.strip("/")
        status, answer = 200, {}
        try:
            if name not in endpoints:
                raise Refused(404, f"There is no {self.command} /{name[:80]}/.")
            if self.command == "POST" and self.headers.get("Content-Type") not in _TYPES:
                # Also keeps web pages out: a browser asks before it sends these to another origin.
                self.close_connection = True
                raise Refused(415, f"Send {' or '.join(_TYPES)}.")
            size = self.headers.get("Content-Length", "0")
            if not re.fullmatch(r"\d{1,15}", size) or int(size) > MAX_BODY_BYTES:
                self.close_connection = True
                raise Refused(413, f"A body of {size[:40]} bytes is not taken.")
            body: Any = self.rfile.read(int(size))
            if name != "update_named_params":
                body = json.loads(body or b"{}")
                if not isinstance(body, dict):
                    raise Refused(400, "The body must be a JSON object.")
            answer = getattr(self.server.service, name)(body)
        except Refused as error:
            status, answer = error.status, {"error": str(error)}
        except KeyError as error:
            status, answer = 400, {"error": f"The body lacks {error}."}
        except (ValueError, TypeError) as error:
            status, answer = 400, {"error": " ".join(str(error).split())}
        except Exception as error:
            logger.exception("%s failed", name)
            status, answer = 500, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.address_string(), format % args)


class Server(ThreadingHTTPServer):
    """Listens in threads of its own, so that `/health/` answers while the engine samples."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], service: Service):
        # The port is taken at once; connections are, only when there is an engine to answer them.
        super().__init__(address, _Handler, bind_and_activate=False)
        self.service = service
        try:
            self.server_bind()
        except BaseException:
            self.server_close()
            raise


def serve(server: Server, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve in this thread, which built the engine, until the service is stopped or Ctrl-C.

    Args:
        ready: is called with the address when requests are taken.
    """
    server.server_activate()
    listener = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    listener.start()
    host, port = server.server_address[:2]
    ready(f"http://{host!s}:{port}")
    try:
        server.service.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()


def start(engine_args: Mapping[str, Any], host: str, port: int, ready: Callable[[str], None] = lambda _: None) -> None:
    """Build vLLM's engine and serve it until interrupted; SIGTERM ends it too.

    Raises:
        ImportError: vLLM is not installed, or too old.
        ValueError: a setting that vLLM does not know, or an address that cannot be listened on.
    """
    from outspoken.trainers.rollouts.vllm_engine import VLLMEngine, require_vllm

    version = require_vllm(f"`{SERVER}`")
    service = Service(None)
    try:
        # Before the model is loaded: a taken port is told at once.
        server = Server((host, port), service)
    except OSError as error:
        raise ValueError(f"Cannot listen on {host}:{port} ({error}); choose another --host or --port.") from error
    signal.signal(signal.SIGTERM, lambda *_: service.stop())
    with server:
        engine = VLLMEngine(**engine_args)
        service.engine = engine
        service.about = {
            "model": str(engine_args["model"]),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "device": engine.device,
            "world_size": engine.world_size,
            "max_model_len": engine.max_model_len,
            "exact_logps": engine.exact_logps,
            "vllm": version,
        }
        try:
            serve(server, ready)
        finally:
            engine.close()
