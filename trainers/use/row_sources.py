"""Where rows to be answered come from: files, folders, TensorFlow Datasets, or the run's own evaluation split."""

import concurrent.futures
import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.input import image_files
from trainers.input.errors import reason_of
from trainers.input.kinds import csv_table, image_folder
from trainers.input.raw.rows import WITH_COMMA, RawRows, number_of
from trainers.input.raw.texts import RawText
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.use.predictor import Predictor

_DECODED_AT_ONCE = 8
EVALUATION = "eval"
# Kind of input → kinds of `trainers.input.raw` that take it.
KINDS = {"csv": ("rows",), "images": ("images",), "text": ("text", "tokens"), "tfds": ("images", "rows")}


@dataclasses.dataclass
class Row:
    """A row of the input: where it stands, and its prepared `inputs` or the `reason` why it cannot be used.

    `target`: prepared, None where it is not known; `doubt`: why what stands there is no target. `count`: tokens that
    are the row's. `size`: height and width of an image as given.
    """

    where: str
    reason: str = ""
    inputs: Any = None
    target: Any = None
    doubt: str = ""
    count: int = 0
    size: tuple[int, int] | None = None


def rows_of(text: str, predictor: Predictor, data_dir: str) -> Iterator[list[Row]]:
    """The rows of `--input`, which names what is there, in order, some at a time.

    Raises:
      BadConfiguration: the input cannot be read, or is not what the model takes.
    """
    if text == EVALUATION:
        if predictor.dataset is None:
            raise BadConfiguration("--input=eval is a run's own evaluation split; name the run, not its export")
        return _evaluation(predictor)
    kind, argument = text.partition(":")[::2]
    raw = predictor.raw
    if raw.kind not in KINDS[kind]:
        fit = [name for name, kinds in KINDS.items() if raw.kind in kinds]
        raise BadConfiguration(f"--input {text}: the model takes {raw.kind}; pass {' or '.join(f'{n}:…' for n in fit)}")
    if kind == "tfds":
        return _prepared_sets(argument, predictor, data_dir)
    path = paths.local(f"--input={kind}:", argument)
    return {"csv": _table, "images": _images, "text": _lines}[kind](path, predictor)


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _evaluation(predictor: Predictor) -> Iterator[list[Row]]:
    dataset, number = predictor.dataset, 0
    for features in dataset.eval.examples().batch(predictor.size):
        inputs, targets = (value.numpy() for value in dataset.prepare(features))
        count = inputs.shape[1] if inputs.ndim == 2 else 0
        rows = [
            Row(str(number + i + 1), "", x, y, "", count) for i, (x, y) in enumerate(zip(inputs, targets, strict=True))
        ]
        number += len(rows)
        yield rows


def _with_inputs(rows: list[Row], batch: Sequence[Any], predictor: Predictor) -> list[Row]:
    """Rows with the inputs of a batch, one for each row without a reason so far."""
    usable = [row for row in rows if not row.reason]
    if usable:
        features, raw = predictor.raw.features(*batch), predictor.raw
        inputs, errors = raw.inputs(features).numpy(), raw.errors(*batch).numpy()
        counts = features["count"].numpy() if "count" in features else np.zeros(len(usable), np.int32)
        for row, *found in zip(usable, inputs, errors, counts, strict=True):
            row.inputs, row.reason, row.count = found[0], found[1].decode(errors="replace"), int(found[2])
    return rows


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(path: Path, predictor: Predictor) -> Iterator[list[Row]]:
    """The rows of a CSV file. Columns are found by name, in any order; others are left out."""
    raw, names = predictor.raw, predictor.raw.layout.columns
    found = {}
    for delimiter in csv_table.DELIMITERS:
        header = [cell.strip() for cell in next(_cells(path, delimiter), (0, [], ""))[1]]
        found[delimiter] = header
    delimiter = max(found, key=lambda each: len(set(names) & set(found[each])))
    header = found[delimiter]
    if missing := [name for name in names if name not in header]:
        raise BadConfiguration(
            f"{path} has no column {', '.join(map(repr, missing))}, which the model needs; it has "
            f"{', '.join(map(repr, header))}; add what is missing"
        )
    needed = [*names, *(name for name in raw.layout.targets if name in header)]
    if double := [name for name in needed if header.count(name) > 1]:
        raise BadConfiguration(f"{path}, line 1: column {double[0]!r} stands there twice; name each column once")
    comma = delimiter != "," and any(
        WITH_COMMA.fullmatch(cell.strip()) for _, cells, _ in _cells(path, delimiter) for cell in cells
    )
    places = {name: header.index(name) for name in needed}
    return _table_rows(_cells(path, delimiter), places, len(header), raw, comma, predictor)


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Line, cells and what is wrong with them. Bytes that are no UTF-8 stay what they are, and are in no word known."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True, delimiter=delimiter)
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, [], str(error)
                    continue
                if cells:
                    yield reader.line_num, cells, ""
    except OSError as error:
        raise BadConfiguration(f"{path} cannot be read: {error.strerror}; name a CSV file") from None


