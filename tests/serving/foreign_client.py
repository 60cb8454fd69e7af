"""A client of TensorFlow Serving's gRPC and REST APIs that knows nothing of this package.

python foreign_client.py ADDRESS URL IMAGE prints the responses to black images and to a file.
"""

import json
import pathlib
import sys

import grpc
import numpy as np
import requests
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

address, url, file = sys.argv[1:]
name = url.rpartition("/")[2]
with grpc.insecure_channel(address) as channel:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    found = {}
    black, encoded = np.zeros((2, 16, 16, 3), np.uint8), [pathlib.Path(file).read_bytes()]
    for signature, key, values in (
        ("", "images", black),
        ("features", "images", black),
        ("serving_bytes", "image_bytes", encoded),
    ):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = name
        request.model_spec.signature_name = signature
        request.inputs[key].CopyFrom(tf.make_tensor_proto(values))
        response = stub.Predict(request, timeout=30)
        outputs = {key: tf.make_ndarray(tensor) for key, tensor in response.outputs.items()}
        found[signature] = {
            key: values.astype(str).tolist() if values.dtype == object else values.tolist()
            for key, values in outputs.items()
        }
response = requests.post(f"{url}:predict", json={"inputs": black.tolist()}, timeout=30)
response.raise_for_status()
found["REST"] = response.json()["outputs"]
assert not any(module.startswith("keras_cifar") for module in sys.modules)
print(json.dumps(found))
