"""Whether an export answers what evaluation has computed. Imports nothing of the project: an export needs none of it.

`launch/proof/prover.py` calls `main(EXPORT, EXPECTED.npz, RESULT.json)` in an isolated interpreter.

EXPECTED: `raw/NAME`, the inputs of `serve` by name (`bytes/NAME`: rows of bytes, each a string); `answer/NAME`, and
for whole numbers `sure/NAME`, where rounding cannot make another of them; `inputs`, prepared, and `output/I`. RESULT:
the largest difference of numbers over the largest, for each signature and batch size; how many classes do not have the
name of the most likely one; how many rows are refused, and why the first.
"""

import json
import sys

import numpy as np
import tensorflow as tf

BATCHES = (1, 64)
# Calls with a single row.
SINGLES = 8


def difference(found, expected, sure=None):  # noqa: ANN001, ANN201 - arrays
    """The largest difference over the largest number; infinite where shapes differ, or what is not finite.

    Whole numbers are equal where they are `sure`, or infinitely apart.
    """
    if found.shape != expected.shape:
        return float("inf")
    if sure is not None:
        return 0.0 if np.array_equal(found[sure], expected[sure]) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), finite) or not np.array_equal(
        found[~finite], expected[~finite], equal_nan=True
    ):
        return float("inf")
    scale = max(float(np.abs(expected[finite]).max(initial=0)), 1e-6)
    return float(np.abs(found[finite] - expected[finite]).max(initial=0)) / scale


def called(signature, arguments, batch):  # noqa: ANN001, ANN201
    """All results of a signature by name, computed with `batch` rows at a time; with one, the first `SINGLES`."""
    count = SINGLES if batch == 1 else batch
    parts = [
        signature(**{name: value[i : i + batch] for name, value in arguments.items()}) for i in range(0, count, batch)
    ]
    return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}


def main(place, expected_file, result_file):  # noqa: ANN001, ANN201
    """Loads, calls and compares."""
    exported = tf.saved_model.load(place)
    with open(f"{place}/metadata.json", encoding="utf-8") as file:
        classes = (json.load(file).get("data") or {}).get("classes") or []
    with np.load(expected_file, allow_pickle=False) as archive:
        arrays = dict(archive)
    part = {
        group: {name[len(group) + 1 :]: value for name, value in arrays.items() if name.startswith(f"{group}/")}
        for group in ("raw", "bytes", "answer", "sure", "output")
    }
    raw = {
        name: tf.constant(value.tolist() if value.dtype.kind == "U" else value) for name, value in part["raw"].items()
    }
    raw |= {name: tf.constant([bytes(row) for row in rows]) for name, rows in part["bytes"].items()}
    result = {"serve": {}, "serve_prepared": {}, "misnamed": 0, "refused": 0, "reason": ""}
    for batch in BATCHES:
        outputs = called(exported.signatures["serve_prepared"], {"inputs": tf.constant(arrays["inputs"])}, batch)
        pairs = [(outputs[name], part["output"][str(i)]) for i, name in enumerate(sorted(outputs))]
        result["serve_prepared"][batch] = max(difference(one, other[: len(one)]) for one, other in pairs)
        if raw:
            found = called(exported.signatures["serve"], raw, batch)
            count = len(found["error"])
            sure = {name: value[:count] for name, value in part["sure"].items()}
            each = [difference(found[name], v[:count], sure.get(name)) for name, v in part["answer"].items()]
            result["serve"][batch] = max(each)
            refused = [error.decode("utf-8", "replace") for error in found["error"] if error]
            result["refused"] += len(refused)
            result["reason"] = (refused or [""])[0][:200] if not result["reason"] else result["reason"]
            if "probabilities" in found:
                names = np.array(classes)[np.argmax(found["probabilities"], axis=1)]
                result["misnamed"] += int(np.sum(names != np.char.decode(found["class"].astype("S"), "utf-8")))
    result["project"] = sorted({"models", "trainers", "launch"} & set(sys.modules))
    with open(result_file, "w") as file:
        json.dump(result, file)
