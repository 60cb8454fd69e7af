"""Conversion of TensorFlow Serving's JSON, and batching, without a server."""

import asyncio
import base64
import json
import threading

import numpy as np
import pytest

from keras_cifar.serving import rest
from keras_cifar.serving.batching import ENOUGH, Batcher, BatcherStoppedError

SHAPE = (None, 2, 2, 3)
IMAGE = [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 255]]]


def pixels(request) -> np.ndarray:
    return rest.tensor(rest.parse(json.dumps(request).encode()), "images", SHAPE, False)


def strings(request) -> list:
    call = rest.parse(json.dumps(request).encode())
    return rest.tensor(call, "image_bytes", (None,), True).tolist()


@pytest.mark.parametrize(
    "request_",
    [
        {"instances": [IMAGE, IMAGE]},
        {"instances": [{"images": IMAGE}, {"images": IMAGE}]},
        {"inputs": [IMAGE, IMAGE]},
        {"inputs": {"images": [IMAGE, IMAGE]}},
    ],
)
def test_pixels_in_every_format(request_):
    array = pixels(request_)
    assert array.dtype == np.uint8
    assert array.tolist() == [IMAGE, IMAGE]


@pytest.mark.parametrize("wrap", [lambda v: {"image_bytes": v}, lambda v: v])
def test_strings_in_every_format(wrap):
    some = {"b64": base64.b64encode(b"\xff\x00a").decode()}
    assert strings({"instances": [wrap(some), wrap("ä")]}) == [b"\xff\x00a", "ä".encode()]
    assert strings({"inputs": wrap([some, "ä"])}) == [b"\xff\x00a", "ä".encode()]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *((body, "not JSON") for body in (b"", b"\xff", b'{"instances": [', b"[" * 100_000)),
        (b"[1]", "not a JSON object"),
        (b"{}", 'one of "instances" and "inputs"'),
        (b'{"instances": [1], "inputs": [1]}', 'one of "instances" and "inputs"'),
        (b'{"signature_name": 3, "inputs": [1]}', "signature_name"),
    ],
)
def test_an_invalid_request_is_refused(body, message):
    with pytest.raises(rest.RequestError, match=message) as caught:
        rest.parse(body)
    assert caught.value.status == 400


def changed(value):
    image = json.loads(json.dumps(IMAGE))
    image[1][1][2] = value
    return {"instances": [IMAGE, image]}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"instances": 3}, "not a list"),
        ({"instances": {"images": IMAGE}}, "not a list"),
        ({"instances": []}, "no values"),
        *(({"inputs": x}, "no values") for x in ([], {"images": []}, {"images": 3}, None)),
        ({"instances": [IMAGE[0]]}, r"\[1, 2, 3\].*\[N, 2, 2, 3\]"),
        ({"inputs": IMAGE}, r"\[N, 2, 2, 3\]"),
        ({"instances": [IMAGE, IMAGE[0]]}, r"\[N, 2, 2, 3\]"),
        ({"instances": [{"image": IMAGE}]}, "'image'"),
        ({"instances": [{"images": IMAGE, "x": 1}]}, "'x'"),
        ({"instances": [{}]}, "none"),
        ({"instances": [{"images": IMAGE}, IMAGE]}, "instance 1"),
        ({"inputs": {"pixels": [IMAGE]}}, "'pixels'"),
        ({"instances": [{"b64": "AAAA"}]}, r"\[N, 2, 2, 3\]"),
        *((changed(x), "integers") for x in (256, -1, 0.5, "7", None, 10**30, float("nan"))),
        (changed([1]), r"\[N, 2, 2, 3\]"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_refused(request_, message):
    with pytest.raises(rest.RequestError, match=message):
        pixels(request_)


@pytest.mark.parametrize(
    "value",
    [1, None, [], {"b64": "?"}, {"b64": "AAA"}, {"b64": 1}, {"b64": "AAAA", "x": 1}, "\ud800"],
)
def test_an_invalid_string_is_refused(value):
    with pytest.raises(rest.RequestError):
        strings({"instances": [{"b64": "AAAA"}, value]})


def test_responses_have_the_format_of_the_request():
    outputs = {
        "probabilities": np.array([[0.25, np.nan]], np.float32),
        "label": np.array(["ä".encode()], object),
        "some_bytes": np.array([b"\xff"], object),
    }
    row = {"probabilities": [0.25, None], "label": "ä", "some_bytes": {"b64": "/w=="}}

    def response(key, outputs):
        call = rest.Call("s", key == "instances", [])
        return json.loads(rest.response(call, outputs), parse_constant=lambda name: None)

    assert response("instances", outputs) == {"predictions": [row]}
    assert response("inputs", outputs) == {"outputs": {name: [v] for name, v in row.items()}}
    one = {"features": np.array([[1.5]], np.float32)}
    assert response("instances", one) == {"predictions": [[1.5]]}
    assert response("inputs", one) == {"outputs": [[1.5]]}


# ---- Batches


class Doubler:
    """Computes 2 x, records the batches, and can be blocked."""

    def __init__(self):
        self.batches = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, inputs):
        self.go.wait(10)
        self.batches.append(inputs.tolist())
        if -1 in inputs:
            raise ValueError("minus one")
        return {"y": 2 * inputs}


