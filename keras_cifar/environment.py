"""What must be set before TensorFlow is imported. Everything the user has set stays as it is."""

import contextlib
import os
import sys
import tempfile

# TensorFlow turns oneDNN on by itself only on CPUs with AVX-512 VNNI or newer; on others it is
# 1.7 to 3 times faster too, but must be asked for.
DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "KERAS_BACKEND": "tensorflow",
}


def configure() -> None:
    """Sets the defaults of the environment that the user has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def import_tensorflow() -> None:
    """Imports TensorFlow, without its start-up messages unless TF_CPP_MIN_LOG_LEVEL is below 3.

    TensorFlow 2.21 writes some lines (oneDNN, missing CUDA) before its log level is in force, so
    the level alone does not silence them.
    """
    if "tensorflow" in sys.modules:
        return
    quiet = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == DEFAULTS["TF_CPP_MIN_LOG_LEVEL"]
    with _silent_stderr() if quiet else contextlib.nullcontext():
        import tensorflow as tf

        # The first look for GPUs is where a machine without a driver is reported.
        tf.config.list_physical_devices()
    if quiet:
        tf.get_logger().setLevel("ERROR")


@contextlib.contextmanager
def _silent_stderr():
    """Keeps what is written to the process's stderr; shows it only if the body raises."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
