"""Folds batch normalization into the layer before it, for inference.

With fixed statistics, normalization scales and shifts each channel; the convolution or dense layer
before it can do the same. TensorFlow on CPUs then runs convolution, bias, addition and ReLU as one
kernel.
"""

import collections
import itertools
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

FOLDABLE = (
    keras.layers.Conv2D,
    keras.layers.Dense,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
)


def fold(model: keras.Model, kept: str | None = None) -> keras.Model:
    """Returns a copy of a functional, channels-last model with batch normalization folded.

    A BatchNormalization over channels is folded if its input is a linear convolution or dense layer
    that nothing else uses; `kept` names a layer whose output is used too. It becomes an Identity, so
    that all layers keep their names. The copy computes `model(..., training=False)` up to rounding,
    in float32 where a mixed policy uses half precision.
    """
    # A plain model: a copy of a compiled one would be compiled too.
    model = keras.Model(model.input, model.output, name=model.name)
    normalized = _foldable(model, kept)
    norms = {norm.name for norm in normalized.values()}

    def clone(layer):
        if layer.name in norms:
            return keras.layers.Identity(name=layer.name, dtype=_precision(layer))
        config = layer.get_config()
        # An input keeps the images' dtype; operations that are not layers have none.
        if "dtype" in config and not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = _precision(layer)
        if layer.name in normalized:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer, *args, **kwargs):
        # Identity does not take the mask argument of the normalization's call.
        return layer(args[0]) if layer.name in norms else layer(*args, **kwargs)

    folded = keras.models.clone_model(model, clone_function=clone, call_function=call)
    for layer in model.layers:
        copy = folded.get_layer(layer.name)
        if layer.name in normalized:
            copy.set_weights(_weights(layer, normalized[layer.name]))
        elif layer.name not in norms:
            copy.set_weights(layer.get_weights())
    return folded


def function(model: keras.Model) -> tf.Module:
    """Returns a module whose `classify` is the folded model as one TensorFlow function.

    `images` uint8 [N, H, W, 3] -> `probabilities` float32 [N, K], `label_index` int64 [N].
    """
    folded = fold(model)
    pixels = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="images")

    @tf.function(input_signature=[pixels], autograph=False)
    def classify(images):
        probabilities = tf.cast(folded(images, training=False), tf.float32)
        return {"probabilities": probabilities, "label_index": tf.argmax(probabilities, axis=1)}

    module = tf.Module()
    # tf.Module does not find Keras's variables; these are the TensorFlow variables inside them.
    module.weights = [v.value for v in folded.weights]
    module.classify = classify
    return module


def _precision(layer: keras.Layer):
    """The dtype policy of a layer's copy: half precision may be slow on other machines."""
    return "float32" if layer.compute_dtype in ("float16", "bfloat16") else layer.dtype_policy


def _foldable(model: keras.Model, kept: str | None) -> dict[str, keras.Layer]:
    """The normalization that can be folded into each layer, by the layer's name."""
    # The config has the calls within this model alone; the layers' nodes include other models.
    config = model.get_config()
    calls = {entry["name"]: entry["inbound_nodes"] for entry in config["layers"]}
    sources = {name: list(_sources(nodes)) for name, nodes in calls.items()}
    uses = collections.Counter(itertools.chain(*sources.values()))
    uses.update(x for x in keras.tree.flatten(config["output_layers"]) if isinstance(x, str))
    layers = {layer.name: layer for layer in model.layers}
    found = {}
    for norm in model.layers:
        if not isinstance(norm, keras.layers.BatchNormalization) or len(calls[norm.name]) != 1:
            continue
        source, axes = sources[norm.name][0], (-1, len(norm.output.shape) - 1)
        layer = layers.get(source)  # None is an operation that is not a layer
        if (
            isinstance(layer, FOLDABLE)
            and source != kept
            and layer.activation is keras.activations.linear
            and uses[source] == len(calls[source]) == 1
            and norm.axis in axes
            and not calls[norm.name][0]["kwargs"].get("training")
        ):
            found[source] = norm
    return found


def _sources(stored) -> Iterator[str]:
    """The names of the layers whose outputs are among the stored arguments of calls."""
    if isinstance(stored, dict):
        if "keras_history" in stored:
            yield stored["keras_history"][0]
        stored = list(stored.values())
    if isinstance(stored, (list, tuple)):
        for item in stored:
            yield from _sources(item)


def _weights(layer: keras.Layer, norm: keras.Layer) -> list[np.ndarray]:
    """The kernels and the bias with which a layer computes `norm(layer(x))`."""
    weights = [np.asarray(v, np.float64) for v in layer.get_weights()]
    bias = weights.pop() if layer.use_bias else 0.0
    *others, kernel = weights  # A separable convolution has a depthwise one before.
    scale = 1 / np.sqrt(np.asarray(norm.moving_variance, np.float64) + norm.epsilon)
    if norm.scale:
        scale *= np.asarray(norm.gamma, np.float64)
    offset = (bias - np.asarray(norm.moving_mean, np.float64)) * scale
    if norm.center:
        offset += np.asarray(norm.beta, np.float64)
    # The channels of the output are the last axis of a kernel; of a depthwise one the last two.
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    scale = scale.reshape(kernel.shape[2:]) if depthwise else scale
    return [*others, kernel * scale, offset]