def with_batcher(body, size=4, wait=0.0):
    """Runs `await body(batcher)` with a running batcher."""

    async def main():
        batcher = Batcher(size, wait)
        task = asyncio.create_task(batcher.work())
        try:
            return await asyncio.wait_for(body(batcher), 10)
        finally:
            task.cancel()

    return asyncio.run(main())


def test_requests_that_arrive_during_a_batch_are_computed_together():
    double = Doubler()

    async def body(batcher):
        double.go.clear()
        futures = [batcher.submit(double, np.array([0]))]
        while batcher.waiting:
            await asyncio.sleep(0.001)
        futures += [
            batcher.submit(double, np.array(values)) for values in ([1, 2], [3], [4], [5, 6])
        ]
        assert batcher.waiting == 6
        double.go.set()
        return [(await future)["y"].tolist() for future in futures]

    assert with_batcher(body) == [[0], [2, 4], [6], [8], [10, 12]]
    assert double.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_what_is_done_between_batches_waits_for_the_one_that_is_computed():
    double = Doubler()

    async def body(batcher):
        double.go.clear()
        future = batcher.submit(double, np.array([0]))
        while batcher.waiting:
            await asyncio.sleep(0.001)
        answered = threading.Event()

        def work():
            assert answered.wait(10), "the event loop stands still"
            double.batches.append(threading.current_thread().name.partition("_")[0])

        done = asyncio.create_task(batcher.between(work))
        await asyncio.sleep(0.05)
        assert not done.done()
        double.go.set()
        await future
        after = batcher.submit(double, np.array([1]))
        await asyncio.sleep(0.05)
        answered.set()
        await asyncio.gather(done, after)

    with_batcher(body)
    assert double.batches == [[0], "asyncio", [1]]


def test_only_requests_for_the_same_function_share_a_batch():
    one, other = Doubler(), Doubler()

    async def body(batcher):
        inputs = ([0], list(range(9)), [2])  # the second is larger than a batch
        runs = zip((one, other, one), inputs, strict=True)
        futures = [batcher.submit(run, np.array(values)) for run, values in runs]
        return [(await future)["y"].tolist() for future in futures]

    assert with_batcher(body) == [[0], list(range(0, 18, 2)), [4]]
    assert one.batches == [[0, 2]]
    assert other.batches == [list(range(9))]


