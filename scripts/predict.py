#!/usr/bin/env python3
"""`python -m keras_cifar.predict` from a checkout, installed or not."""

import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
runpy.run_module("keras_cifar.predict", run_name="__main__")