def _table_rows(
    lines: Iterator[tuple[int, list[str], str]],
    places: dict[str, int],
    width: int,
    raw: RawRows,
    comma: bool,
    predictor: Predictor,
) -> Iterator[list[Row]]:
    next(lines)  # the header
    for chunk in _chunks(lines, predictor.size):
        rows, columns = [], {key: [] for key in raw.keys.values()}
        for line, cells, fault in chunk:
            row = Row(
                f"line {line}", fault or ("" if len(cells) == width else f"{len(cells)} cells, but {width} columns")
            )
            rows.append(row)
            if row.reason:
                continue
            own = {name: cells[at].strip() for name, at in places.items()}
            values, row.reason = _values(own, raw, comma)
            if row.reason:
                continue
            for key, value in values.items():
                columns[key].append(value)
            targets = {name: own[name] for name in raw.layout.targets if own.get(name)}
            try:
                row.target = raw.target_of(targets, comma)
            except ValueError as error:
                row.doubt = str(error)
        kinds = {key: spec.dtype for key, spec in raw.signature()[0].items()}
        yield _with_inputs(rows, [{key: tf.constant(cells, kinds[key]) for key, cells in columns.items()}], predictor)


def _values(cells: dict[str, str], raw: RawRows, comma: bool) -> tuple[dict[str, Any], str]:
    """What a row's cells say by tensor, and what is wrong with the first that says nothing."""
    values: dict[str, Any] = {}
    for name, key in raw.keys.items():
        cell = cells[name]
        if not cell:
            return {}, f"column {name!r} is empty"
        if name in raw.layout.words:
            values[key] = cell.encode("utf-8", "replace")
        elif (number := number_of(cell, comma)) is None:
            return {}, f"column {name!r} holds {cell!r}, which is not a number"
        else:
            values[key] = number
    return values, ""


# Images ---------------------------------------------------------------------------------------------------------------


def _images(folder: Path, predictor: Predictor) -> Iterator[list[Row]]:
    """The image files of a folder at any depth, by name. Where all lie in folders of classes, these are labels."""
    files = (
        [folder]
        if folder.is_file()
        else [path for path in image_folder.files_in(folder) if image_folder.is_meant(path)]
    )
    if not files:
        raise BadConfiguration(f"--input images:{folder} holds no images; name another folder")
    root, raw = (folder.parent if folder.is_file() else folder), predictor.raw
    names = sorted(str(path.relative_to(root)) for path in files)
    tops = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
    labelled = predictor.kind == "classes" and all(top in raw.classes for top in tops)

    decode = tf.function(raw.decoded, input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)])

    def row_of(item: tuple[str, str]) -> tuple[Row, Any]:
        name, top = item
        look = image_files.header(root / name)
        if isinstance(look, str):
            return Row(name, look), None
        row = Row(name, size=look[:2], target=raw.class_number(top) if labelled else None)
        try:
            return row, decode((root / name).read_bytes(), look[2]).numpy()
        except (OSError, tf.errors.OpError) as error:
            return Row(name, reason_of(error)), None

    return _pictured(zip(names, tops, strict=True), row_of, predictor)


def _pictured(
    items: Iterable[Any], row_of: Callable[[Any], tuple[Row, Any]], predictor: Predictor
) -> Iterator[list[Row]]:
    """Rows with decoded pixels, several decoded at once."""
    with concurrent.futures.ThreadPoolExecutor(_DECODED_AT_ONCE) as pool:
        for chunk in _chunks(items, predictor.size):
            found = list(pool.map(row_of, chunk))
            pixels = [image for row, image in found if not row.reason]
            if pixels:
                inputs = predictor.raw.inputs({"image": np.stack(pixels)}).numpy()
                for row, one in zip((row for row, _ in found if not row.reason), inputs, strict=True):
                    row.inputs = one
            yield [row for row, _ in found]


# Text -----------------------------------------------------------------------------------------------------------------


