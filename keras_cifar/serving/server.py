"""Runs the HTTP server: a listening socket, the loaded model, and uvicorn until a signal comes."""

import signal
import socket

import uvicorn

from keras_cifar.core.errors import StoppedError, UserError, reason
from keras_cifar.serving.app import App
from keras_cifar.serving.batching import Batcher
from keras_cifar.serving.servable import Versions

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
        max_request = int(max_request_mb * 2**20)
        app = App(name, versions, batcher, max_request=max_request, timeout=timeout, poll=poll)
        config = uvicorn.Config(
            app.asgi,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=GRACE,
        )
        listener.listen(config.backlog)  # Whoever reads the printed address can connect at once.
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"serving   {versions.current.path} (version {versions.current.version})")
        print(f"address   {address}/v1/models/{name}")
        print(f"try it    {address}", flush=True)
        # uvicorn takes over the signals, answers what is in flight, and raises them again then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        uvicorn.Server(config).run(sockets=[listener])
    raise UserError("the server ended by itself")


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
