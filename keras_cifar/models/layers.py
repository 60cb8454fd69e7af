"""Blocks that several families share: pure `x -> x` functions with predictable layer names."""

import math

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.core import environment
from keras_cifar.distributed.sharding import replicas
from keras_cifar.models.batch_norm import BatchNormalization

# Added to the variances of the patches' components, as a share of the pixels' variance, so that
# whitening does not amplify noise: Jordan 2024, arXiv:2404.00498, whose pixels have a variance of 1.
WHITENING_EPSILON = 5e-4

# Pixels of a row to which `Convolution` puts images side by side. It does so on any CPU, and with AMX,
# for images of so many pixels at most that have so many channels for each pixel of width. The flags of
# the CPU decide, not a measurement, so that a run has the same bits when it resumes.
ROW = 64
NARROW, NARROW_AMX = (2, 128), (8, 32)


@keras.saving.register_keras_serializable("keras_cifar")
class Dropout(keras.layers.Dropout):
    """Keras's Dropout in half the time on a CPU (Srivastava et al. 2014, JMLR 15).

    Most of the time goes into random numbers. This layer draws 8 bits an element, and Keras 32. Each
    call rounds the threshold, 256 times the rate, up or down at random, so that the probability to
    drop an element is exactly the rate. Each replica draws its own mask, of `noise_shape` if given.
    """

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        if self.rate == 1:
            return super().call(inputs, training=training)
        seed = tf.cast(self.seed_generator.next(), tf.int32)
        context = tf.distribute.get_replica_context()
        if replicas() > 1 and context is not None:
            index = context.replica_id_in_sync_group
            seed = tf.random.experimental.stateless_fold_in(seed, index)
        shape, channels = tf.shape(inputs), inputs.shape[-1]
        if self.noise_shape is not None:  # None in it is the size of the inputs
            shape = tf.stack([size or shape[axis] for axis, size in enumerate(self.noise_shape)])
            channels = self.noise_shape[-1] or channels
        if channels is None or channels % 4 or self.rate >= 255 / 256:
            kept = tf.random.stateless_uniform(shape, seed) >= self.rate
        else:
            quarter = tf.concat([shape[:-1], [channels // 4]], 0)
            words = tf.random.stateless_uniform(quarter, seed, None, None, tf.int32)
            seed = tf.random.experimental.stateless_fold_in(seed, 1)
            dither = tf.random.stateless_uniform([], seed)
            threshold = tf.cast(256 * self.rate + dither, tf.uint8)
            kept = tf.reshape(tf.bitcast(words, tf.uint8), shape) >= threshold
        return inputs * (tf.cast(kept, inputs.dtype) * (1 / (1 - self.rate)))


def check_for_replicas(model: keras.Model) -> None:
    """Raises ValueError for a layer of Keras that several replicas would compute wrongly.

    Relatives of dropout would draw the same mask on each replica, and normalization would weigh
    unequal shards of a batch equally.
    """
    names = ("BatchNormalization", "Dropout", "AlphaDropout", "GaussianDropout", "GaussianNoise")
    wrong = tuple(getattr(keras.layers, name) for name in names)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            check_for_replicas(layer)
        elif isinstance(layer, wrong) and not isinstance(layer, (BatchNormalization, Dropout)):
            raise ValueError(
                f"layer {layer.name!r}: keras.layers.{type(layer).__name__} is not right under "
                "several replicas; use those of keras_cifar.models.layers"
            )


def conv(
    x,
    filters: int,
    size: int,
    stride: int = 1,
    *,
    name: str,
    padding="same",
    bias=True,
    initializer="he_normal",
    layer=None,
):
    """Convolution with He et al.'s initial weights (2015, arXiv:1502.01852).

    With a stride, "same" pads both sides equally, as the papers' frameworks do; Keras's padding
    depends on the parity of the input. `layer` is a class, by default as `bias` needs it.
    """
    layer = layer or (ConvWithBias if bias else Convolution)
    if padding == "same" and stride > 1:
        x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x) if size > 1 else x
        padding = "valid"
    options = {"use_bias": bias, "kernel_initializer": initializer, "name": name}
    return layer(filters, size, stride, padding, **options)(x)


def variable_dtype() -> str:
    """The type for what half precision would spoil, at the ends of a network: that of the weights."""
    return keras.config.dtype_policy().variable_dtype


def logits(x, num_classes: int, *, name: str = "logits", **options):
    """The last layer of a network, not in half precision, where logits of several classes are equal."""
    return keras.layers.Dense(num_classes, dtype=variable_dtype(), name=name, **options)(x)


@keras.saving.register_keras_serializable("keras_cifar")
class Convolution(keras.layers.Conv2D):
    """Keras's Conv2D, which trains faster on narrow images on a CPU.

    oneDNN computes the pixels of a row together, with AMX 16 of them, so that on rows of a few pixels
    most of its work is lost. In training narrow images are put side by side, with the padding between
    them. Forward and both gradients then take so much of the time (batches of 128, as many channels as
    filters, of 3 x 3; 2 cores of an Intel Xeon):

    | pixels, filters | bfloat16, AMX | bfloat16, AVX-512 | float32, AVX-512 | float32, AVX2 |
    |---|---|---|---|---|
    | 8 x 8, 64 | 1.07 | 1.12 | 1.24 | 1.24 |
    | 8 x 8, 256 | 0.81 | 1.06 | 1.17 | 1.47 |
    | 4 x 4, 512 | 0.29 | 1.01 | 0.75 | 1.16 |
    | 2 x 2, 64 | 0.85 | 1.10 | 1.22 | 1.00 |
    | 2 x 2, 512 | 0.13 | 0.56 | 0.32 | 0.62 |
    """

    def call(self, inputs, training=False):
        return self.activation(self.add_bias(self.convolve(inputs, training)))

    def add_bias(self, outputs):
        return tf.nn.bias_add(outputs, self.bias.value) if self.use_bias else outputs

    def convolve(self, inputs, training: bool):
        """The convolution of inputs [B, H, W, C] alone."""
        count = self._count_in_row(inputs) if training else 1
        if count == 1:
            return self.convolution_op(inputs, self.kernel)
        # [B, H, W, C] -> [B / count, H, count * (W + gap), C] and back
        height, width, channels = inputs.shape[1:]
        gap = self.kernel_size[1] // 2
        x = tf.transpose(tf.reshape(inputs, (-1, count, height, width, channels)), (0, 2, 1, 3, 4))
        x = tf.pad(x, [[0, 0], [0, 0], [0, 0], [0, gap], [0, 0]])
        x = tf.reshape(x, (-1, height, count * (width + gap), channels))
        x = self.convolution_op(x, self.kernel)
        x = tf.reshape(x, (-1, height, count, width + gap, self.filters))
        # The gradient of x[..., :width, :] would take ten times as long as that of tf.slice.
        x = tf.slice(x, [0] * 5, [-1, -1, -1, width, -1])
        return tf.reshape(tf.transpose(x, (0, 2, 1, 3, 4)), (-1, height, width, self.filters))

    def _count_in_row(self, inputs) -> int:
        """How many images to put side by side."""
        steps = {*self.strides, *self.dilation_rate, self.groups}
        usual = self.padding == "same" and self.data_format == "channels_last" and steps == {1}
        # Even filters have unequal padding, and those of one pixel are a matrix multiplication.
        is_odd = all(size % 2 for size in self.kernel_size) and self.kernel_size[1] > 1
        if not usual or not is_odd or None in inputs.shape:
            return 1
        size, _, width, channels = inputs.shape
        has_amx = inputs.dtype == tf.bfloat16 and environment.cpu_has("amx_bf16")
        widest, least = NARROW_AMX if has_amx else NARROW
        is_deep = min(channels, self.filters) >= least * width
        if width > widest or not is_deep or tf.config.list_physical_devices("GPU"):
            return 1
        return math.gcd(size, 2 ** int(math.log2(ROW // width)))


@keras.saving.register_keras_serializable("keras_cifar")
class ConvWithBias(Convolution):
    """With the right gradient of its bias in bfloat16 too.

    TensorFlow's BiasAddGrad adds up in bfloat16 on a CPU, and the sum stops growing: over 128 images of
    16 x 16 pixels it is off by 10 %, over 512 of 31 x 31 by 80 %. ReduceSum adds up in float32.
    """

    def add_bias(self, outputs):
        return add_bias(outputs, self.bias.value)


def add_bias(x, bias):
    """x [..., C] plus bias [C]."""
    if x.dtype != tf.bfloat16:
        return tf.nn.bias_add(x, bias)

    @tf.custom_gradient
    def add(x, bias):
        axes = list(range(len(x.shape) - 1))
        return tf.nn.bias_add(x, bias), lambda upstream: (upstream, tf.reduce_sum(upstream, axes))

    return add(x, bias)


@keras.saving.register_keras_serializable("keras_cifar")
class ConvBeforeNorm(Convolution):
    """A convolution whose bias gets no gradient, since batch normalization subtracts it again.

    The exact gradient is 0. A computed one is rounding noise, which Adam turns into full steps, and
    takes a tenth of the time of a step of `vgg_bn_drop`.
    """

    def add_bias(self, outputs):
        return tf.nn.bias_add(outputs, tf.stop_gradient(self.bias.value))


def conv_norm(x, filters: int, size: int, stride: int = 1, *, name: str, relu=True, bias=False):
    """Convolution -> BN -> ReLU (unless `relu` is off), the tutorial's `conv_bn_layer`."""
    # Before BN the scale of the weights only sets how fast their direction changes. Glorot's, half
    # the variance of He's, learns more in one pass (ResNet-32: 0.60 against 0.56 test accuracy).
    layer = ConvBeforeNorm if bias else None
    options = {"bias": bias, "initializer": "glorot_uniform", "layer": layer}
    x = conv(x, filters, size, stride, name=f"{name}_conv", **options)
    x = BatchNormalization(name=f"{name}_bn")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x) if relu else x


def conv_relu(x, filters: int, size: int, stride: int = 1, *, name: str, batch_norm=False):
    """Convolution with a bias (-> BN) -> ReLU."""
    if batch_norm:
        return conv_norm(x, filters, size, stride, name=name, bias=True)
    x = conv(x, filters, size, stride, name=f"{name}_conv")
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def dense_relu(x, units: int, *, name: str, dropout: float = 0.0):
    """Dense -> ReLU -> dropout, as in the heads of AlexNet and VGG."""
    x = keras.layers.Dense(units, "relu", kernel_initializer="he_normal", name=name)(x)
    return Dropout(dropout, name=f"{name}_drop")(x) if dropout else x


@keras.saving.register_keras_serializable("keras_cifar")
class LocalResponseNormalization(keras.layers.Layer):
    """Divides by the activity of neighbouring channels (Krizhevsky et al. 2012, section 3.3).

    The paper's n = 5 is radius 2, and its k is `bias`; alpha is per channel, not of the sum.
    """

    def __init__(self, radius=2, bias=2.0, alpha=1e-4, beta=0.75, **kwargs):
        super().__init__(**kwargs)
        self.radius, self.bias, self.alpha, self.beta = radius, bias, alpha, beta

    def call(self, x):
        # The op has kernels for float32 and, on GPUs, for float16.
        y = tf.cast(x, tf.float32)
        y = tf.nn.local_response_normalization(y, self.radius, self.bias, self.alpha, self.beta)
        return tf.cast(y, x.dtype)


@keras.saving.register_keras_serializable("keras_cifar")
class Whitening(keras.layers.Conv2D):
    """A convolution that whitens patches; its filters are computed from images and not trained.

    The filters are the principal components of the patches, each scaled to a variance of 1, and
    their negatives, since a nonlinearity follows; the bias is trained. Page 2019, "How to train your
    ResNet 8: bag of tricks"; Jordan 2024, arXiv:2404.00498, section 3.2. Before `adapt` the filters
    are random. `size` is the side of the patches, in pixels.
    """

    def __init__(self, size=2, **kwargs):
        # As many components as a patch of three channels has values.
        own = {"filters": 6 * size**2, "kernel_size": size}
        super().__init__(**own | {k: v for k, v in kwargs.items() if k not in own})
        self.size = size

    def build(self, input_shape):
        super().build(input_shape)
        self.kernel.trainable = False

    def adapt(self, inputs: np.ndarray) -> None:
        """Computes the filters from inputs of the layer, float [N, H, W, 3], some thousand images."""
        covariance, count = 0.0, 0
        for image in inputs.astype(np.float64):  # one by one, to save memory
            size = (self.size, self.size)
            windows = np.lib.stride_tricks.sliding_window_view(image, size, (0, 1))
            # Rows, columns, channels, as in the kernel.
            patches = windows.transpose(0, 1, 3, 4, 2).reshape(-1, self.filters // 2)
            covariance, count = covariance + patches.T @ patches, count + len(patches)
        variances, components = np.linalg.eigh(covariance / count)
        filters = components / np.sqrt(variances + WHITENING_EPSILON * variances.mean())
        filters = np.concatenate([filters, -filters], axis=1)
        self.kernel.assign(filters.reshape(self.kernel.shape))

    def get_config(self):
        return super().get_config() | {"size": self.size}


@keras.saving.register_keras_serializable("keras_cifar")
class SigmoidGelu(keras.layers.Layer):
    """x sigmoid(1.702 x), the approximation of GELU in Hendrycks and Gimpel 2016, arXiv:1606.08415.

    With it, a step of airbench94 takes a tenth less time on a CPU than with the exact form, which
    TensorFlow cannot export to ONNX.
    """

    def call(self, inputs):
        # On a CPU the kernels of bfloat16 take 2.5 times as long as both casts and those of float32.
        dtype = tf.float32 if inputs.dtype in (tf.float16, tf.bfloat16) else inputs.dtype
        return tf.cast(tf.nn.silu(tf.cast(inputs, dtype), 1.702), inputs.dtype)


@keras.saving.register_keras_serializable("keras_cifar")
class IdentityPlus(keras.initializers.Initializer):
    """Initializes convolutions: the first filters copy the input's channels, the others are random.

    The random filters are uniform with a variance of a third of 1 / fan-in, PyTorch's default, as in
    Jordan 2024, arXiv:2404.00498, section 3.3.
    """

    def __init__(self, seed=None):
        self.seed = seed

    def __call__(self, shape, dtype=None):
        uniform = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", self.seed)
        kernel = np.array(uniform(shape, dtype))
        height, width, channels, filters = shape
        passed = min(channels, filters)
        kernel[..., :passed] = 0
        kernel[height // 2, width // 2, range(passed), range(passed)] = 1
        return keras.ops.convert_to_tensor(kernel, dtype)

    def get_config(self):
        return {"seed": self.seed}


class _Views(keras.layers.Layer):
    """What AddMirrored and MeanOfMirrored have in common.

    Args:
        shift: pixels by which two more views are moved along the diagonal, up and down; 0 for none.
    """

    def __init__(self, shift=0, **kwargs):
        super().__init__(**kwargs)
        self.shift = shift

    def get_config(self):
        return super().get_config() | {"shift": self.shift}


@keras.saving.register_keras_serializable("keras_cifar")
class AddMirrored(_Views):
    """Outside of training, appends the images mirrored left to right: [N, ...] -> [2N, ...].

    The layers up to `MeanOfMirrored` then compute an image and its mirror image. Their mean is more
    accurate (Krizhevsky et al. 2012, section 4.1), at twice the work. With `shift` there are six views,
    [6N, ...], as in Jordan 2024, arXiv:2404.00498, section 3.5, at six times the work.
    """

    def call(self, inputs, training=False):
        if training:
            return inputs
        views, shift = [inputs], self.shift
        if shift:
            edges = [[0, 0], [shift, shift], [shift, shift], [0, 0]]
            padded = tf.pad(inputs, edges, "REFLECT")
            views += [padded[:, : -2 * shift, : -2 * shift], padded[:, 2 * shift :, 2 * shift :]]
        return tf.concat(views + [view[:, :, ::-1] for view in views], axis=0)


@keras.saving.register_keras_serializable("keras_cifar")
class MeanOfMirrored(_Views):
    """Outside of training, averages the views that `AddMirrored` made: [2N, D] or [6N, D] -> [N, D].

    The image and its mirror image weigh a quarter each where there are shifted views.
    """

    def call(self, inputs, training=False):
        if training:
            return inputs
        if not self.shift:
            return tf.add_n(tf.split(inputs, 2)) / 2
        own, up, down = tf.split(tf.add_n(tf.split(inputs, 2)), 3)
        return own / 4 + (up + down) / 8