def _lines(path: Path, predictor: Predictor) -> Iterator[list[Row]]:
    """Each line is a text that goes on; of tokens, their numbers with blanks between them."""
    raw = predictor.raw

    def lines() -> Iterator[tuple[int, bytes]]:
        with open(path, "rb") as file:
            yield from enumerate((line.rstrip(b"\r\n") for line in file), 1)

    for chunk in _chunks(lines(), predictor.size):
        rows, texts = [Row(f"line {number}") for number, _ in chunk], []
        for row, (_, line) in zip(rows, chunk, strict=True):
            if isinstance(raw, RawText):
                texts.append(line)
                continue
            words = line.split()
            if all(word.isdigit() and int(word) < 2**31 for word in words):
                texts.append([int(word) for word in words])
            else:
                row.reason = "it is not numbers of tokens with blanks between them"
        if not isinstance(raw, RawText):
            longest = max([1, *map(len, texts)])
            texts = np.array([text + [-1] * (longest - len(text)) for text in texts], np.int32)
        yield _with_inputs(rows, [tf.constant(texts)] if len(texts) else [], predictor)


# TensorFlow Datasets --------------------------------------------------------------------------------------------------


def _prepared_sets(argument: str, predictor: Predictor, data_dir: str) -> Iterator[list[Row]]:
    """The examples of a split that TensorFlow Datasets or an installed package has."""
    from trainers.input import builders
    from trainers.input.dataset import Request
    from trainers.input.kinds import embedded, tfds

    name, _, split = argument.rpartition("/")
    request = Request(name, data_dir=data_dir)
    make = embedded.BUILDERS.get(name)
    with builders.readable_errors(request):
        builder = builders.prepared(
            (lambda: make(data_dir=data_dir)) if make else (lambda: tfds.builder_of(request)), request
        )
    if split not in builder.info.splits:
        raise BadConfiguration(
            f"--input tfds:{argument}: {name} has the splits {', '.join(builder.info.splits)}; name one"
        )
    wanted = {"image"} if predictor.raw.kind == "images" else {"features", "target"}
    if not wanted <= set(builder.info.features):
        raise BadConfiguration(f"--input tfds:{argument} has no {' and '.join(sorted(wanted))}; name another set")
    return (_set_of_images if "image" in wanted else _set_of_rows)(builder, split, predictor)


def _feature(builder: Any, name: str) -> Any:
    """A feature of a set, or None."""
    features = builder.info.features
    return features[name] if name in features else None  # noqa: SIM401 - it is no dictionary


def _set_of_images(builder: Any, split: str, predictor: Predictor) -> Iterator[list[Row]]:
    from trainers.input.builders import examples_of

    raw, label = predictor.raw, _feature(builder, "label")
    known = {i: raw.classes.index(name) for i, name in enumerate(getattr(label, "names", ())) if name in raw.classes}
    decode = tf.function(raw.decoded, input_signature=[tf.TensorSpec([], tf.string)])

    def row_of(item: tuple[int, Any]) -> tuple[Row, Any]:
        number, example = item
        row = Row(f"{split} {number}", target=known.get(int(example["label"])) if "label" in example else None)
        image = example["image"]
        try:
            encoded = isinstance(image, bytes)
            return row, decode(image).numpy() if encoded else raw.features(tf.constant(image)[None])["image"][0].numpy()
        except tf.errors.OpError as error:
            return Row(row.where, reason_of(error)), None

    return _pictured(enumerate(examples_of(builder, split), 1), row_of, predictor)


def _set_of_rows(builder: Any, split: str, predictor: Predictor) -> Iterator[list[Row]]:
    from trainers.input.builders import examples_of

    raw, names = predictor.raw, getattr(builder, "names", ())
    if tuple(names) != raw.layout.columns or tuple(builder.targets) != raw.targets:
        raise BadConfiguration(f"--input tfds:{builder.name} has other columns than the model takes; name another set")
    keys = list(raw.keys.values())
    for chunk in _chunks(enumerate(examples_of(builder, split), 1), predictor.size):
        values = np.array([example["features"] for _, example in chunk], np.float64)
        scale = raw.target_scale
        targets = [scale.prepared(scale.held(np.float64(np.ravel(example["target"])))) for _, example in chunk]
        rows = [
            Row(f"{split} {number}", target=np.reshape(np.asarray(target), raw.target_shape))
            for (number, _), target in zip(chunk, targets, strict=True)
        ]
        yield _with_inputs(rows, [{key: tf.constant(values[:, i]) for i, key in enumerate(keys)}], predictor)
