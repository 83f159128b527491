"""A generator and a critic of images with labels, subclassed.

Sources: the label in the critic: Miyato and Koyama, "cGANs with projection discriminator", ICLR 2018; no batch
normalization there: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, section 4.
"""

from typing import Any

import keras
import tensorflow as tf

register = keras.saving.register_keras_serializable("lockstep")

# Height and width at which the generator begins and the critic ends, or less than twice that.
_SMALLEST = 4
_HE = "he_normal"


def _levels(image_shape: tuple[int, ...]) -> int:
    """How often an image `(height, width, channels)` is halved until it is small.

    Raises:
      ValueError: height or width is not a multiple of 4.
    """
    height, width = image_shape[:2]
    if height % 4 or width % 4:
        raise ValueError(f"images of {height} x {width} pixels: height and width must be multiples of 4")
    levels = 1
    while min(height, width) >> levels > _SMALLEST and not (height >> levels) % 2 and not (width >> levels) % 2:
        levels += 1
    return levels


def _leaky(x: tf.Tensor) -> tf.Tensor:
    """Leaky ReLU. Its own operation makes TensorFlow's optimizer of graphs print an error at a second derivative."""
    return tf.maximum(x, 0.2 * x)


@register
class Generator(keras.Model):
    """`(noise [batch, latent], labels [batch])` → images in [-1, 1], `[batch, *image_shape]`, float32.

    Noise and an embedding of the label give a small image of many channels, which transposed convolutions double until
    it has the size of `image_shape`, `(height, width, channels)`. `width`: channels at the full size; each level below
    has twice as many. Nothing in it depends on the other examples of a batch.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_classes: int,
        latent: int = 64,
        width: int = 32,
        name: str = "generator",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.image_shape, self.num_classes, self.latent, self.width = tuple(image_shape), num_classes, latent, width
        levels = _levels(self.image_shape)
        height, row, channels = self.image_shape
        self.small = (height >> levels, row >> levels, width << levels)
        self.embedding = keras.layers.Embedding(num_classes, latent, "random_normal", name="label")
        self.project = keras.layers.Dense(
            self.small[0] * self.small[1] * self.small[2], kernel_initializer=_HE, name="project"
        )
        self.doubling = [
            keras.layers.Conv2DTranspose(
                width << (levels - i), 4, 2, "same", activation="relu", kernel_initializer=_HE, name=f"double_{i}"
            )
            for i in range(1, levels + 1)
        ]
        self.image = keras.layers.Conv2D(channels, 3, 1, "same", name="image", dtype="float32")

    def inputs_spec(self, batch: int | None = None) -> tuple[tf.TensorSpec, tf.TensorSpec]:
        """What `call` takes."""
        return tf.TensorSpec([batch, self.latent], name="noise"), tf.TensorSpec([batch], tf.int64, "labels")

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False) -> tf.Tensor:
        noise, labels = inputs
        x = self.project(tf.concat([tf.cast(noise, self.compute_dtype), self.embedding(labels)], axis=1))
        x = tf.reshape(tf.nn.relu(x), [-1, *self.small])
        for convolution in self.doubling:
            x = convolution(x)
        return tf.tanh(self.image(x))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "image_shape": self.image_shape,
            "num_classes": self.num_classes,
            "latent": self.latent,
            "width": self.width,
        }


@register
class Critic(keras.Model):
    """`(images [batch, *image_shape], labels [batch])` → a score of each, `[batch]`, float32: higher for real ones.

    Strided convolutions halve the image until it is small. The score is a linear function of their features plus the
    inner product with a vector of the label. `width`: channels after the first convolution; each level has twice as
    many. No batch normalization: the gradient penalty is that of each example on its own.
    """

    def __init__(
        self, image_shape: tuple[int, ...], num_classes: int, width: int = 32, name: str = "critic", **kwargs: Any
    ):
        super().__init__(name=name, **kwargs)
        self.image_shape, self.num_classes, self.width = tuple(image_shape), num_classes, width
        levels = _levels(self.image_shape)
        self.first = keras.layers.Conv2D(width, 3, 1, "same", kernel_initializer=_HE, name="first")
        self.halving = [
            keras.layers.Conv2D(width << i, 4, 2, "same", kernel_initializer=_HE, name=f"halve_{i}")
            for i in range(1, levels + 1)
        ]
        self.flatten = keras.layers.Flatten(name="flatten")
        self.features = keras.layers.Dense(width << levels, kernel_initializer=_HE, name="features")
        self.embedding = keras.layers.Embedding(
            num_classes, width << levels, "random_normal", name="label", dtype="float32"
        )
        self.score = keras.layers.Dense(1, name="score", dtype="float32")

    def inputs_spec(self, batch: int | None = None) -> tuple[tf.TensorSpec, tf.TensorSpec]:
        """What `call` takes."""
        return tf.TensorSpec([batch, *self.image_shape], name="images"), tf.TensorSpec([batch], tf.int64, "labels")

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False) -> tf.Tensor:
        images, labels = inputs
        x = images
        for layer in (self.first, *self.halving):
            x = _leaky(layer(x))
        x = tf.cast(_leaky(self.features(self.flatten(x))), tf.float32)
        return self.score(x)[:, 0] + tf.reduce_sum(x * self.embedding(labels), axis=1)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "image_shape": self.image_shape,
            "num_classes": self.num_classes,
            "width": self.width,
        }


def slope_norms(critic: keras.Model, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The norm of the critic's gradient by each image, in training: `[batch]`. It can be differentiated itself."""
    with tf.GradientTape() as tape:
        tape.watch(images)
        scores = critic((images, labels), training=True)
    squares = tf.reduce_sum(tf.square(tape.gradient(scores, images)), axis=[1, 2, 3])
    return tf.sqrt(squares + 1e-12)  # the root has no slope at 0
