"""Several engines behind one address, as a Ray Serve application: `pagoda serve MODEL --replicas N`.

Door (HTTP) -> PrefixRouter (chooses) -> Replica: a whole engine and the same application that serves one engine. Only
plain data travels between them.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pagoda.config import EngineConfig, ServeConfig
from pagoda.engine.client import EngineClient, spawn_engine
from pagoda.engine.ray_ranks import connect_ray
from pagoda.errors import BodyTooLargeError, ConfigError, EngineDeadError
from pagoda.log import get_logger
from pagoda.models.find import resolve_model
from pagoda.serve.all_replicas import added_up, concerns_all, one_page
from pagoda.serve.app import make_app
from pagoda.serve.backend import Backend
from pagoda.serve.error_map import error_body, error_response
from pagoda.serve.exposition import METRICS_TYPE
from pagoda.serve.logs import setup_json_logging
from pagoda.serve.routing import Keys, Routing, fields_of, keys_of
from pagoda.serve.supervisor import Stopped

ATTEMPTS = 3
APPLICATION = "pagoda"
MAX_ONGOING = 100_000
"""Ray never holds requests back: it would without a bound and without a word. A replica that is full refuses."""

log = get_logger(__name__)


class PrefixRouter(RequestRouter):
    """Ray's choice of a replica, by `Routing`. Requests carry `keys`, and in `tried` the replicas that had them: these
    come last, and for `each` not at all while there are others."""

    def initialize_state(self, **_: Any) -> None:
        self._routing = Routing()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = {} if pending_request is None else pending_request.kwargs
        by_name = {r.replica_id.unique_id: r for r in candidate_replicas}
        load = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in by_name.items()}
        order = self._routing.ranked(Keys(*wanted.get("keys", (None, ()))), load)
        tried = wanted.get("tried", ())
        order.sort(key=lambda name: name in tried)
        if wanted.get("each"):
            order = [name for name in order if name not in tried] or order
        return [[by_name[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        self._routing.learn(Keys(*pending_request.kwargs.get("keys", (None, ()))), replica_id.unique_id)


class Replica:
    """One engine (a process of its own) and its application."""

    def __init__(self, model: str, engine: dict[str, Any], config: dict[str, Any], chat_template: str | None):
        serve_config = ServeConfig.from_mapping(config)
        setup_json_logging(serve_config.log_level)
        self._transport = spawn_engine(model, EngineConfig.from_mapping(engine), for_grammars=True)
        self._client = EngineClient(self._transport)
        self._backend = Backend(model, serve_config, chat_template)
        self._backend.connect(self._transport.address)
        self._app = make_app(self._backend, serve_config)
        self._running: set[asyncio.Task[None]] = set()

    def check_health(self) -> None:
        """Ray replaces a replica whose engine is dead, does not answer, or cannot be reached by the application."""
        if (why := self._backend.pipe.engine.dead) is not None:
            raise why
        self._client.call("ping", timeout=20.0)

    async def answer(
        self, request: dict[str, Any], body: bytes, tried: Sequence[str] = (), each: bool = False, **_: Any
    ) -> AsyncIterator[bytes]:
        """The application's answer: first status, headers and our name as JSON, then the body in pieces. What is for
        `each` is done once."""
        me = serve.get_replica_context().replica_id.unique_id
        if each and me in tried:
            yield json.dumps({"status": 204, "headers": [], "replica": me}).encode()
            return
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone, pending = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if pending:
                return pending.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": request["method"], "path": request["path"], "raw_path": request["path"].encode(),
            "query_string": request["query"].encode(), "client": tuple(request["client"]), "server": None,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request["headers"]],
        }  # fmt: skip
        task = asyncio.create_task(self._app(scope, receive, messages.put))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in message["headers"]]
                    yield json.dumps({"status": message["status"], "headers": headers, "replica": me}).encode()
                elif message.get("body"):
                    yield message["body"]
        finally:
            gone.set()  # where the client left before the end, the application aborts the request

    def __del__(self) -> None:
        if getattr(self, "_client", None) is not None:
            self._client.close()


class Door:
    """The address. Hands each request to a replica of the model that it names; one whose replica is lost, or refuses
    for lack of room, goes to another as long as nothing was sent."""

    def __init__(self, models: dict[str, Any], max_body_bytes: int):
        self._models, self._max_body_bytes = models, max_body_bytes

    async def __call__(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body_bytes:
                return error_response(BodyTooLargeError(f"The body is larger than {self._max_body_bytes} bytes."))
        facts = {
            "method": request.method, "path": request.url.path, "query": request.url.query,
            "headers": request.headers.items(), "client": list(request.client or ("", 0)),
        }  # fmt: skip
        if concerns_all(request.method, request.url.path):
            return await self._ask_all(facts, body)
        if request.url.path == "/v1/models" and len(self._models) > 1:
            return await self._list(facts)
        fields = fields_of(body)
        name = fields.get("model")
        handle = self._models.get(name) if isinstance(name, str) else None
        handle = handle or next(iter(self._models.values()))  # which says what it has
        return await self._ask(handle, facts, body, list(keys_of(request.url.path, fields)))

    async def _ask(self, handle: Any, facts: dict[str, Any], body: bytes, keys: list[Any]) -> Response:
        tried: list[str] = []
        for attempt in range(1, ATTEMPTS + 1):
            stream = handle.options(stream=True).answer.remote(facts, body, keys=keys, tried=tried)
            try:
                head = json.loads(await anext(stream))
                first = await anext(stream, b"")
            except RayError as error:
                log.warning("a replica was lost: %s", type(error).__name__)
                continue
            if head["status"] == 503 and attempt < ATTEMPTS and facts["path"] not in ("/health", "/ready"):
                tried.append(head["replica"])
                continue
            response = StreamingResponse(self._rest(first, stream, head), head["status"])
            headers = [(n, v) for n, v in head["headers"] if n != "x-request-id"]  # Ray's own proxy writes it, too
            response.raw_headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in headers]
            return response
        return error_response(EngineDeadError("No replica could answer: try again in a moment."), facts["path"])

    async def _rest(self, first: bytes, stream: Any, head: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            yield first
            async for piece in stream:
                yield piece
        except RayError:
            error = json.dumps(error_body(EngineDeadError("The replica that answered was lost.")))
            events = "text/event-stream" in dict(head["headers"]).get("content-type", "")
            yield (f"data: {error}\n\n" if events else error + "\n").encode()
        finally:
            stream.cancel()

    async def _ask_all(self, facts: dict[str, Any], body: bytes) -> Response:
        """What every replica of every model says, as one answer; the first refusal, unless one has what is deleted."""
        answers = [a for handle in self._models.values() for a in await self._ask_each(handle, facts, body)]
        good = {name: text for name, status, text in answers if status == 200}
        bad = [(status, text) for _, status, text in answers if status != 200]
        if not answers:
            return error_response(EngineDeadError("No replica could answer: try again in a moment."), facts["path"])
        if bad and not (good and facts["method"] == "DELETE"):
            return Response(bad[0][1], bad[0][0], media_type="application/json")
        if facts["path"] == "/metrics":
            return Response(one_page(good), media_type=METRICS_TYPE)
        if facts["method"] == "DELETE":
            return Response(next(iter(good.values())), media_type="application/json")
        return Response(json.dumps(added_up([json.loads(t) for t in good.values()])), media_type="application/json")

    async def _ask_each(self, handle: Any, facts: dict[str, Any], body: bytes) -> list[tuple[str, int, str]]:
        """(name, status, body) of each replica."""
        answers: list[tuple[str, int, str]] = []
        lost = 0
        while lost < ATTEMPTS:
            tried = [name for name, _, _ in answers]
            stream = handle.options(stream=True).answer.remote(facts, body, keys=[None, []], tried=tried, each=True)
            try:
                head = json.loads(await anext(stream))
                if head["replica"] in tried:
                    break
                text = b"".join([piece async for piece in stream]).decode()
            except RayError as error:
                log.warning("a replica was lost: %s", type(error).__name__)
                lost += 1
                continue
            answers.append((head["replica"], head["status"], text))
        return answers

    async def _list(self, facts: dict[str, Any]) -> Response:
        found = []
        for handle in self._models.values():
            response = await self._ask(handle, facts, b"", [None, []])
            text = b"".join([piece async for piece in response.body_iterator])  # type: ignore[attr-defined]
            if response.status_code != 200:
                return Response(text, response.status_code, media_type="application/json")
            found += json.loads(text)["data"]
        return Response(json.dumps({"object": "list", "data": found}), media_type="application/json")


def application(
    models: dict[str, str], engine: EngineConfig, config: ServeConfig, chat_template: str | None, num_gpus: int
) -> serve.Application:
    """The Ray Serve application of name -> model. `num_gpus`: of one replica."""
    most = max(config.replicas, config.max_replicas or 0)
    if config.session_dir and (most > 1 or len(models) > 1):
        raise ConfigError("Sessions can be saved by a single engine only: leave out session_dir, or serve one replica.")
    handles = {}
    for number, (name, model) in enumerate(models.items()):
        scale: dict[str, Any] = {"num_replicas": config.replicas}
        if most > config.replicas:
            busy = max(1, engine.max_batch_size * 3 // 4)
            limits = {"min_replicas": config.replicas, "max_replicas": most, "target_ongoing_requests": busy}
            scale = {"autoscaling_config": AutoscalingConfig(**limits)}
        deployment = serve.deployment(
            Replica,
            name=f"replica-{number}",
            ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
            max_ongoing_requests=MAX_ONGOING,
            request_router_config=RequestRouterConfig(request_router_class="pagoda.serve.replicas.PrefixRouter"),
            health_check_period_s=2.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=config.drain_seconds,
            **scale,
        )
        own = asdict(replace(config, model_name=name))
        handles[name] = deployment.bind(model, dict(vars(engine)), own, chat_template)
    door = serve.deployment(
        Door, name="door", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )  # fmt: skip
    return door.bind(handles, config.max_body_bytes)


def from_config(values: dict[str, Any]) -> serve.Application:
    """For `serve deploy` and KubeRay: `models` (name -> model), `engine` and `serve` (fields of EngineConfig and
    ServeConfig), `num_gpus` of one replica."""
    engine, config = (values.get(kind) or {} for kind in ("engine", "serve"))
    serve_config = ServeConfig.from_mapping({"replicas": 1, **config})
    made = EngineConfig.from_mapping(engine)
    return application(values["models"], made, serve_config, values.get("chat_template"), values.get("num_gpus", 0))


def run_replicas(model: str, engine: EngineConfig, config: ServeConfig, chat_template: str | None) -> int:
    """Serve until SIGTERM or SIGINT; open requests then get `drain_seconds`."""
    if config.ssl_certfile or config.ssl_keyfile:
        raise ConfigError("TLS with --replicas is the business of the proxy in front: leave out ssl_certfile.")
    models = {}
    for path in (model, *(config.more_models or ())):
        resolve_model(path)
        name = config.model_name if config.model_name and not models else Path(path.rstrip("/")).name
        if name in models:
            raise ConfigError(f"Two models are called {name}: give the first another --model-name.")
        models[name] = path
    ray = connect_ray()
    have = ray.cluster_resources()
    own_gpus = engine.tp if have.get("GPU") and engine.device != "cpu" and engine.executor == "local" else 0
    copies = config.replicas * len(models)
    for kind, each in (("CPU", 1), ("GPU", own_gpus)):
        if copies * each > have.get(kind, 0):
            raise ConfigError(
                f"{copies} replicas need {copies * each} {kind}s, this Ray cluster has {have.get(kind, 0):g}: "
                "lower --replicas or add machines."
            )
    http = HTTPOptions(host=config.server_name, port=config.server_port, request_timeout_s=config.request_seconds)
    serve.start(http_options=http)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    names = ", ".join(models)
    try:
        serve.run(application(models, engine, config, chat_template, own_gpus), name=APPLICATION, route_prefix="/")
        print(
            f"serving {names} by {config.replicas} replicas at http://{config.server_name}:{config.server_port}",
            flush=True,
        )
        while True:
            signal.pause()
    except Stopped:
        return 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        serve.shutdown()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
