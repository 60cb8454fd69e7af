"""Runs the HTTP server: a listening socket, the loaded model, and uvicorn until a signal comes."""

import asyncio
import functools
import signal
import socket

import uvicorn

from keras_cifar.core.errors import StoppedError, UserError, reason
from keras_cifar.serving.app import App
from keras_cifar.serving.batching import Batcher
from keras_cifar.serving.protocol import Protocol
from keras_cifar.serving.servable import Versions
from keras_cifar.serving.service import Service

# Seconds that requests in flight have after the signal to stop: below the 30 s that Kubernetes and
# more than the 10 s that Docker waits before it kills.
GRACE = 25


def run(
    model: str,
    name: str,
    host: str,
    port: int,
    *,
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
    with _listen(host, port) as listener:
        versions, batcher = Versions(model, max_batch_size), Batcher(max_batch_size, batch_wait)
        service = Service(name, versions, batcher, int(max_request_mb * 2**20), timeout)
        asyncio.run(_serve(service, listener, poll))
    raise UserError("the server ended by itself")


async def _serve(service: Service, listener: socket.socket, poll: float) -> None:
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
    async with service.running(poll):
        listener.listen(config.backlog)  # Whoever reads the printed address can connect at once.
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        current = service.versions.current
        print(f"serving   {current.path} (version {current.version})")
        print(f"address   {address}/v1/models/{service.name}")
        print(f"try it    {address}", flush=True)
        # uvicorn takes over the signals, answers what is in flight, and raises them again then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        await _Server(config, service).serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Says that it is not ready as soon as it shuts down."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: object) -> None:
        self._service.stopping = True
        super().handle_exit(sig, frame)


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
