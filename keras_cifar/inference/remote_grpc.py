"""Inference through a server with TensorFlow Serving's gRPC API."""

import re

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format, message, struct_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc

from keras_cifar.core.errors import UsageError, UserError, one_line
from keras_cifar.inference.remote import HOST, MAX_RESPONSE, TemporaryError, TooLargeError

_MODEL_URL = re.compile(rf"grpc://({HOST}:\d{{1,5}})/([^\s/:]+)(/versions/(\d{{1,18}}))?")

# Codes of a server or a proxy that is busy or restarting.
_TEMPORARY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}


class GrpcClient:
    """Requests over gRPC, with the methods of `remote.RestClient`. Images are sent as their pixels."""

    def __init__(self, url: str, timeout: float):
        """Raises UsageError for an invalid address; `timeout` in seconds."""
        match = _MODEL_URL.fullmatch(url)
        if not match:
            raise UsageError(f"--model={url}: a URL must be grpc://HOST:PORT/NAME[/versions/N]")
        self._url, self._timeout = url, timeout
        address, _, self._name, _, version = match.groups()
        self._version = int(version) if version else None
        options = {
            "grpc.max_receive_message_length": MAX_RESPONSE,
            "grpc.max_send_message_length": -1,
        }
        channel = grpc.insecure_channel(address, list(options.items()))
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def metadata(self) -> tuple[dict, object]:
        """(the signatures as the JSON has them, the class names if the server tells them)."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        metadata = self._call(self._stub.GetModelMetadata, request).metadata
        signatures = get_model_metadata_pb2.SignatureDefMap()
        names = struct_pb2.ListValue()
        try:
            metadata["signature_def"].Unpack(signatures)
            told = "class_names" in metadata and metadata["class_names"].Unpack(names)
        except message.DecodeError as error:
            raise ValueError(str(error)) from None
        parsed = json_format.MessageToDict(signatures, preserving_proto_field_name=True)
        return parsed["signature_def"], list(names) if told else None

    def to_classify(self, images: np.ndarray, rule: str) -> tuple[str, str, np.ndarray]:
        """(signature, input, its values) by which uint8 [N, H, W, 3] are classified."""
        return "serving_default", "images", images

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """The values of an input that takes uint8 [N, H, W, 3]."""
        return images

    def predict(self, signature: str, name: str, values: np.ndarray, output: str) -> object:
        """An output as an array; None if the response has none."""
        request = predict_pb2.PredictRequest(output_filter=[output])
        request.model_spec.signature_name = signature
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
        outputs = self._call(self._stub.Predict, request).outputs
        if output not in outputs:
            return None
        tensor = outputs[output]
        # What follows fills the shape, however few values there are.
        if np.prod([d.size for d in tensor.tensor_shape.dim], dtype=object) > MAX_RESPONSE:
            return None
        try:
            return tf.make_ndarray(tensor)
        except (TypeError, ValueError, KeyError):
            return None

    def _call(self, method, request):
        request.model_spec.name = self._name
        if self._version is not None:
            request.model_spec.version.value = self._version
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise self._error(error.code(), error.details() or "") from None

    def _error(self, code: grpc.StatusCode, details: str) -> UserError:
        answer = one_line(f"{self._url} answered {code.name}: {details}")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return TooLargeError(answer)
        if code is grpc.StatusCode.UNAVAILABLE:
            return TemporaryError(f"{self._url} cannot be reached: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return TemporaryError(
                f"{self._url} cannot be reached: no response in {self._timeout:g} s"
            )
        return (TemporaryError if code in _TEMPORARY else UserError)(answer)
