"""What a model does, drawn for TensorBoard: confusion matrices, worst examples, predicted over true values, samples."""

import colorsys
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainers.show.summaries import Summaries

# How many of the worst examples are shown.
WORST = 16
# Classes up to which a matrix and curves are legible.
MOST_CLASSES = 30
_INK, _PAPER, _BLUE = (30, 30, 30), (255, 255, 255), (31, 99, 180)


class Predictions(NamedTuple):
    """Examples of the evaluation, on the host: inputs, targets, outputs, each `[n, …]`, and losses `[n]`."""

    inputs: Any
    targets: Any
    outputs: Any
    losses: np.ndarray


def show_predictions(summaries: Summaries, step: int, predictions: Predictions, task: str, num_classes: int) -> None:
    """Writes the pictures of a task's kind to `eval/`."""
    if summaries.silent:
        return
    inputs, targets, outputs, losses = predictions
    outputs = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    if task == "classification":
        _show_classes(summaries, step, inputs, targets, outputs, losses, num_classes)
    else:
        _write(
            summaries,
            step,
            "predicted_over_true",
            scatter(targets, outputs),
            "each point an example, in standard deviations of the target",
        )


def show_samples(summaries: Summaries, step: int, images: np.ndarray) -> None:
    """Writes a sheet of generated images `[classes, n, height, width, 1 or 3]` in [-1, 1] to `eval/`."""
    if not summaries.silent:
        _write(summaries, step, "samples", rows(images), "what is generated; a row for each class, by its number")


def _write(summaries: Summaries, step: int, tag: str, image: Image.Image, description: str) -> None:
    held = io.BytesIO()
    image.save(held, "PNG")
    summaries.image("eval", step, tag, held.getvalue(), image.size, description)


def _show_classes(
    summaries: Summaries,
    step: int,
    inputs: np.ndarray,
    targets: np.ndarray,
    outputs: np.ndarray,
    losses: np.ndarray,
    num_classes: int,
) -> None:
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