@pytest.mark.parametrize("cancelled", [False, True])
def test_one_bad_or_cancelled_request_does_not_fail_the_others(cancelled):
    double = Doubler()

    async def body(batcher):
        futures = [batcher.submit(double, np.array([value])) for value in (1, -1, 2)]
        if cancelled:
            futures[1].cancel()
        return await asyncio.gather(*futures, return_exceptions=True)

    first, second, third = with_batcher(body)
    assert (first["y"].tolist(), third["y"].tolist()) == ([2], [4])
    assert str(second) == ("" if cancelled else "minus one")


def raising(*args):
    raise MemoryError


@pytest.mark.parametrize("fault", ["concatenate", "observe", "outputs"])
def test_batches_are_computed_after_any_failure(fault):
    double = Doubler()

    async def body(batcher):
        inputs = [np.array([1]), np.array([[2]] if fault == "concatenate" else [2])]
        if fault == "observe":
            batcher.observe = raising
        run = (lambda inputs: None) if fault == "outputs" else double
        futures = [batcher.submit(run, each) for each in inputs]
        failed = await asyncio.gather(*futures, return_exceptions=True)
        batcher.observe = lambda rows: None
        return failed, (await batcher.submit(double, np.array([3])))["y"].tolist()

    failed, last = with_batcher(body)
    assert last == [6]
    if fault == "concatenate":  # each by itself is valid
        assert [row["y"].tolist() for row in failed] == [[2], [[4]]]
    else:
        kind = MemoryError if fault == "observe" else AttributeError
        assert [type(error) for error in failed] == [kind, kind]


def test_without_the_task_requests_fail_at_once():
    double = Doubler()

    async def main():
        batcher = Batcher(4, 0)
        task = asyncio.create_task(batcher.work())
        double.go.clear()
        futures = [batcher.submit(double, np.array([0]))]
        while batcher.waiting:
            await asyncio.sleep(0.001)
        futures.append(batcher.submit(double, np.array([1])))
        assert not batcher.stopped
        task.cancel()
        failed = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 5)
        assert [type(error) for error in failed] == [BatcherStoppedError] * 2
        assert batcher.stopped
        with pytest.raises(BatcherStoppedError):
            batcher.submit(double, np.array([2]))
        double.go.set()

    asyncio.run(main())


def test_a_batch_waits_for_those_who_asked_before():
    double = Doubler()

    async def body(batcher):
        double.go.clear()
        first = batcher.submit(double, np.array([1]))
        while batcher.waiting:
            await asyncio.sleep(0.001)
        others = [batcher.submit(double, np.array([n])) for n in (2, 3)]
        double.go.set()
        await first
        await asyncio.sleep(0.05)
        assert double.batches == [[1]]
        await asyncio.gather(*others, batcher.submit(double, np.array([4])))
        alone = batcher.submit(double, np.array([5]))
        await asyncio.sleep(0.05)
        assert double.batches == [[1], [2, 3, 4]]
        await alone  # after the wait
        batcher.submit(double, np.array([6]))
        await asyncio.sleep(0.1)
        assert double.batches == [[1], [2, 3, 4], [5], [6]]

    with_batcher(body, wait=1.0)


def test_a_batch_waits_for_no_more_rows_than_are_enough():
    double = Doubler()

    async def body(batcher):
        double.go.clear()
        futures = [batcher.submit(double, np.arange(2 * ENOUGH))]
        while batcher.waiting:
            await asyncio.sleep(0.001)
        futures.append(batcher.submit(double, np.arange(ENOUGH)))
        double.go.set()
        await asyncio.gather(*futures)

    with_batcher(body, size=4 * ENOUGH, wait=60)
    assert [len(batch) for batch in double.batches] == [2 * ENOUGH, ENOUGH]


def test_a_single_client_never_waits_however_many_rows_it_sent_before():
    double = Doubler()

    async def body(batcher):
        await batcher.submit(double, np.array([1, 2, 3]))
        await batcher.submit(double, np.array([4]))

    with_batcher(body, wait=60)
    assert double.batches == [[1, 2, 3], [4]]
