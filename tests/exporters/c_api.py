"""Runs a SavedModel through libtensorflow's C API alone: no TensorFlow in Python, no Keras.

Run as a program: c_api.py EXPORT SIGNATURES.json INPUTS.npz OUTPUTS.npz. SIGNATURES is
{name: [inputs, outputs]}, both {name: [tensor, TF_DataType]}. INPUTS has `images` uint8 [N, H, W, 3],
and image files as `contents` uint8, one after the other, of `lengths` int64; OUTPUTS has
`SIGNATURE/OUTPUT` for each signature and output. The declarations are those of tensorflow/c/c_api.h
and tf_tstring.h.
"""

import ctypes
import importlib.util
import json
import pathlib
import sys

import numpy as np

DTYPES = {1: np.float32, 4: np.uint8, 9: np.int64}  # TF_DataType
STRING = 7


class Output(ctypes.Structure):
    """TF_Output."""

    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


def load_library() -> ctypes.CDLL:
    """The library of the pip package, whose directory is found without importing it."""
    (root,) = importlib.util.find_spec("tensorflow").submodule_search_locations
    ctypes.CDLL(f"{root}/libtensorflow_framework.so.2", ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(f"{root}/libtensorflow_cc.so.2", ctypes.RTLD_GLOBAL)
    for name in (
        "TF_AllocateTensor",
        "TF_GraphOperationByName",
        "TF_LoadSessionFromSavedModel",
        "TF_NewGraph",
        "TF_NewSessionOptions",
        "TF_NewStatus",
        "TF_StringGetDataPointer",
        "TF_TensorData",
    ):
        getattr(library, name).restype = ctypes.c_void_p
    library.TF_Message.restype = ctypes.c_char_p
    library.TF_Message.argtypes = [ctypes.c_void_p]
    library.TF_Dim.restype = ctypes.c_int64
    library.TF_StringGetSize.restype = ctypes.c_size_t
    library.TF_StringGetSize.argtypes = [ctypes.c_void_p]
    library.TF_StringGetDataPointer.argtypes = [ctypes.c_void_p]
    return library


class Session:
    """A loaded SavedModel."""

    def __init__(self, path: str, signatures: dict):
        self.signatures = signatures
        self.library = load_library()
        self.status = ctypes.c_void_p(self.library.TF_NewStatus())
        self.graph = ctypes.c_void_p(self.library.TF_NewGraph())
        self.session = ctypes.c_void_p(
            self.library.TF_LoadSessionFromSavedModel(
                ctypes.c_void_p(self.library.TF_NewSessionOptions()),
                None,
                path.encode(),
                (ctypes.c_char_p * 1)(b"serve"),
                1,
                self.graph,
                None,
                self.status,
            )
        )
        self.check()

    def check(self):
        if self.library.TF_GetCode(self.status):
            raise RuntimeError(self.library.TF_Message(self.status).decode())

    def output(self, tensor: str) -> Output:
        name, _, index = tensor.partition(":")
        operation = self.library.TF_GraphOperationByName(self.graph, name.encode())
        assert operation, tensor
        return Output(operation, int(index))

    def tensor(self, array: np.ndarray, kind: int) -> ctypes.c_void_p:
        itemsize = 24 if kind == STRING else array.itemsize  # sizeof(TF_TString)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        size = ctypes.c_size_t(array.size * itemsize)
        tensor = ctypes.c_void_p(self.library.TF_AllocateTensor(kind, shape, array.ndim, size))
        data = self.library.TF_TensorData(tensor)
        if kind != STRING:
            array = np.ascontiguousarray(array)
            ctypes.memmove(data, array.ctypes.data, array.nbytes)
            return tensor
        for i, value in enumerate(array):
            place = ctypes.c_void_p(data + i * itemsize)
            self.library.TF_StringInit(place)
            self.library.TF_StringCopy(place, value, ctypes.c_size_t(len(value)))
        return tensor

    def array(self, tensor: ctypes.c_void_p) -> np.ndarray:
        kind = self.library.TF_TensorType(tensor)
        shape = [self.library.TF_Dim(tensor, i) for i in range(self.library.TF_NumDims(tensor))]
        data = self.library.TF_TensorData(tensor)
        if kind != STRING:
            size = int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize
            return np.frombuffer(ctypes.string_at(data, size), DTYPES[kind]).reshape(shape)
        places = [data + i * 24 for i in range(shape[0])]
        pointer, size = self.library.TF_StringGetDataPointer, self.library.TF_StringGetSize
        return np.array([ctypes.string_at(pointer(place), size(place)) for place in places])

    def run(self, signature: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        takes, gives = self.signatures[signature]
        fed = [self.output(takes[name][0]) for name in inputs]
        values = [self.tensor(array, takes[name][1]) for name, array in inputs.items()]
        fetched = [self.output(tensor) for tensor, _ in gives.values()]
        results = (ctypes.c_void_p * len(fetched))()
        self.library.TF_SessionRun(
            self.session,
            None,
            (Output * len(fed))(*fed),
            (ctypes.c_void_p * len(values))(*(value.value for value in values)),
            len(fed),
            (Output * len(fetched))(*fetched),
            results,
            len(fetched),
            None,
            0,
            None,
            self.status,
        )
        self.check()
        return {
            name: self.array(ctypes.c_void_p(x)) for name, x in zip(gives, results, strict=True)
        }


def main(path: str, signatures: str, inputs: str, outputs: str) -> None:
    given = np.load(inputs)
    images, lengths = given["images"], given["lengths"]
    files = np.split(given["contents"], np.cumsum(lengths)[:-1])
    encoded = np.array([file.tobytes() for file in files], object)
    session = Session(path, json.loads(pathlib.Path(signatures).read_text()))
    found = {}
    for signature, (takes, _) in session.signatures.items():
        values = {name: encoded if name == "image_bytes" else images for name in takes}
        for name, array in session.run(signature, values).items():
            found[f"{signature}/{name}"] = array
    assert not {"tensorflow", "keras", "keras_cifar"} & set(sys.modules)
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
