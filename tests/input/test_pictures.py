"""Files of every format and mode are decoded alike, for models of grey and of colours."""

import io
import struct

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from trainers.input import image_files
from trainers.input.pictures import Pictures

# Smooth, so that a JPEG is close; 16 levels, so that a palette is exact.
_GREY = (np.add.outer(np.arange(24), np.arange(32)) // 4 * 16 % 256).astype(np.uint8)
_COLOURS = np.stack([np.full_like(_GREY, 200), _GREY, np.full_like(_GREY, 40)], axis=-1)


def modes():
    """Each way to write an image: name → (format, image, arguments of `save`)."""
    grey, colours = PIL.Image.fromarray(_GREY), PIL.Image.fromarray(_COLOURS)
    clear = colours.convert("RGBA")
    clear.putalpha(PIL.Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (24, 1))))
    turned = colours.rotate(180)
    film, exact = {"save_all": True, "append_images": [turned]}, {"lossless": True, "exact": True}
    return {
        "PNG": ("PNG", colours, {}),
        "PNG of grey": ("PNG", grey, {}),
        "PNG with transparency": ("PNG", clear, {}),
        "PNG of grey with transparency": ("PNG", grey.convert("LA"), {}),
        "PNG with a palette": ("PNG", colours.quantize(64), {}),
        "JPEG": ("JPEG", colours, {"quality": 100, "subsampling": 0}),
        "JPEG of grey": ("JPEG", grey, {"quality": 100}),
        "JPEG of print": ("JPEG", colours.convert("CMYK"), {"quality": 100, "subsampling": 0}),
        "GIF": ("GIF", colours.quantize(64), {}),
        "GIF of grey": ("GIF", grey, {}),
        "GIF that moves": ("GIF", colours.quantize(64), film | {"append_images": [turned.quantize(64)]}),
        "BMP": ("BMP", colours, {}),
        "BMP of grey": ("BMP", grey, {}),
        "BMP with a fourth channel": ("BMP", clear, {}),
        "WEBP": ("WEBP", colours, exact),
        "WEBP of grey": ("WEBP", grey.convert("RGB"), exact),
        "WEBP with transparency": ("WEBP", clear, exact),
        "WEBP that moves": ("WEBP", colours, exact | film),
    }


def encoded(kind, image, arguments):
    held = io.BytesIO()
    image.save(held, format=kind, **arguments)
    return held.getvalue()


@pytest.fixture(scope="module")
def decoders():
    """The function of an export or a data set: one graph for all formats."""
    return {
        channels: tf.function(
            lambda content, turned, channels=channels: Pictures((24, 32), channels, True).decode(content, turned, None),
            input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)],
        )
        for channels in (1, 3)
    }


@pytest.mark.parametrize("name", modes())
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", [1, 3])
def test_every_format_is_decoded_in_grey_and_in_colours(decoders, tmp_path, name, channels, orientation):
    content = encoded(*modes()[name])
    (tmp_path / "image").write_bytes(content)
    assert image_files.header(tmp_path / "image") == (24, 32, 1)
    pixels = decoders[channels](content, orientation).numpy()
    wanted = np.stack([_GREY] * 3, axis=-1) if "grey" in name else _COLOURS
    if channels == 1:
        wanted = np.round(wanted @ [0.299, 0.587, 0.114])[..., None] if "grey" not in name else _GREY[..., None]
    if orientation == 3:
        wanted = wanted[::-1, ::-1]
    allowed = 0 if "grey" in name and "JPEG" not in name else 12 if name == "JPEG of print" else 8
    assert np.abs(pixels.astype(int) - wanted).max() <= allowed


@pytest.mark.parametrize("mode", ["P", "1"])
def test_a_bmp_with_a_palette_is_refused_where_its_indices_would_be_taken_for_grey(tmp_path, mode):
    image = PIL.Image.fromarray(_COLOURS)
    image = image.quantize(64) if mode == "P" else image.convert("1")
    image.save(tmp_path / "a.bmp")
    assert "a BMP of indices into a palette" in image_files.header(tmp_path / "a.bmp")


def test_no_image_is_too_large_for_its_header_to_be_read(tmp_path):
    header = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "large.bmp").write_bytes(header)
    assert image_files.header(tmp_path / "large.bmp") == (20_000, 30_000, 1)
