"""Peer of `serve`: keras.Model.predict in a handler of FastAPI, as it is usually written.

Run as `python -m keras_cifar.benchmarking.fastapi_keras MODEL.keras`; prints its address.
"""

import base64
import io
import pathlib
import socket
import sys

import fastapi
import numpy as np
import uvicorn
from PIL import Image

from keras_cifar.core import environment

environment.import_tensorflow()

from keras_cifar import models

model = models.load(pathlib.Path(sys.argv[1]))
size = model.input_shape[2], model.input_shape[1]
app = fastapi.FastAPI()


@app.post("/predict")
async def predict(body: dict):  # in one thread: Keras promises nothing about several
    files = [io.BytesIO(base64.b64decode(item["b64"])) for item in body["instances"]]
    images = [np.array(Image.open(file).convert("RGB").resize(size)) for file in files]
    return {"predictions": model.predict(np.stack(images), verbose=0).tolist()}


if __name__ == "__main__":
    model.predict(np.zeros((1, *model.input_shape[1:]), np.uint8), verbose=0)
    # With IPPROTO_TCP, as uvicorn's own sockets have, asyncio sends small packets at once.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(f"address   http://127.0.0.1:{listener.getsockname()[1]}/predict", flush=True)
    config = uvicorn.Config(app, log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
