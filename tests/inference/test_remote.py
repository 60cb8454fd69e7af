"""`predict` with a URL: the same output as local prediction, and servers that fail."""

import base64
import http.server
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from keras_cifar.core.errors import UserError
from keras_cifar.inference import remote
from tests.conftest import ROUNDING, colour_images, equal_but_for_rounding
from tests.inference.test_predict import command

PATH = "/v1/models/model"


@pytest.fixture
def files(tmp_path) -> list:
    """Images of several formats, sizes and colour modes, and some files that are not images."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = list(map(Image.fromarray, colour_images(7, 20, 3, seed=9)[0].repeat(3, axis=1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned
    images[0].save(folder / "0.jpg", exif=exif)
    images[1].convert("CMYK").save(folder / "1.jpg")
    images[2].save(folder / "2.tiff")
    images[3].putalpha(100)
    images[3].save(folder / "3.png")
    images[4].quantize(8).save(folder / "4.gif")
    images[5].save(folder / "5.webp")
    images[6].resize((16, 16)).save(folder / "6.png")
    (folder / "7.png").write_bytes(b"no image")
    (folder / "8.png").write_bytes(b"")
    return [folder, folder / "missing.png"]


# ---- A server of ours


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_the_output_is_that_of_local_prediction(served_run, trained_run, files, capsys, form):
    found = []
    for model in (trained_run.path, served_run.url, f"{served_run.url}/versions/1"):
        flags = f"--model={model}", f"--format={form}", "--top_k=2", "--min_probability=0.999"
        assert command(*flags, *files) == 1
        found.append(capsys.readouterr())
    assert found[0].out.count("class_") + found[0].out.count("unknown") >= 14
    assert "unknown" in found[0].out
    assert equal_but_for_rounding(*(each.out for each in found))
    assert found[0].err == found[1].err == found[2].err


def check_features(models, images, directory) -> None:
    """Checks that all of --model give the same features of a folder of images."""
    found = []
    for number, model in enumerate(models):
        out = directory / f"{number}.npz"
        assert command(f"--model={model}", f"--features={out}", images) == 0
        found.append(np.load(out))
    for name in ("files", "labels"):
        np.testing.assert_array_equal(found[0][name], found[1][name])
    np.testing.assert_allclose(found[0]["features"], found[1]["features"], atol=ROUNDING)


def test_the_features_are_those_of_local_prediction(
    served_run, trained_run, image_folder, tmp_path
):
    check_features((trained_run.path, served_run.url), image_folder / "train", tmp_path)


@pytest.mark.parametrize("suffix", ["x", "/versions/99"])
def test_an_unknown_model_of_a_server_is_one_line(served_run, files, failure, suffix):
    address = f"{served_run.url}{suffix}"
    assert failure(f"--model={address}", *files).startswith(
        f"predict: error: {address} answered 404: "
    )


# ---- Servers that fail


SHAPE = {"dim": [{"size": size, "name": ""} for size in ("-1", "16", "16", "3")]}
SIGNATURE = {"inputs": {"images": {"dtype": "DT_UINT8", "tensor_shape": SHAPE, "name": "x"}}}
METADATA = {"metadata": {"signature_def": {"signature_def": {"serving_default": SIGNATURE}}}}


class Fake:
    """A server with the responses of a test, and otherwise those of TensorFlow Serving.

    Attributes:
        responses: to requests to predict, in order: (status, body), or None for the right one.
        metadata: of the model.
        requests: the bodies of the requests to predict.
    """

    def __init__(self):
        self.responses, self.metadata, self.requests = [], METADATA, []
        self.delay, self.max_images, self.max_bytes = 0, 2**30, 2**30
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def reply(self, status, body):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                assert self.path == f"{PATH}/metadata"
                self.reply(200, fake.metadata)

            def do_POST(self):
                assert self.path == f"{PATH}:predict"
                size = int(self.headers["Content-Length"])
                if size > fake.max_bytes:  # Closing with unread data resets the connection.
                    self.close_connection = True
                    return
                request = json.loads(self.rfile.read(size))
                fake.requests.append(request)
                time.sleep(fake.delay)
                response = fake.responses.pop(0) if fake.responses else None
                self.reply(*(response or fake.right(request)))

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Some tests disconnect before the response.
        self.server.handle_error = lambda request, address: None
        self.url = f"http://127.0.0.1:{self.server.server_port}{PATH}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def right(self, request):
        """Probabilities that tell the images apart: 1 for the class of the first pixel."""
        assert request["signature_name"] == "serving_bytes"
        encoded = request["inputs"]["image_bytes"]
        if len(encoded) > self.max_images:
            return 413, {"error": "too large"}
        images = [np.array(Image.open(io.BytesIO(base64.b64decode(e["b64"])))) for e in encoded]
        rows = [[1.0 * (image[0, 0, 0] == i) for i in range(3)] for image in images]
        return 200, {"outputs": {"probabilities": rows, "label": [], "label_index": []}}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0))
    fake = Fake()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def images() -> np.ndarray:
    """uint8 [300, 16, 16, 3], whose pixels are 0, 1, 2, 0, 1, ..."""
    return np.tile(np.arange(3, dtype=np.uint8)[:, None, None, None], (100, 16, 16, 3))


def test_tensorflow_serving_needs_labels(fake, labels, files, capsys):
    assert command(f"--model={fake.url}", *files) == 1
    assert "--labels=FILE" in capsys.readouterr().err
    assert command(f"--model={fake.url}", f"--labels={labels}", files[0] / "6.png") == 0
    assert "class_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limit", "failures", "sizes"),
    [(300, [], [128, 128, 44]), (5, [], [9, 4, 5]), (300, [(503, b""), (429, {})], [3, 3, 3])],
    ids=["in batches", "split where it is too large", "again after a temporary failure"],
)
def test_images_are_sent(fake, labels, images, limit, failures, sizes):
    predictor = remote.RemotePredictor(fake.url, 10, str(labels))
    assert predictor.size == (16, 16)
    fake.max_images, fake.responses = limit, list(failures)
    images = images[: sizes[0] if sizes[0] < 128 else None]
    assert predictor.classify(images).argmax(1).tolist() == images[:, 0, 0, 0].tolist()
    assert [len(request["inputs"]["image_bytes"]) for request in fake.requests] == sizes
    assert predictor.classify(images[:0]).shape == (0, 3)


def test_a_large_request_is_split_where_the_connection_is_closed(fake, labels, images, monkeypatch):
    predictor, images = remote.RemotePredictor(fake.url, 10, str(labels)), images[:9]
    predictor.classify(images)
    size, fake.requests = len(json.dumps(fake.requests[0])), []
    fake.max_bytes = size * 2 // 3
    with pytest.raises(UserError, match="cannot be reached"):  # a small one: the server is away
        predictor.classify(images)
    monkeypatch.setattr(remote, "SMALL", 100)
    assert predictor.classify(images).argmax(1).tolist() == images[:, 0, 0, 0].tolist()
    assert [len(request["inputs"]["image_bytes"]) for request in fake.requests] == [4, 5]


def test_labels_can_be_in_the_home_directory(fake, labels, monkeypatch):
    monkeypatch.setenv("HOME", str(labels.parent))
    predictor = remote.RemotePredictor(fake.url, 10, f"~/{labels.name}")
    assert len(predictor.class_names) == 3


@pytest.mark.parametrize(
    ("responses", "tries", "message"),
    [
        ([(503, b"<html>away</html>")] * 3, 3, "answered 503: Service Unavailable"),
        ([(500, {"error": "the server\nhas failed"})], 1, r"answered 500: the server\nhas failed"),
        ([(400, {"error": "why"})], 1, "answered 400: why"),
        ([(400, ["why"])], 1, "answered 400: Bad Request"),
        ([(413, {"error": "small"})], 1, "answered 413: small"),
        ([(200, b"no JSON")], 1, "with JSON"),
        ([(200, b"[" * 10**5)], 1, "with JSON"),
        ([(200, [])], 1, "did not answer with probabilities of 1 images in 3 classes"),
        ([(200, {"outputs": {}})], 1, "not answer with"),
        *(
            ([(200, {"outputs": {"probabilities": x}})], 1, "not answer with")
            for x in ([[0.1]], [[1, 2, 3], [4]], ["a"], 3)
        ),
    ],
)
def test_a_server_that_fails_is_one_line(fake, labels, files, failure, responses, tries, message):
    fake.responses = list(responses)
    line = failure(f"--model={fake.url}", f"--labels={labels}", files[0] / "6.png")
    assert line.startswith(f"predict: error: {fake.url} ")
    assert message in line
    assert len(fake.requests) == tries


def test_a_server_that_takes_too_long(fake, labels, files, failure):
    fake.delay = 0.5
    flags = [f"--model={fake.url}", f"--labels={labels}", "--timeout=0.1"]
    assert "no response in 0.1 s" in failure(*flags, files[0] / "6.png")
    assert len(fake.requests) == 3


def test_a_server_that_is_not_running_is_one_line(files, failure):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = failure(f"--model=http://127.0.0.1:{port}{PATH}", *files)
    assert "cannot be reached: Connection refused" in line


@pytest.mark.parametrize("metadata", [[], {}, {"metadata": {"signature_def": 3}}, 3, b"x"])
def test_metadata_of_another_model_is_one_line(fake, labels, files, failure, metadata):
    fake.metadata = metadata
    line = failure(f"--model={fake.url}", f"--labels={labels}", *files)
    assert "is not a model that keras_cifar exported" in line or "not answer with JSON" in line


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("http://", 2),
        ("http://127.0.0.1:1", 2),
        ("http://127.0.0.1:1/v1/models/a:predict", 2),
        ("http://127.0.0.1:x/v1/models/a", 2),
        ("http://[::1/v1/models/a", 2),
        ("http://a b/v1/models/a", 2),
        ("http://127.0.0.1:99999/v1/models/a", 1),
        ("gs://bucket/v1/models/a", 1),
    ],
)
def test_an_invalid_url_is_one_line(files, failure, monkeypatch, model, status):
    monkeypatch.setattr(remote, "DELAYS", ())
    failure(f"--model={model}", *files, status=status)
