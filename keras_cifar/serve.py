"""Serves an exported model over HTTP and gRPC, as TensorFlow Serving does.

python -m keras_cifar.serve --model RUN_or_EXPORT

For machines without TensorFlow Serving. http://127.0.0.1:8501 shows a page to try it; new versions
of the model are served as they appear. It has no users and no encryption: for more than this
machine, put a proxy in front of it.
"""

import dataclasses
import os
import re

from keras_cifar.core import cli
from keras_cifar.core.config import BATCH_SIZE, PRECISIONS
from keras_cifar.core.errors import needing
from keras_cifar.core.options import NOT_NEGATIVE, POSITIVE, Options, check, option


@dataclasses.dataclass(frozen=True)
class ServeOptions(Options):
    """The command's flags."""

    model: str = option("", "a run, an export or its version", "Model")
    # The name in TensorFlow Serving's own image.
    name: str = option("model", "its name in the addresses, /v1/models/NAME", "Model")
    dtype_policy: str = option("float32", "auto: bfloat16 if faster", "Model", PRECISIONS)
    poll: float = option(1.0, "seconds between looks for a new version", "Model", limit=POSITIVE)
    host: str = option("127.0.0.1", "the address to listen at; 0.0.0.0 is all", "Server")
    port: int = option(8501, "0 is any that is free", "Server")
    grpc_port: int | None = option(None, "also serve gRPC there; 0 is any that is free", "Server")
    max_request_mb: float = option(32.0, "the largest request, in MiB", "Server", limit=POSITIVE)
    timeout: float = option(30.0, "seconds for a request to arrive", "Server", limit=POSITIVE)
    max_batch_size: int = option(BATCH_SIZE, "images computed together", "Batches", limit=POSITIVE)
    batch_wait: float = option(
        0.002,
        "seconds that a batch waits for the next request of a client; a single client never waits",
        "Batches",
        limit=NOT_NEGATIVE,
    )

    def __post_init__(self):
        super().__post_init__()
        check(self.model, "--model=RUN_or_EXPORT is needed")
        valid = re.fullmatch(r"[A-Za-z0-9_.-]+", self.name)
        check(valid, f"--name={self.name} may have only letters, digits and _.-")
        for name in ("port", "grpc_port"):
            number = getattr(self, name)
            valid = number is None or 0 <= number < 2**16
            check(valid, f"--{name}={number} must be from 0 to 65535")


def main(options: ServeOptions) -> None:
    """Runs the command until SIGTERM or SIGINT comes."""
    with needing("serve", "serve"):
        from keras_cifar.serving import server

        if options.grpc_port is not None:
            from keras_cifar.serving import rpc  # noqa: F401  only its packages are wanted here
    server.run(**dataclasses.asdict(options))


if __name__ == "__main__":
    # As predict does: importing Keras is not needed here.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    cli.run("serve", main, ServeOptions, __doc__)
