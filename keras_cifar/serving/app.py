"""The ASGI application: routes, limits, errors as JSON, metrics for Prometheus."""

import asyncio
import contextlib
import json
import pathlib
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable

import prometheus_client as prometheus
import tensorflow as tf
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from keras_cifar.core.errors import one_line, reason
from keras_cifar.serving import rest
from keras_cifar.serving.batching import Batcher
from keras_cifar.serving.servable import Versions

PAGE = pathlib.Path(__file__).parent / "page.html"

MAX_REQUESTS = 256  # in flight; each may hold a body of the largest size
DISCARD_SECONDS = 2  # for which the rest of a body that is too large is received

# Content-Security-Policy of the page: it loads from and sends to this server alone.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

# /NAME[/versions/N][:VERB|/metadata]
_MODEL = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d{1,18}))?(?:(:[a-z]+)|(/metadata))?")

# Bounds of the histograms: seconds of a request, rows of a batch.
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class App:
    """Answers requests for one model; `asgi` is the application for an ASGI server."""

    def __init__(
        self,
        name: str,
        versions: Versions,
        batcher: Batcher,
        *,
        max_request: int,
        timeout: float,
        poll: float,
    ):
        """Args:
        name: the model's, in the addresses.
        max_request, timeout: bytes of a body, and seconds for it to arrive.
        poll: seconds between looks for new versions.
        """
        self._name, self._versions, self._batcher = name, versions, batcher
        self._max_request, self._timeout, self._poll = max_request, timeout, poll
        self._open = 0
        self._metrics = Metrics(versions, batcher)
        methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        self.asgi = Starlette(
            routes=[
                Route("/", self._page),
                Route("/metrics", self._metrics.respond),
                # KServe's addresses for probes.
                Route("/v2/health/live", self._alive),
                Route("/v2/health/ready", self._alive),
                Route("/v1/models/{rest:path}", self._answer, methods=methods),
            ],
            exception_handlers={HTTPException: _not_found},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, asgi: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in (self._batcher.work, self._poll_versions)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _poll_versions(self) -> None:
        """Loads new versions until it is cancelled."""
        while True:
            await asyncio.sleep(self._poll)
            try:
                news = await asyncio.to_thread(self._versions.refresh)
            except Exception as error:  # A missing disk or full memory may be temporary.
                news = f"looking for a new version failed: {reason(error)}"
            if news:
                print(one_line(news), file=sys.stderr, flush=True)

    async def _page(self, request: Request) -> Response:
        page = PAGE.read_text("utf-8").replace("{{name}}", self._name)
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def _alive(self, request: Request) -> Response:
        return _json({"live": True, "ready": True})

    async def _answer(self, request: Request) -> Response:
        """Answers what is below /v1/models/; all errors are JSON as TensorFlow Serving writes it."""
        start, kind = time.perf_counter(), "other"
        self._open += 1
        try:
            if self._open > MAX_REQUESTS:
                raise rest.RequestError("too many requests; try again", 503)
            kind, coroutine = self._route(request)
            response = await coroutine
        except rest.RequestError as error:
            response = _error(str(error), error.status)
        except ClientDisconnect:
            response = _error("the client disconnected", 400)  # only the metrics use it
        except Exception:
            traceback.print_exc()
            response = _error("internal error; the server's log has the details", 500)
        finally:
            self._open -= 1
        self._metrics.count(kind, response.status_code, time.perf_counter() - start)
        return response

    def _route(self, request: Request) -> tuple[str, Awaitable[Response]]:
        """(the kind of a request, the coroutine that answers it)."""
        match = _MODEL.fullmatch(request.url.path)
        if not match or match[3] not in (None, ":predict"):
            raise rest.RequestError(f"malformed request: {request.method} {request.url.path}")
        name, version, verb, metadata = match.groups()
        kind, method, handler = "status", "GET", self._status
        if verb:
            kind, method, handler = "predict", "POST", self._predict
        elif metadata:
            kind, handler = "metadata", self._metadata
        if request.method != method:
            raise rest.RequestError(f"this address takes {method}, not {request.method}", 405)
        if name != self._name:
            raise rest.RequestError(f"there is no model {name!r}; {self._name!r} is served", 404)
        return kind, handler(request, int(version) if version else None)

    async def _status(self, request: Request, version: int | None) -> Response:
        return _json(self._versions.status(version))

    async def _metadata(self, request: Request, version: int | None) -> Response:
        servable = self._versions.get(version)
        model = {"name": self._name, "signature_name": "", "version": str(servable.version)}
        signatures = {"signature_def": servable.signature_def}
        # `class_names` is our addition: TensorFlow Serving tells no client the names of all classes.
        metadata = {"signature_def": signatures, "class_names": servable.class_names}
        return _json({"model_spec": model, "metadata": metadata})

    async def _predict(self, request: Request, version: int | None) -> Response:
        servable = self._versions.get(version)  # before the body, which may arrive slowly
        with self._batcher.expected():
            call = rest.parse(await self._body(request))
            run, inputs = servable.prepare(call)
        try:
            outputs = await self._batcher.submit(run, inputs)
        except tf.errors.InvalidArgumentError as error:
            raise rest.RequestError(f"the model rejected the input: {reason(error)}") from None
        index = outputs.get("label_index")
        if index is not None and (index < 0).all():  # the mark of files that are no images
            raise rest.RequestError("no image in the request can be decoded")
        return Response(rest.response(call, outputs), media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "")
        too_large = length.isdecimal() and int(length) > self._max_request
        body, stream = bytearray(), request.stream()
        try:
            async with asyncio.timeout(self._timeout):
                while not too_large and (chunk := await anext(stream, None)) is not None:
                    body += chunk
                    too_large = len(body) > self._max_request
        except TimeoutError:
            message = f"the request took more than {self._timeout:g} s to arrive"
            raise rest.RequestError(message, 408) from None
        if too_large:
            await self._discard(stream)
            raise rest.RequestError(f"the request has more than {self._max_request:,} bytes", 413)
        return bytes(body)

    async def _discard(self, stream: AsyncIterator[bytes]) -> None:
        """Receives the rest of a body: a client that is cut off may never see the response."""
        left = self._max_request
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while left > 0 and (chunk := await anext(stream, None)) is not None:
                    left -= len(chunk)


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _error(message: str, status: int) -> Response:
    response = _json({"error": one_line(message)}, status)
    if status in (408, 413):  # The rest of the body is not read.
        response.headers["Connection"] = "close"
    return response


async def _not_found(request: Request, error: HTTPException) -> Response:
    return _error(f"{error.detail}: {request.method} {request.url.path}", error.status_code)


class Metrics:
    """Counters and histograms for Prometheus."""

    def __init__(self, versions: Versions, batcher: Batcher):
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)
        common = {"registry": self._registry, "namespace": "keras_cifar"}
        self._requests = prometheus.Counter(
            "requests", "Requests answered.", ("kind", "code"), **common
        )
        self._seconds = prometheus.Histogram(
            "request_seconds", "Seconds per request.", ("kind",), **common, buckets=_SECONDS
        )
        rows = prometheus.Histogram("batch_rows", "Images per batch.", **common, buckets=_ROWS)
        batcher.observe = rows.observe
        waiting = prometheus.Gauge("waiting_rows", "Images waiting for a batch.", **common)
        waiting.set_function(lambda: batcher.waiting)
        version = prometheus.Gauge("model_version", "The version being served.", **common)
        version.set_function(lambda: versions.current.version)

    def count(self, kind: str, code: int, seconds: float) -> None:
        """Counts a request of a kind that was answered with a status code."""
        self._requests.labels(kind, code).inc()
        self._seconds.labels(kind).observe(seconds)

    async def respond(self, request: Request) -> Response:
        """All metrics, in Prometheus's text format."""
        text = prometheus.generate_latest(self._registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)
