"""What a model does, drawn for TensorBoard: confusion matrices, worst examples, masks, predicted over true values."""

import colorsys
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.tasks import Predictions
from trainers.settings.exit_codes import BadConfiguration
from trainers.show.summaries import Summaries

# How many of the worst examples are shown.
WORST = 16
# Classes up to which a matrix and curves are legible.
MOST_CLASSES = 30
_INK, _PAPER, _BLUE = (30, 30, 30), (255, 255, 255), (31, 99, 180)


def show_samples(summaries: Summaries, step: int, images: np.ndarray) -> None:
    """Writes a sheet of generated images `[classes, n, height, width, 1 or 3]` in [-1, 1] to `eval/`."""
    if not summaries.silent:
        _write(summaries, step, "samples", rows(images), "what is generated; a row for each class, by its number")


def _write(summaries: Summaries, step: int, tag: str, image: Image.Image, description: str) -> None:
    held = io.BytesIO()
    image.save(held, "PNG")
    summaries.image("eval", step, tag, held.getvalue(), image.size, description)


def _first(outputs: Any) -> np.ndarray:
    """The prediction, where a model has several outputs."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def show_classes(summaries: Summaries, step: int, predictions: Predictions) -> None:
    """Logits `[n, classes]` of labels `[n]`: a confusion matrix, curves, and of images those with the largest loss."""
    inputs, targets, outputs, losses = predictions
    outputs = _first(outputs)
    num_classes = outputs.shape[-1]
    said = outputs.argmax(axis=1)
    if num_classes <= MOST_CLASSES:
        counts = np.zeros([num_classes, num_classes], np.int64)
        np.add.at(counts, (targets, said), 1)
        _write(
            summaries, step, "confusion_matrix", matrix(counts), "rows: the true class; columns: what the model says"
        )
        scores = keras.ops.convert_to_numpy(keras.ops.softmax(outputs))
        for label in range(num_classes):
            summaries.pr_curve("eval", step, f"precision_recall/{label}", targets == label, scores[:, label])
    if inputs.ndim == 4 and inputs.shape[-1] in (1, 3):
        worst = np.argsort(-losses)[:WORST]
        captions = [f"is {targets[i]}, said {said[i]}\nloss {losses[i]:.3g}" for i in worst]
        _write(
            summaries, step, "worst_examples", sheet(inputs[worst], captions), "the largest losses of the evaluation"
        )


def show_numbers(summaries: Summaries, step: int, predictions: Predictions) -> None:
    """Outputs over targets, `[n, …]` both."""
    description = "each point an example, in standard deviations of the target"
    drawing = scatter(predictions.targets, _first(predictions.outputs))
    _write(summaries, step, "predicted_over_true", drawing, description)


def show_masks(summaries: Summaries, step: int, predictions: Predictions) -> None:
    """Logits `[n, height, width, classes]` of a label for each pixel: the images with the largest loss."""
    inputs, targets, outputs, losses = predictions
    outputs = _first(outputs)
    worst = np.argsort(-losses, kind="stable")[:WORST]
    said = outputs[worst].argmax(axis=-1)
    drawing = masks(inputs[worst], targets[worst], said, outputs.shape[-1], [f"loss {losses[i]:.3g}" for i in worst])
    _write(summaries, step, "worst_examples", drawing, "image, true labels, what the model says; the largest losses")


def of_own(function: Callable[[Predictions], Mapping[str, Any]]) -> Callable[[Summaries, int, Predictions], None]:
    """A function of the user's own as one of `KINDS`.

    Raises, when it is called:
      BadConfiguration: what the function returns is no picture.
    """

    def show(summaries: Summaries, step: int, predictions: Predictions) -> None:
        pictures = function(predictions)
        if not isinstance(pictures, Mapping):
            raise BadConfiguration(f"the Task's pictures return {pictures!r:.80}; return a dictionary of pictures")
        for name, picture in pictures.items():
            _write(summaries, step, str(name), _image(name, picture), "drawn by the model's task")

    return show


def _image(name: str, picture: Any) -> Image.Image:
    """A picture of the user's own: bytes of a PNG, or an array `[height, width]` or `[height, width, 1 or 3]`, uint8.

    Raises:
      BadConfiguration: it is neither.
    """
    try:
        if isinstance(picture, bytes):
            return Image.open(io.BytesIO(picture))
        array = np.asarray(picture)
        if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3))):
            return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        what = f"{array.dtype} {array.shape}"
    except (OSError, ValueError) as error:
        what = f"{type(picture).__name__} ({error})"
    raise BadConfiguration(
        f"the picture {name!r} of the Task is {what}; return bytes of a PNG, or a uint8 array [height, width] or "
        "[height, width, 3]"
    )


def show_features(summaries: Summaries, step: int, features: np.ndarray, labels: np.ndarray) -> None:
    """Writes features `[n, width]` of examples with labels `[n]` to `eval/`, in their two main directions."""
    if not summaries.silent:
        description = "each point an example; its color and its number: the true class"
        _write(summaries, step, "features", plane(features, labels), description)


def plane(features: np.ndarray, labels: np.ndarray) -> Image.Image:
    """Features `[n, width]` in the plane of their two main directions, a color for each of the labels `[n]`.

    The number of a class stands at its mean.
    """
    side, margin = 520, 44
    image = Image.new("RGB", (side + 2 * margin, side + 2 * margin), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    centred = features.astype(np.float64) - features.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    main = directions[:, ::-1][:, :2]
    main = main * np.where(main[np.abs(main).argmax(axis=0), np.arange(main.shape[1])] < 0, -1.0, 1.0)
    points = np.zeros([len(features), 2])  # of one feature there is one direction
    points[:, : main.shape[1]] = centred @ main
    low, span = points.min(axis=0), np.maximum(points.max(axis=0) - points.min(axis=0), 1e-12)
    places = margin + (points - low) / span * side
    places[:, 1] = side + 2 * margin - places[:, 1]
    draw.rectangle([margin - 6, margin - 6, margin + side + 6, margin + side + 6], outline=(200, 200, 200))
    classes = np.unique(labels)
    for i, label in enumerate(classes):
        color = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / len(classes), 0.75, 0.55 + 0.35 * (i % 2)))
        for x, y in places[labels == label]:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], color)
    for label in classes if len(classes) <= MOST_CLASSES else ():
        x, y = places[labels == label].mean(axis=0)
        draw.text((x, y), str(label), _INK, ImageFont.load_default(size=22), "mm", stroke_width=3, stroke_fill=_PAPER)
    shares = variances[::-1][:2] / max(variances.sum(), 1e-30)
    words = " and ".join(f"{share:.0%}" for share in shares)
    draw.text((margin, margin - 26), f"the two main directions: {words} of the variance", _INK, font)
    return image


def matrix(counts: np.ndarray) -> Image.Image:
    """A confusion matrix `[classes, classes]`: the darker, the larger its share of the true class."""
    classes, cell, margin = len(counts), 44, 56
    size = margin + classes * cell + 12
    image = Image.new("RGB", (size, size), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    draw.text((margin, 6), "what the model says", _INK, font)
    draw.text((6, 6), "true", _INK, font)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for i in range(classes):
        middle = margin + i * cell + cell / 2
        draw.text((middle, margin - 14), str(i), _INK, font, "mm")
        draw.text((margin - 14, middle), str(i), _INK, font, "rm")
        for j in range(classes):
            left, top = margin + j * cell, margin + i * cell
            shade = tuple(round(p + (b - p) * shares[i, j]) for p, b in zip(_PAPER, _BLUE, strict=True))
            draw.rectangle([left, top, left + cell - 1, top + cell - 1], shade, (225, 225, 225))
            if counts[i, j]:
                ink = _PAPER if shares[i, j] > 0.5 else _INK
                draw.text((left + cell / 2, top + cell / 2), str(counts[i, j]), ink, font, "mm")
    return image


def sheet(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Images `[n, height, width, 1 or 3]` of any range side by side, enlarged to be seen, each with two lines below."""
    side, text, gap = 128, 42, 8
    columns = min(len(images), 4)
    rows = math.ceil(len(images) / columns)
    image = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    low, high = float(images.min()), float(images.max())
    for i, (one, caption) in enumerate(zip(images, captions, strict=True)):
        bytes_ = np.uint8(255 * (one.astype(np.float32) - low) / max(high - low, 1e-12))
        tile = Image.fromarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_).convert("RGB")
        left, top = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        image.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + side + 3), caption, _INK, font, spacing=2)
    return image


