"""Train image classifiers with Keras on TensorFlow and put them into service."""

from keras_cifar.core import environment

__version__ = "0.1.0"

environment.configure()
