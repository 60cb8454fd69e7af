"""Serves an exported model over HTTP, in TensorFlow Serving's REST format.

python -m keras_cifar.serve --model RUN_or_EXPORT

For machines without TensorFlow Serving. http://127.0.0.1:8501 shows a page to try it; new versions
of the model are served as they appear. It has no users and no encryption: for more than this
machine, put a proxy in front of it.
"""

import dataclasses
import math
import os
import re
import signal
import socket

from keras_cifar.core import cli
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import StoppedError, UserError, reason
from keras_cifar.core.options import check, option

# Seconds that requests in flight have after the signal to stop: below the 30 s that Kubernetes and
# more than the 10 s that Docker waits before it kills.
GRACE = 25


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The command's flags."""

    model: str = option("", "a run, an export or a version of it", "Model")
    # The name in TensorFlow Serving's own image.
    name: str = option("model", "its name in the addresses, /v1/models/NAME", "Model")
    poll: float = option(1.0, "seconds between looks for a new version", "Model")
    host: str = option("127.0.0.1", "the address to listen at; 0.0.0.0 is all", "Server")
    port: int = option(8501, "0 is any that is free", "Server")
    max_request_mb: float = option(32.0, "the largest request, in MiB", "Server")
    timeout: float = option(30.0, "seconds that a request may take to come", "Server")
    max_batch_size: int = option(BATCH_SIZE, "images computed together", "Batches")
    batch_wait: float = option(
        0.002,
        "seconds that a batch waits for requests that have begun to come; a single client never waits",
        "Batches",
    )

    def __post_init__(self):
        check(self.model, "--model=RUN_or_EXPORT is needed")
        named = re.fullmatch(r"[A-Za-z0-9_.-]+", self.name)
        check(named, f"--name={self.name} may have letters, digits and _.- alone")
        check(0 <= self.port < 2**16, f"--port={self.port} must be from 0 to 65535")
        check(self.max_batch_size > 0, f"--max_batch_size={self.max_batch_size} must be above 0")
        for name in ("poll", "max_request_mb", "timeout"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"--{name}={value} must be above 0")
        check(0 <= self.batch_wait < math.inf, f"--batch_wait={self.batch_wait} must be 0 or more")


def main(options: ServeOptions) -> None:
    """Runs the command until SIGTERM or SIGINT comes."""
    try:
        import uvicorn

        from keras_cifar.serving.app import App
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; the extra has it: pip install 'keras_cifar[serve]'"
        ) from None
    from keras_cifar.serving.batching import Batcher
    from keras_cifar.serving.servable import Versions

    with _listen(options.host, options.port) as listener:
        versions = Versions(options.model, options.max_batch_size)
        app = App(
            options.name,
            versions,
            Batcher(options.max_batch_size, options.batch_wait),
            largest_request=int(options.max_request_mb * 2**20),
            timeout=options.timeout,
            poll=options.poll,
        )
        config = uvicorn.Config(
            app.asgi,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=GRACE,
        )
        listener.listen(config.backlog)  # whoever reads what is printed can connect at once
        host, port = listener.getsockname()[:2]
        at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        current = versions.current
        print(f"serving   {current.path} (version {current.version})")
        print(f"address   {at}/v1/models/{options.name}")
        print(f"try it    {at}", flush=True)
        # uvicorn takes the signals, answers what is in flight, and gives them back then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stopped)
        uvicorn.Server(config).run(sockets=[listener])
    raise UserError("the server ended by itself")


def _listen(host: str, port: int) -> socket.socket:
    """A socket at that address, which accepts nothing yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Where TCP is named, asyncio has small packets sent at once; else an answer, which is sent in two
    # parts, waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Connections of a server that was here before may still be closing.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen at {host} port {port}: {reason(error)}") from None
    return listener


def _stopped(number: int, frame: object) -> None:
    raise StoppedError(
        number, f"stopped by {signal.Signals(number).name}; what was in flight was answered"
    )


if __name__ == "__main__":
    # As predict does it: importing Keras is of no use here.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    cli.run("serve", main, ServeOptions, __doc__)
