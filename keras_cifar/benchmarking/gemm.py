"""The machine's float32 matrix-multiply rate in GFLOP/s, by NumPy: the limit of any network."""

import numpy as np
from turns import Turns

SIDE = 2048

turns = Turns()
matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
turns.repeat(lambda: matrix @ matrix, 2 * SIDE**3 / 1e9)
