"""What HTTP and gRPC share: the model, its batches, limits, errors and readiness."""

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncIterator, Iterator

import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import one_line, reason
from keras_cifar.serving.batching import Batcher, BatcherStoppedError
from keras_cifar.serving.metrics import Metrics
from keras_cifar.serving.rest import RequestError
from keras_cifar.serving.servable import Servable, Versions

MAX_REQUESTS = 256  # in flight; each may hold a body of the largest size


class Service:
    """A model that is served.

    Attributes:
        name: the model's, in the addresses.
        versions, batcher, metrics: of the model.
        max_request, timeout: bytes of a request, and seconds for it to arrive.
        stopping: whether the server is shutting down.
    """

    def __init__(
        self, name: str, versions: Versions, batcher: Batcher, max_request: int, timeout: float
    ):
        self.name, self.versions, self.batcher = name, versions, batcher
        self.max_request, self.timeout = max_request, timeout
        self.metrics = Metrics(versions, batcher)
        self.stopping = False
        self._open = 0

    @property
    def ready(self) -> bool:
        """Whether a new request would be answered; a model is loaded for as long as this exists."""
        return not (self.stopping or self.batcher.stopped)

    @contextlib.asynccontextmanager
    async def running(self, poll: float) -> AsyncIterator[None]:
        """Computes batches and looks for new versions every `poll` seconds, until the end."""
        works = (self.batcher.work(), self._poll_versions(poll))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll_versions(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                news = await asyncio.to_thread(self.versions.refresh)
            except Exception as error:  # A missing disk or full memory may be temporary.
                news = f"looking for a new version failed: {reason(error)}"
            if news:
                print(one_line(news), file=sys.stderr, flush=True)
            if self.versions.replaced:
                # TensorFlow's functions are in cycles; this frees an old version's memory in 0.04 s.
                # Python's lock is held for up to 0.02 s at once, 0.06 if clients take the cores.
                await self.batcher.between(gc.collect)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of MAX_REQUESTS places for a request; raises RequestError if none is free."""
        if self._open >= MAX_REQUESTS:
            raise RequestError("too many requests; try again", 503)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def check_name(self, name: str) -> None:
        """Raises RequestError for the name of a model that is not served."""
        if name != self.name:
            raise RequestError(f"there is no model {name!r}; {self.name!r} is served", 404)

    async def predict(
        self, servable: Servable, signature: str, inputs: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The outputs of a signature, {name: [N, ...]}, computed in a batch.

        Raises RequestError if the model rejects the inputs or no batches are computed.
        """
        try:
            outputs = await self.batcher.submit(servable.run[signature], inputs)
        except tf.errors.InvalidArgumentError as error:
            raise RequestError(f"the model rejected the input: {reason(error)}") from None
        except BatcherStoppedError as error:
            raise RequestError(f"{error}; the server must be restarted", 503) from None
        index = outputs.get("label_index")
        if index is not None and (index < 0).all():  # the mark of files that are no images
            raise RequestError("no image in the request can be decoded")
        return outputs