def masks(
    images: np.ndarray, targets: np.ndarray, said: np.ndarray, num_classes: int, captions: Sequence[str]
) -> Image.Image:
    """Three pictures side by side for each image `[n, height, width, channels]`: it, its labels, those of the model.

    `targets`, `said`: `[n, height, width]` labels. Class 0 is dark, each other one has a color of its own.
    """
    n, height, width = targets.shape
    scale = max(96 // max(height, width), 1)
    tall, wide, gap, text, columns = height * scale, width * scale, 4, 20, 2 if n > 1 else 1
    across = 3 * (wide + gap) + 3 * gap
    image = Image.new("RGB", (columns * across + gap, gap + text + -(-n // columns) * (tall + text + gap)), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    low, high = float(images.min()), float(images.max())
    grey = np.uint8(255 * (images.astype(np.float32) - low) / max(high - low, 1e-12))
    grey = np.repeat(grey[..., :1], 3, axis=-1) if grey.shape[-1] != 3 else grey
    colors = _colors(num_classes)
    for column in range(columns):
        for j, head in enumerate(("image", "true", "the model says")):
            draw.text((gap + column * across + j * (wide + gap), gap), head, _INK, font)
    for i in range(n):
        left, top = gap + i % columns * across, gap + text + i // columns * (tall + text + gap)
        for j, pixels in enumerate((grey[i], colors[targets[i] % num_classes], colors[said[i]])):
            tile = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.NEAREST)
            image.paste(tile, (left + j * (wide + gap), top))
        draw.text((left, top + tall + 2), captions[i], _INK, font)
    return image


def _colors(count: int) -> np.ndarray:
    """A color for each class: `[count, 3]`, uint8; dark for the first."""
    hues = [colorsys.hsv_to_rgb(i / max(count - 1, 1) + 0.12, 0.75, 0.95) for i in range(count - 1)]
    return np.uint8([[38, 38, 44], *([round(255 * part) for part in hue] for hue in hues)])


def rows(images: np.ndarray) -> Image.Image:
    """Images `[rows, n, height, width, 1 or 3]` in [-1, 1], enlarged to be seen, with the number of each row."""
    count, n, height, width = images.shape[:4]
    scale = max(64 // height, 1)
    tall, wide, gap, margin = height * scale, width * scale, 4, 36
    image = Image.new("RGB", (margin + n * (wide + gap), gap + count * (tall + gap)), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    bytes_ = np.uint8(np.clip(np.round((images.astype(np.float32) + 1) * 127.5), 0, 255))
    for i in range(count):
        top = gap + i * (tall + gap)
        draw.text((margin - 10, top + tall / 2), str(i), _INK, font, "rm")
        for j in range(n):
            one = bytes_[i, j]
            tile = Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one).convert("RGB")
            image.paste(tile.resize((wide, tall), Image.Resampling.NEAREST), (margin + j * (wide + gap), top))
    return image


def scatter(targets: np.ndarray, outputs: np.ndarray) -> Image.Image:
    """Predicted over true values, with the line on which they are equal."""
    side, margin = 420, 56
    image = Image.new("RGB", (side + 2 * margin, side + 2 * margin), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    truth, said = targets.reshape(-1).astype(np.float64), outputs.reshape(-1).astype(np.float64)
    finite = np.isfinite(truth) & np.isfinite(said)
    truth, said = (truth[finite], said[finite]) if finite.any() else (np.zeros(1), np.zeros(1))
    low, high = float(min(truth.min(), said.min())), float(max(truth.max(), said.max()))
    span = max(high - low, 1e-12)
    low, high = low - 0.03 * span, high + 0.03 * span

    def place(value: float) -> float:
        return (value - low) / (high - low) * side

    draw.rectangle([margin, margin, margin + side, margin + side], outline=(200, 200, 200))
    draw.line([margin, margin + side, margin + side, margin], (160, 160, 160))
    for tick in np.linspace(math.ceil(low), math.floor(high), 5) if math.floor(high) > math.ceil(low) else ():
        draw.text((margin + place(tick), margin + side + 14), f"{tick:g}", _INK, font, "mm")
        draw.text((margin - 8, margin + side - place(tick)), f"{tick:g}", _INK, font, "rm")
    for x, y in zip(truth, said, strict=True):
        left, top = margin + place(x), margin + side - place(y)
        draw.ellipse([left - 3, top - 3, left + 3, top + 3], _BLUE)
    draw.text((margin + side / 2, margin + side + 36), "true", _INK, font, "mm")
    draw.text((margin, margin - 20), "predicted", _INK, font)
    return image


# What a word of `models.tasks.PICTURES` draws. `text` needs the model itself, see `trainers.run.examples`.
KINDS: dict[Any, Callable[[Summaries, int, Predictions], None]] = {
    "classes": show_classes,
    "numbers": show_numbers,
    "masks": show_masks,
}
