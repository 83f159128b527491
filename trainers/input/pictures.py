"""Encoded images → pixels of one size: which part is taken, and how it is read and resized."""

import dataclasses

import tensorflow as tf

from trainers.input.records import Crop, everything

# Evaluation takes the central square of this share of the shorter side. Source: Szegedy et al., 2015, and the recipes
# of TensorFlow's Model Garden: 224 of 256.
CENTRAL = 7 / 8
# Scales at which a JPEG can be decoded for less work; the smallest image that is still large enough is taken.
_JPEG_SCALES = (1, 2, 4, 8)
# Beyond this, what is made smaller is averaged first.
_MOST_PLAIN_SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Pictures:
    """How the images of a data set become pixels.

    `size`, `channels`: of what models see. `whole`: evaluation takes the whole image, since all are of one shape that
    fits; else the central square.
    """

    size: tuple[int, int]
    channels: int
    whole: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a decoded image: height, width, channels."""
        return (*self.size, self.channels)

    def decode(self, encoded: tf.Tensor, orientation: tf.Tensor | None, crop: Crop | None) -> tf.Tensor:
        """The pixels of an image, uint8 of `shape`. Bilinear, with half-pixel centres.

        `encoded`: the bytes of a file. `orientation`: as EXIF has it, 1 to 8; None = 1. `crop`: which part of the image
        is taken; None = that of evaluation.
        """
        crop = crop or self.evaluation_crop
        is_jpeg = tf.io.is_jpeg(encoded)
        if self.channels == 1:
            is_jpeg &= self._decodes_as_grey(encoded)
        if orientation is not None:
            is_jpeg &= orientation == 1
        image = tf.cond(
            is_jpeg, lambda: self._from_jpeg(encoded, crop), lambda: self._from_any(encoded, orientation, crop)
        )
        return tf.ensure_shape(image, self.shape)

    def evaluation_crop(self, shape: tf.Tensor) -> tf.Tensor:
        """All of an image, or the largest centred crop of the aspect of `size` that `CENTRAL` of it allows."""
        if self.whole:
            return everything(shape)
        height, width = self.size
        room = tf.cast(shape, tf.float64) * CENTRAL
        scale = tf.minimum(room[0] / height, room[1] / width)
        extent = tf.cast(tf.maximum(tf.round(scale * tf.constant([height, width], tf.float64)), 1), tf.int32)
        return tf.concat([(shape - extent) // 2, extent], axis=0)

    def _from_jpeg(self, encoded: tf.Tensor, crop: Crop) -> tf.Tensor:
        """Decodes no more than the crop, at the smallest scale that is large enough."""
        window = crop(tf.image.extract_jpeg_shape(encoded)[:2])
        room = tf.reduce_min(tf.cast(window[2:], tf.float32) / tf.constant(self.size, tf.float32))
        number = tf.add_n([tf.cast(room >= scale, tf.int32) for scale in _JPEG_SCALES[1:]])

        def decoded(scale: int) -> tf.Tensor:
            return tf.raw_ops.DecodeAndCropJpeg(
                contents=encoded,
                crop_window=window // scale,
                channels=self.channels,
                ratio=scale,
                fancy_upscaling=False,
                dct_method="INTEGER_FAST",
            )

        return self._resized(
            tf.switch_case(number, [lambda scale=scale: decoded(scale) for scale in _JPEG_SCALES])[None], averaged=False
        )[0]

    def _from_any(self, encoded: tf.Tensor, orientation: tf.Tensor | None, crop: Crop) -> tf.Tensor:
        """Decodes the whole image; of an animation the first frame."""
        is_webp = (tf.strings.substr(encoded, 0, 4) == "RIFF") & (tf.strings.substr(encoded, 8, 4) == "WEBP")
        image = tf.cond(is_webp, lambda: self._from_webp(encoded), lambda: self._from_common(encoded))
        if orientation is not None:
            image = upright(image, orientation)
        return self.cut(image, crop)

    def cut(self, image: tf.Tensor, crop: Crop) -> tf.Tensor:
        """A crop of decoded pixels, uint8 `[height, width, channels]`, in `size`."""
        return self.cut_all(image[None], crop)[0]

    def cut_all(self, images: tf.Tensor, crop: Crop) -> tf.Tensor:
        """As `cut`, of images of one size: uint8 `[batch, height, width, channels]`."""
        top, left, height, width = tf.unstack(crop(tf.shape(images)[1:3]), num=4)
        return self._resized(tf.slice(images, [0, top, left, 0], [-1, height, width, -1]), averaged=True)

    def _from_common(self, encoded: tf.Tensor) -> tf.Tensor:
        def decoded(channels: int) -> tf.Tensor:
            return tf.io.decode_image(encoded, channels=channels, expand_animations=False)

        if self.channels != 1:
            return decoded(self.channels)
        return tf.cond(
            self._decodes_as_grey(encoded), lambda: decoded(1), lambda: tf.image.rgb_to_grayscale(decoded(3))
        )

    def _decodes_as_grey(self, encoded: tf.Tensor) -> tf.Tensor:
        """Whether the decoder makes grey of it itself: of PNG, and of JPEG that has no four colours of print."""
        is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
        of_print = tf.cond(
            tf.io.is_jpeg(encoded), lambda: tf.image.extract_jpeg_shape(encoded)[2] == 4, lambda: ~is_png
        )
        return ~of_print

    def _from_webp(self, encoded: tf.Tensor) -> tf.Tensor:
        """The first frame; the transparency that each frame of an animation has is left out, as that of other files."""
        image = tf.image.decode_webp(encoded, channels=0)[0, :, :, : max(self.channels, 3)]
        return image if self.channels != 1 else tf.image.rgb_to_grayscale(tf.ensure_shape(image, [None, None, 3]))

    def _resized(self, images: tf.Tensor, averaged: bool) -> tf.Tensor:
        def bilinear() -> tf.Tensor:
            return tf.raw_ops.ResizeBilinear(images=images, size=self.size, half_pixel_centers=True)

        shape = tf.cast(tf.shape(images)[1:3], tf.float32)
        is_large = tf.reduce_max(shape / tf.constant(self.size, tf.float32)) >= _MOST_PLAIN_SCALE
        if averaged:
            values = tf.cond(is_large, lambda: tf.image.resize(images, self.size, antialias=True), bilinear)
        else:
            values = bilinear()
        return tf.cast(tf.round(values), tf.uint8)


def upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """An image turned as its EXIF orientation (1 to 8) says: `[height, width, channels]`.

    Source: the Exif standard, tag 274: 2 to 4 are reflections and half a turn, 5 to 8 also exchange the axes.
    """
    swapped = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    # After the exchange: which axes run backwards.
    down = tf.reduce_any(orientation == tf.constant([3, 4, 7, 8], orientation.dtype))
    left = tf.reduce_any(orientation == tf.constant([2, 3, 6, 7], orientation.dtype))
    swapped = tf.cond(down, lambda: tf.reverse(swapped, [0]), lambda: swapped)
    return tf.cond(left, lambda: tf.reverse(swapped, [1]), lambda: swapped)
