"""Computes requests that arrive together in one batch, in threads that each have cores of their own."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np


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

    A batch starts when a thread is free and no request is arriving, and at the latest `wait` seconds
    after its first request could have started. It is divided among the threads that are free then. A
    single client never waits for others, and many clients fill a batch while another is computed.
    `observe` gets the rows of each batch.

    Attributes:
        stopped: whether `work` has ended; a request then fails with BatcherStoppedError.
    """

    def __init__(self, size: int, wait: float, threads: int = 1):
        """`size` is the rows of a batch, though a single request may have more; `wait` in seconds."""
        self._size, self._wait, self._free = size, wait, threads
        self.observe: Callable[[int], None] = lambda rows: None
        self._items: collections.deque[_Item] = collections.deque()
        self._changed = asyncio.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "compute")
        self._arriving = 0
        self.stopped = False

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """Counts a request as arriving while the context is open."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1
            self._changed.set()

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
        try:
            async with asyncio.TaskGroup() as batches:
                while True:
                    await self._wait_for_batch()
                    items = self._take()
                    threads = min(self._free, sum(len(item.inputs) for item in items))
                    self._free -= threads
                    batches.create_task(self._compute(items, threads))
        finally:
            self.stopped = True
            for item in self._items:
                _fail(item, BatcherStoppedError())
            self._items.clear()

    async def _wait_for_batch(self) -> None:
        while not (self._items and self._free):
            self._changed.clear()
            await self._changed.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait):
                while self._arriving and self.waiting < self._size:
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

    async def _compute(self, items: list[_Item], threads: int) -> None:
        """Computes a batch in so many threads, which are free again then."""
        try:
            await self._answer(items, threads)
        finally:
            for item in items:  # where the task was cancelled
                _fail(item, BatcherStoppedError())
            self._free += threads
            self._changed.set()

    async def _answer(self, items: list[_Item], threads: int) -> None:
        """Computes a batch. Whatever fails, memory for the batch included, fails its requests alone."""
        try:
            inputs = np.concatenate([item.inputs for item in items])
            self.observe(len(inputs))
            parts = np.array_split(inputs, threads)
            run = functools.partial(asyncio.get_running_loop().run_in_executor, self._pool)
            found = await asyncio.gather(*(run(items[0].run, part) for part in parts))
            outputs = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            start = 0
            for item in items:
                rows = slice(start, start := start + len(item.inputs))
                if not item.outputs.done():
                    item.outputs.set_result({name: v[rows] for name, v in outputs.items()})
        except Exception as error:
            if len(items) == 1:
                _fail(items[0], error)
            else:  # One bad request must not fail the others.
                for item in items:
                    await self._answer([item], 1)


def _fail(item: _Item, error: Exception) -> None:
    if not item.outputs.done():
        item.outputs.set_exception(error)
