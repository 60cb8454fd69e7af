"""Parses the bodies of requests so that the event loop goes on.

json.loads and numpy.array hold Python's lock until they are done, for seconds with 30 MB of numbers. A
thread would stop all others for that time, so large bodies are parsed in processes.
"""

import asyncio
import concurrent.futures
import pickle
import subprocess
import sys

import numpy as np

from keras_cifar.core.environment import give_way, package_environment, usable_cpus
from keras_cifar.serving import rest

SMALL = 2**17  # bytes of a body that is parsed at once, in about 5 ms


class Parser:
    """Parses bodies; processes start with the first large one, and end with this process."""

    def __init__(self):
        processes = min(4, usable_cpus())
        self._threads = concurrent.futures.ThreadPoolExecutor(processes, "parse")
        self._idle: list[subprocess.Popen] = []

    async def decode(
        self, body: bytes, inputs: dict[str, rest.Input]
    ) -> tuple[rest.Call, np.ndarray]:
        """`rest.decode`, in another process if the body is large."""
        if len(body) <= SMALL:
            return rest.decode(body, inputs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._decode_in_process, body, inputs)

    def _decode_in_process(self, body: bytes, inputs: dict[str, rest.Input]) -> tuple:
        process = self._idle.pop() if self._idle else _start()
        try:
            pickle.dump((body, inputs), process.stdin)
            process.stdin.flush()
            decoded = pickle.load(process.stdout)
        except BaseException:  # It was killed, perhaps for its memory; the next body gets another.
            process.kill()
            process.communicate()
            raise
        self._idle.append(process)
        if isinstance(decoded, rest.RequestError):
            raise decoded
        return decoded


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "keras_cifar.serving.parsing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=package_environment(),
        start_new_session=True,  # Ctrl-C goes to the server alone, which then closes the pipes.
    )


def _work() -> None:
    """Decodes what comes through stdin until it is closed."""
    give_way()
    while True:
        try:
            body, inputs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            decoded: object = rest.decode(body, inputs)
        except rest.RequestError as error:
            decoded = error
        except MemoryError:
            decoded = rest.RequestError("the request is too large for the memory", 413)
        pickle.dump(decoded, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _work()
