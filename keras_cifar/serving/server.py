"""Runs the servers: a listening socket, the loaded model, uvicorn and gRPC until a signal comes."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import signal
import socket

import uvicorn

from keras_cifar.core.environment import give_way
from keras_cifar.core.errors import StoppedError, UserError, reason
from keras_cifar.serving.app import App
from keras_cifar.serving.batching import Batcher
from keras_cifar.serving.protocol import Protocol
from keras_cifar.serving.servable import Versions, give_cores
from keras_cifar.serving.service import Service

# Seconds that requests in flight have after the signal to stop: below the 30 s that Kubernetes and
# more than the 10 s that Docker waits before it kills.
GRACE = 25

# A look through all objects stops every request: 0.02 to 0.07 s with a model loaded, and readiness was
# answered within 116 ms at most. Python did so every 6 s of a load; with this, which is a hundred times
# its default, that is rare, and readiness took 54 ms at most (both in two minutes of load).
FULL_COLLECTION = 1000


def run(
    model: str,
    name: str,
    host: str,
    port: int,
    grpc_port: int | None,
    *,
    dtype_policy: str,
    poll: float,
    max_request_mb: float,
    timeout: float,
    max_batch_size: int,
    batch_wait: float,
) -> None:
    """Serves a model; the arguments are the flags of `serve`.

    Raises:
        StoppedError: SIGTERM or SIGINT came; requests in flight were answered.
        UserError: the address is taken, or there is no valid model.
    """
    # What the imports made lives as long as the process. To look through it took 0.2 s at a time.
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(host, port))
        grpc = None if grpc_port is None else stack.enter_context(_listen(host, grpc_port))
        versions = _load(model, max_batch_size, dtype_policy)
        batcher = Batcher(max_batch_size, batch_wait)
        service = Service(name, versions, batcher, int(max_request_mb * 2**20), timeout)
        asyncio.run(_serve(service, listener, grpc, poll))
    raise UserError("the server ended by itself")


def _load(model: str, batch_size: int, dtype_policy: str) -> Versions:
    """Loads the model in a thread that has given way, as the threads do that TensorFlow then starts."""

    def load() -> Versions:
        return Versions(model, batch_size, dtype_policy, give_cores(model))

    with concurrent.futures.ThreadPoolExecutor(1, "load", give_way) as pool:
        return pool.submit(load).result()


async def _serve(
    service: Service, listener: socket.socket, grpc: socket.socket | None, poll: float
) -> None:
    config = uvicorn.Config(
        App(service).asgi,
        http=functools.partial(Protocol, head_timeout=service.timeout),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=GRACE,
    )
    server = _Server(config, service)
    async with service.running(poll):
        listener.listen(config.backlog)  # Whoever reads the printed address can connect at once.
        _announce(service, _address(listener), grpc and await server.start_grpc(grpc))
        # uvicorn takes over the signals, answers what is in flight, and raises them again then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        await server.serve(sockets=[listener])


def _announce(service: Service, http: str, grpc: str | None) -> None:
    current = service.versions.current
    print(f"serving   {current.path} (version {current.version})")
    print(f"address   http://{http}/v1/models/{service.name}")
    if grpc is not None:
        print(f"grpc      grpc://{grpc}/{service.name}")
    print("precision {} ({})".format(*current.precision))
    print(f"try it    http://{http}", flush=True)


class _Server(uvicorn.Server):
    """uvicorn, with readiness that ends at the signal, and perhaps with gRPC beside it."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._grpc = None

    async def start_grpc(self, reserved: socket.socket) -> str:
        """Starts the gRPC server where a socket is bound, and returns its address."""
        from keras_cifar.serving.rpc import GrpcServer  # only for those who want it

        address = _address(reserved)
        reserved.close()  # gRPC takes no socket, only an address.
        try:
            self._grpc = GrpcServer(self._service, address)
        except RuntimeError as error:
            raise UserError(f"cannot listen at {address}: {reason(error)}") from None
        await self._grpc.start()
        return address

    def handle_exit(self, sig: int, frame: object) -> None:
        self._service.stopping = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops both servers at the same time; a second signal ends the waiting."""
        if self._grpc is None:
            await super().shutdown(sockets)
            return
        stopping = asyncio.create_task(self._grpc.stop(GRACE))
        await super().shutdown(sockets)
        while not (stopping.done() or self.force_exit):
            await asyncio.wait([stopping], timeout=0.1)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Where TCP is named, asyncio sends small packets at once; else a response, which is sent in two
    # parts, waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Connections of an earlier server may still be closing.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen at {host} port {port}: {reason(error)}") from None
    return listener


def _stop(number: int, frame: object) -> None:
    raise StoppedError(
        number, f"stopped by {signal.Signals(number).name}; requests in flight were answered"
    )
