"""Files with weights of other programs: read to the bit, and refused in one line where they are not what they say."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

from trainers.record import safe_tensors, weight_files
from trainers.settings.exit_codes import BadConfiguration


def entry(kind, shape, start, stop):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


def written(path, header, content, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + content)
    return path


def test_bytes_written_by_hand_are_the_arrays_that_they_stand_for(tmp_path):
    floats = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1, -2
    halves = b"\x80\x3f\x20\xc0\x80\x7f"  # 1, -2.5, infinity in bfloat16
    whole = (2**40).to_bytes(8, "little")
    header = {
        "__metadata__": {"format": "pt"},
        "a.kernel": entry("F32", [1, 2], 0, 8),
        "a.bias": entry("BF16", [3], 8, 14),
        "count": entry("I64", [], 14, 22),
        "none": entry("F16", [0, 4], 22, 22),
        "yes": entry("BOOL", [2], 22, 24),
    }
    found = weight_files.read(
        "--init_from", written(tmp_path / "a.safetensors", header, floats + halves + whole + b"\1\0")
    )
    assert {name: (value.shape, str(value.dtype)) for name, value in found.items()} == {
        "a.kernel": ((1, 2), "float32"),
        "a.bias": ((3,), "float32"),
        "count": ((), "int64"),
        "none": ((0, 4), "float16"),
        "yes": ((2,), "bool"),
    }
    assert found["a.kernel"].tolist() == [[1.0, -2.0]] and found["a.bias"].tolist() == [1.0, -2.5, float("inf")]
    assert int(found["count"]) == 2**40 and found["yes"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("header", "length", "says"),
    [
        ({}, 1 << 62, "the header should have 4611686018427387904 bytes, and the file has"),
        (b"[1]", None, "the header is no JSON object"),
        (b"{", None, "Expecting property name"),
        ({"a": entry("F32", [2], 0, 16)}, None, "'a' of shape .2., F32, does not fit bytes 0 to 16 of 8"),
        ({"a": entry("F32", [2], 4, 8)}, None, "does not fit bytes 4 to 8"),
        ({"a": entry("F32", [2], 8, 0)}, None, "does not fit bytes 8 to 0"),
        ({"a": entry("F32", [-2], 0, 8)}, None, "'a' has dtype 'F32', shape .-2."),
        ({"a": entry("F8", [2], 0, 8)}, None, "'a' has dtype 'F8'"),
        ({"a": entry("F32", [2], True, 8)}, None, "offsets .True, 8."),
        ({"a": {"dtype": "F32"}}, None, "the entry of 'a' lacks dtype, shape or data_offsets"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_one_line(tmp_path, header, length, says):
    path = written(tmp_path / "bad.safetensors", header, bytes(8), length)
    with pytest.raises(BadConfiguration, match=f"--init_from .*bad.safetensors cannot be read: .*{says}") as error:
        weight_files.read("--init_from", path)
    assert "\n" not in str(error.value)


def test_a_short_file_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(ValueError, match="and the file has 3"):
        safe_tensors.read(tmp_path / "short")


def test_files_of_keras_have_the_places_of_their_variables(tmp_path):
    model = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(2, name="mine")])
    model.compile("adam", "mse")
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    for name in ("a.keras", "a.weights.h5"):
        found = weight_files.read("--init_from", tmp_path / name)
        np.testing.assert_array_equal(found["layers/dense/vars/0"], model.layers[0].kernel.numpy())
        assert weight_files.names_are_places(tmp_path / name)


def test_bfloat16_in_hdf5_becomes_float32(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        stored = file.create_dataset("dense/vars/0", data=np.array([0x3F80, 0xC020], np.uint16).view("V2"))
        stored.attrs["dtype"] = "bfloat16"
    assert weight_files.read("", tmp_path / "a.weights.h5")["dense/vars/0"].tolist() == [1.0, -2.5]


def test_links_objects_and_what_is_not_in_the_file_are_refused(tmp_path):
    def bad(name, fill):
        with h5py.File(tmp_path / name, "w") as file:
            fill(file)
        with pytest.raises(BadConfiguration, match=f"{name} cannot be read: ") as error:
            weight_files.read("--init_from", tmp_path / name)
        return str(error.value)

    (tmp_path / "secret").write_bytes(bytes(64))
    assert "is a link" in bad(
        "link.weights.h5", lambda file: file.__setitem__("a", h5py.ExternalLink("other.h5", "/a"))
    )
    outside = [(str(tmp_path / "secret"), 0, 64)]
    assert "are not in the file" in bad(
        "outside.weights.h5", lambda file: file.create_dataset("a", (16,), "f4", external=outside)
    )
    huge = {"shape": (1 << 40,), "dtype": "f4", "chunks": (1024,)}
    assert "are not in the file" in bad("huge.weights.h5", lambda file: file.create_dataset("a", **huge))
    assert "is no number" in bad("text.weights.h5", lambda file: file.create_dataset("a", data="words"))


def test_what_is_no_such_file_is_one_line(tmp_path):
    for name in ("a.weights.h5", "a.keras"):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(BadConfiguration, match="cannot be read"):
            weight_files.read("--init_from", tmp_path / name)
    with zipfile.ZipFile(tmp_path / "b.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(BadConfiguration, match=r"holds no model.weights.h5; write it with model.save"):
        weight_files.read("--init_from", tmp_path / "b.keras")
