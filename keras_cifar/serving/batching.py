"""Computes requests that arrive together in one batch, in one thread: TensorFlow uses all cores."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np

# Rows for which a batch waits at most. On 2 cores larger ones are hardly faster (ResNet-32: 1.4 ms of a
# core an image, 1.3 in 128): 64 clients have 807 requests/s, and 766 if a batch waits for all of them.
ENOUGH = 16


class BatcherStoppedError(Exception):
    """The task that computes batches has ended."""

    def __init__(self):
        super().__init__("the task that computes batches has ended")


@dataclasses.dataclass
class _Item:
    """A waiting request."""

    run: Callable  # computes the outputs; requests with the same function can share a batch
    inputs: np.ndarray  # [N, ...]
    outputs: asyncio.Future  # of {name: [N, ...]}


class Batcher:
    """Collects requests into batches.

    A batch starts when the previous one is done and as many requests wait as were computed or waiting
    at its end, or ENOUGH rows: a client that has its answer often asks again. If no request comes for
    `wait` seconds, it starts with those that wait. A single client never waits for others. `observe`
    gets the rows of each batch.

    Attributes:
        stopped: whether `work` has ended; a request then fails with BatcherStoppedError.
    """

    def __init__(self, size: int, wait: float):
        """`size` is the rows of a batch, though a single request may have more; `wait` in seconds."""
        self._size, self._wait = size, wait
        self.observe: Callable[[int], None] = lambda rows: None
        self._items: collections.deque[_Item] = collections.deque()
        self._changed = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "compute")
        self._computing = asyncio.Lock()
        self._in_flight = 0  # requests at the end of the last batch
        self.stopped = False

    @property
    def waiting(self) -> int:
        """The number of rows waiting to be computed."""
        return sum(len(item.inputs) for item in self._items)

    def submit(self, run: Callable, inputs: np.ndarray) -> asyncio.Future:
        """A future of `run(inputs)`, {name: [N, ...]}, which may be computed in a larger batch."""
        if self.stopped:
            raise BatcherStoppedError
        item = _Item(run, inputs, asyncio.get_running_loop().create_future())
        self._items.append(item)
        self._changed.set()
        return item.outputs

    async def work(self) -> None:
        """Computes batches until it is cancelled; requests that are left then fail."""
        taken: list[_Item] = []
        try:
            while True:
                await self._wait_for_batch()
                async with self._computing:
                    taken = self._take()
                    await self._compute(taken)
                    self._in_flight = len(taken) + len(self._items)
                    taken = []  # which would keep a replaced version in memory
        finally:
            self.stopped = True
            for item in (*taken, *self._items):
                if not item.outputs.done():
                    item.outputs.set_exception(BatcherStoppedError())
            self._items.clear()

    async def between(self, work: Callable[[], object]) -> None:
        """Runs `work()` in a thread between two batches, while none is computed.

        It is not the thread that computes: that one may have a lower priority, and would keep Python's
        lock while others have the cores.
        """
        async with self._computing:
            await asyncio.to_thread(work)

    async def _wait_for_batch(self) -> None:
        while not self._items:
            await self._change()
        enough = min(self._size, ENOUGH)
        with contextlib.suppress(TimeoutError):
            while len(self._items) < self._in_flight and self.waiting < enough:
                async with asyncio.timeout(self._wait):
                    await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _take(self) -> list[_Item]:
        """The first request and later ones for the same function; the others keep their order."""
        first = self._items.popleft()
        taken, rows, left = [first], len(first.inputs), []
        while self._items and rows < self._size:
            item = self._items.popleft()
            if item.run == first.run and rows + len(item.inputs) <= self._size:
                taken.append(item)
                rows += len(item.inputs)
            else:
                left.append(item)
        self._items.extendleft(reversed(left))
        return taken

    async def _compute(self, items: list[_Item]) -> None:
        """Computes a batch. Whatever fails, memory for the batch included, fails its requests alone."""
        try:
            inputs = np.concatenate([item.inputs for item in items])
            self.observe(len(inputs))
            loop = asyncio.get_running_loop()
            outputs = await loop.run_in_executor(self._thread, items[0].run, inputs)
            start = 0
            for item in items:
                rows = slice(start, start := start + len(item.inputs))
                if not item.outputs.done():
                    item.outputs.set_result({name: v[rows] for name, v in outputs.items()})
        except Exception as error:
            if len(items) > 1:  # One bad request must not fail the others.
                for item in items:
                    await self._compute([item])
            elif not items[0].outputs.done():
                items[0].outputs.set_exception(error)
