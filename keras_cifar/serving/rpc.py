"""The gRPC server: TensorFlow Serving's services, and the standard health service."""

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable

import grpc
from google.protobuf import json_format, struct_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow_serving.apis.get_model_metadata_pb2 import (
    GetModelMetadataRequest,
    GetModelMetadataResponse,
)
from tensorflow_serving.apis.get_model_status_pb2 import (
    GetModelStatusRequest,
    GetModelStatusResponse,
)
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

from keras_cifar.core.errors import one_line
from keras_cifar.serving import rest, tensors
from keras_cifar.serving.rest import RequestError
from keras_cifar.serving.service import Service

PREDICTION, MODELS = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"

# The codes that TensorFlow Serving has where HTTP has these statuses.
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    412: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}

# They take tf.Examples and signatures of their own, which the exported models do not have.
_REFUSED = {
    PREDICTION: ("Classify", "Regress", "MultiInference"),
    MODELS: ("HandleReloadConfigRequest",),
}

IDLE = 300  # seconds until a connection without requests is closed; clients open another
TOLD = 0.1  # seconds for those who watch the health to be told that the server stops


class GrpcServer:
    """Answers a service's requests over gRPC, on the running event loop."""

    def __init__(self, service: Service, address: str):
        """Listens at `address`, HOST:PORT; raises RuntimeError if that is not possible."""
        self._service, self._health = service, _Health(service)
        options = {
            "grpc.max_receive_message_length": service.max_request,
            "grpc.server_handshake_timeout_ms": int(1000 * service.timeout),
            "grpc.max_connection_idle_ms": 1000 * IDLE,
            "grpc.so_reuseport": 0,  # else a second server could take the same port
        }
        self._server = grpc.aio.server(options=list(options.items()))
        answers = {
            PREDICTION: {"Predict": self._predict, "GetModelMetadata": self._metadata},
            MODELS: {"GetModelStatus": self._status},
        }
        for name, methods in answers.items():
            methods |= dict.fromkeys(_REFUSED[name], _refuse)
            handlers = {method: self._handler(method, f) for method, f in methods.items()}
            generic = grpc.method_handlers_generic_handler(name, handlers)
            self._server.add_generic_rpc_handlers((generic,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_insecure_port(address)

    async def start(self) -> None:
        """Starts to answer."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Answers what is in flight, for up to `grace` seconds, and takes no more."""
        stopping = asyncio.create_task(self._server.stop(grace))
        await self._health.stop()
        await stopping

    def _handler(self, method: str, answer: Callable) -> grpc.RpcMethodHandler:
        """Answers calls of a method by `await answer(message)`, whose message is yet to be received.

        To clients the methods are unary. Here they receive a stream, of one message: so a request can
        be refused before its message is received, and a message can be too slow.
        """

        async def handle(messages: object, context: grpc.aio.ServicerContext) -> bytes:
            start, code = time.perf_counter(), grpc.StatusCode.CANCELLED  # by the client
            try:
                with self._service.place(), contextlib.closing(self._received(context)) as message:
                    response = (await answer(message)).SerializeToString()
                code = grpc.StatusCode.OK
                return response
            except RequestError as error:
                code, text = _CODES[error.status], str(error)
            except Exception:
                traceback.print_exc()
                code, text = grpc.StatusCode.INTERNAL, "the server's log has the details"
            finally:
                seconds = time.perf_counter() - start
                self._service.metrics.count(f"grpc_{method}", code.name, seconds)
            await context.abort(code, one_line(text))

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _received(self, context: grpc.aio.ServicerContext) -> bytes:
        try:
            async with asyncio.timeout(self._service.timeout):
                message = await context.read()
        except TimeoutError:
            seconds = f"{self._service.timeout:g} s"
            raise RequestError(f"the request took more than {seconds} to arrive", 408) from None
        if message is grpc.aio.EOF:
            raise RequestError("the request has no message")
        return message

    def _version(self, spec: ModelSpec) -> int | None:
        """The version that a request wants, None for the one that is served."""
        if not spec.name:
            raise RequestError("the request names no model")
        self._service.check_name(spec.name)
        if spec.HasField("version_label"):
            raise RequestError(f"there is no version label {spec.version_label!r}")
        return spec.version.value if spec.HasField("version") else None

    async def _predict(self, message: Awaitable[bytes]) -> PredictResponse:
        request = _parsed(PredictRequest, await message)
        servable = self._service.versions.get(self._version(request.model_spec))
        signature = request.model_spec.signature_name or rest.DEFAULT_SIGNATURE
        expected = rest.input_of(servable.inputs, signature, 412)
        if request.inputs.keys() != {expected.name}:
            found = ", ".join(map(repr, sorted(request.inputs))) or "none"
            raise RequestError(f"the input must be {expected.name!r} alone; it is {found}")
        inputs = await _array(request.inputs[expected.name], expected)
        outputs = await self._service.predict(servable, signature, inputs)
        wanted = list(request.output_filter) or list(outputs)
        if missing := set(wanted) - outputs.keys():
            names = ", ".join(sorted(outputs))
            raise RequestError(f"there is no output {min(missing)!r}; the signature has: {names}")
        response = PredictResponse(outputs={name: tensors.proto(outputs[name]) for name in wanted})
        response.model_spec.name, response.model_spec.signature_name = self._service.name, signature
        response.model_spec.version.value = servable.version
        return response

    async def _metadata(self, message: Awaitable[bytes]) -> GetModelMetadataResponse:
        request = _parsed(GetModelMetadataRequest, await message)
        servable = self._service.versions.get(self._version(request.model_spec))
        if set(request.metadata_field) != {"signature_def"}:
            raise RequestError("metadata_field must be signature_def")
        response = GetModelMetadataResponse()
        response.model_spec.name = self._service.name
        response.model_spec.version.value = servable.version
        response.metadata["signature_def"].Pack(servable.signature_defs)
        names = struct_pb2.ListValue()
        names.extend(servable.class_names)
        response.metadata["class_names"].Pack(names)  # our addition, as over HTTP
        return response

    async def _status(self, message: Awaitable[bytes]) -> GetModelStatusResponse:
        request = _parsed(GetModelStatusRequest, await message)
        status = self._service.versions.status(self._version(request.model_spec))
        return json_format.ParseDict(status, GetModelStatusResponse())


async def _refuse(message: Awaitable[bytes]) -> None:
    raise RequestError("only Predict, GetModelMetadata and GetModelStatus are implemented", 501)


def _parsed(kind: type, message: bytes):
    try:
        return kind.FromString(message)
    except Exception:  # protobuf's DecodeError, and what a damaged text raises
        raise RequestError(f"the message is no {kind.DESCRIPTOR.name}") from None


async def _array(tensor, expected: rest.Input):
    if len(tensor.int_val) > tensors.BAND:
        return await asyncio.to_thread(tensors.array, tensor, expected)
    return tensors.array(tensor, expected)


class _Health(health.aio.HealthServicer):
    """Says whether the service is ready, as "" and as TensorFlow Serving's service."""

    def __init__(self, service: Service):
        super().__init__()
        self._service = service
        self._watches: set[asyncio.Task] = set()

    async def _update(self) -> None:
        kinds = health_pb2.HealthCheckResponse
        status = kinds.SERVING if self._service.ready else kinds.NOT_SERVING
        for name in ("", PREDICTION):
            await self.set(name, status)

    async def Check(self, request, context):  # noqa: N802  gRPC's name
        await self._update()
        return await super().Check(request, context)

    async def Watch(self, request, context):  # noqa: N802
        await self._update()
        watch = asyncio.create_task(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait([watch])
        finally:
            self._watches.discard(watch)
            watch.cancel()
        # A call whose own task is cancelled would get no status.
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")

    async def stop(self) -> None:
        """Tells those who watch, and ends their calls, which would never end."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(TOLD)
        for watch in self._watches:
            watch.cancel()
