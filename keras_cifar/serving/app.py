"""The ASGI application: routes, bodies, errors as JSON."""

import asyncio
import contextlib
import json
import pathlib
import re
import time
import traceback
from collections.abc import Awaitable

from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from keras_cifar.core.errors import one_line
from keras_cifar.serving import rest
from keras_cifar.serving.metrics import CONTENT_TYPE
from keras_cifar.serving.parsing import Parser
from keras_cifar.serving.service import Service

PAGE = pathlib.Path(__file__).parent / "page.html"

SMALL_RESPONSE = 10_000  # numbers and strings, which take a few milliseconds to write
DISCARD_SECONDS = 2  # for which the rest of the body of a refused request is received

# Content-Security-Policy of the page: it loads from and sends to this server alone.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

# /NAME[/versions/N][:VERB|/metadata]
_MODEL = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d{1,18}))?(?:(:[a-z]+)|(/metadata))?")


class App:
    """Answers a service's requests over HTTP; `asgi` is the application for an ASGI server."""

    def __init__(self, service: Service):
        self._service, self._parser = service, Parser()
        methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        self.asgi = Starlette(
            routes=[
                Route("/", self._page),
                Route("/metrics", self._metrics),
                # KServe's addresses for probes.
                Route("/v2/health/live", self._live),
                Route("/v2/health/ready", self._ready),
                Route("/v1/models/{rest:path}", self._answer, methods=methods),
            ],
            exception_handlers={HTTPException: self._not_found},
        )

    async def _page(self, request: Request) -> Response:
        page = PAGE.read_text("utf-8").replace("{{name}}", self._service.name)
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def _answer(self, request: Request) -> Response:
        """Answers what is below /v1/models/; all errors are JSON as TensorFlow Serving writes it."""
        start, kind = time.perf_counter(), "other"
        try:
            with self._service.place():
                kind, coroutine = self._route(request)
                response = await coroutine
        except rest.RequestError as error:
            response = await self._refuse(request, str(error), error.status)
        except ClientDisconnect:
            response = _error("the client disconnected", 400)  # only the metrics use it
        except Exception:
            traceback.print_exc()
            response = _error("internal error; the server's log has the details", 500)
        self._service.metrics.count(kind, response.status_code, time.perf_counter() - start)
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
        self._service.check_name(name)
        return kind, handler(request, int(version) if version else None)

    async def _status(self, request: Request, version: int | None) -> Response:
        return _json(self._service.versions.status(version))

    async def _metadata(self, request: Request, version: int | None) -> Response:
        servable = self._service.versions.get(version)
        model = {"name": self._service.name, "signature_name": "", "version": str(servable.version)}
        signatures = json_format.MessageToDict(
            servable.signature_defs,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        # `class_names` is our addition: TensorFlow Serving tells no client the names of all classes.
        metadata = {"signature_def": signatures, "class_names": servable.class_names}
        return _json({"model_spec": model, "metadata": metadata})

    async def _predict(self, request: Request, version: int | None) -> Response:
        servable = self._service.versions.get(version)  # before the body, which may arrive slowly
        call, inputs = await self._parser.decode(await self._body(request), servable.inputs)
        outputs = await self._service.predict(servable, call.signature, inputs)
        if sum(values.size for values in outputs.values()) > SMALL_RESPONSE:
            text = await asyncio.to_thread(rest.response, call, outputs)
        else:
            text = rest.response(call, outputs)
        return Response(text, media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "")
        too_large = length.isdecimal() and int(length) > self._service.max_request
        body, stream = bytearray(), request.stream()
        try:
            async with asyncio.timeout(self._service.timeout):
                while not too_large and (chunk := await anext(stream, None)) is not None:
                    body += chunk
                    too_large = len(body) > self._service.max_request
        except TimeoutError:
            message = f"the request took more than {self._service.timeout:g} s to arrive"
            raise rest.RequestError(message, 408) from None
        if too_large:
            raise rest.RequestError(
                f"the request has more than {self._service.max_request:,} bytes", 413
            )
        request.state.is_received = True
        return bytes(body)

    async def _refuse(self, request: Request, message: str, status: int) -> Response:
        """An error, for which the rest of the body is received first.

        A client that is cut off while it sends may never see the response.
        """
        response = _error(message, status)
        if status == 408 or not await self._discard(request):
            response.headers["Connection"] = "close"
        return response

    async def _discard(self, request: Request) -> bool:
        """Receives the rest of a body, up to the largest size; whether that was all of it."""
        if getattr(request.state, "is_received", False):
            return True
        left = self._service.max_request
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(DISCARD_SECONDS):
                async for chunk in request.stream():
                    left -= len(chunk)
                    if left < 0:
                        return False
                return True
        return False

    async def _not_found(self, request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return await self._refuse(request, message, error.status_code)


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _error(message: str, status: int) -> Response:
    return _json({"error": one_line(message)}, status)
