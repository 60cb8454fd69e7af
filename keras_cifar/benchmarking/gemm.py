"""The machine's matrix-multiply rate in GFLOP/s: the limit of any network.

In float32 NumPy's, in bfloat16, which NumPy does not have, TensorFlow's.
"""

import numpy as np
from turns import Turns

SIDE = 2048

turns = Turns()
matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
multiply = np.matmul
if turns.settings["dtype_policy"] == "mixed_bfloat16":
    import tensorflow as tf

    matrix, multiply = tf.cast(matrix, tf.bfloat16), tf.function(tf.matmul)
turns.repeat(lambda: multiply(matrix, matrix), 2 * SIDE**3 / 1e9)
