"""Blocks that several families share: pure `x -> x` functions with predictable layer names."""

import keras
import tensorflow as tf

# The defaults of the chapter's framework and of PyTorch (whose momentum 0.1 is 1 - ours). Keras's
# own, 0.99 and 1e-3, leave the moving statistics far behind in short runs: one pass of ResNet-32
# over CIFAR-10 was 0.354 against 0.564 in test accuracy.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


def batch_norm(name: str) -> keras.layers.Layer:
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167), over all replicas together."""
    return keras.layers.BatchNormalization(
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=BATCH_NORM_EPSILON,
        synchronized=tf.distribute.get_strategy().num_replicas_in_sync > 1,
        name=name,
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
):
    """Convolution alone, with He et al.'s initial weights (2015, arXiv:1502.01852).

    With a stride, "same" pads both sides alike, as the papers' frameworks do; Keras's own padding
    depends on the parity of the input.
    """
    if padding == "same" and stride > 1:
        x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x) if size > 1 else x
        padding = "valid"
    return keras.layers.Conv2D(
        filters,
        size,
        stride,
        padding,
        use_bias=bias,
        kernel_initializer=initializer,
        name=name,
    )(x)


def conv_norm(x, filters: int, size: int, stride: int = 1, *, name: str, relu=True, bias=False):
    """Convolution -> BN -> ReLU (unless `relu` is off), the chapter's `conv_bn_layer`."""
    # Before BN the size of the weights only sets how fast they turn: Glorot's, half the variance of
    # He's, learn more in a first pass (0.60 against 0.56 in test accuracy with ResNet-32).
    x = conv(
        x,
        filters,
        size,
        stride,
        name=f"{name}_conv",
        bias=bias,
        initializer="glorot_uniform",
    )
    x = batch_norm(f"{name}_bn")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x) if relu else x


def dense_relu(x, units: int, *, name: str, dropout: float = 0.0):
    """Dense -> ReLU -> dropout, as in the heads of AlexNet and VGG."""
    x = keras.layers.Dense(units, "relu", kernel_initializer="he_normal", name=name)(x)
    return keras.layers.Dropout(dropout, name=f"{name}_drop")(x) if dropout else x


def max_pool(x, size: int, stride: int, *, name: str, padding: str = "valid"):
    """Max pooling."""
    return keras.layers.MaxPooling2D(size, stride, padding, name=name)(x)


@keras.saving.register_keras_serializable("keras_cifar")
class LocalResponseNormalization(keras.layers.Layer):
    """Divides by the activity of neighbouring channels (Krizhevsky et al. 2012, section 3.3).

    Args:
        radius: channels on each side (the paper's n = 5 is radius 2).
        bias, alpha, beta: the paper's k, alpha and beta; alpha is for each channel, not for the sum.
    """

    def __init__(self, radius=2, bias=2.0, alpha=1e-4, beta=0.75, **kwargs):
        super().__init__(**kwargs)
        self.radius, self.bias, self.alpha, self.beta = radius, bias, alpha, beta

    def call(self, x):
        # The op has kernels for half precision and float32 only.
        y = tf.cast(x, tf.float32) if x.dtype == tf.float64 else x
        y = tf.nn.local_response_normalization(y, self.radius, self.bias, self.alpha, self.beta)
        return tf.cast(y, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {"radius": self.radius, "bias": self.bias, "alpha": self.alpha, "beta": self.beta}
        return super().get_config() | own
