"""Weights in files of other programs, as arrays by name. No code of a file is run, and no object of it is made.

- `.safetensors`: the names that the file has.
- `.weights.h5` of Keras, and `.keras`, an archive with such a file: the place of a variable in the tree of the model's
  attributes, `stem/vars/0`, since Keras keeps no names there.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from trainers.record import safe_tensors
from trainers.settings.exit_codes import BadConfiguration

_IN_KERAS = "model.weights.h5"
# What deflate cannot do better than: a data set that says more of itself is not in the file.
_MOST_PACKED = 1100


def is_one(name: str) -> bool:
    """Whether a name, or an address, is that of such a file."""
    return name.endswith((".weights.h5", ".keras", ".safetensors"))


def names_are_places(path: Path) -> bool:
    """Whether the names that `read` gives are places in a tree of attributes."""
    return path.suffix in (".h5", ".keras")


def read(what: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays by name. `what`: how to name the file in a message, a flag for example.

    Raises:
      BadConfiguration: it cannot be read, or does not follow its format.
    """
    try:
        if path.suffix == ".safetensors":
            return safe_tensors.read(path)
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                return _in_hdf5(io.BytesIO(archive.read(_IN_KERAS)))
        return _in_hdf5(path)
    except KeyError:
        raise BadConfiguration(f"{what} {path} holds no {_IN_KERAS}; write it with model.save") from None
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadConfiguration(f"{what} {path} cannot be read: {reason}; name a whole file") from error


def _in_hdf5(file: Path | io.BytesIO) -> dict[str, np.ndarray]:
    with h5py.File(file, "r") as root:
        return {name.removeprefix("/"): _values(name, data) for name, data in _data_sets(root)}


def _data_sets(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{group.name}/{key} is a link, which Keras does not write")
        member = group[key]
        if isinstance(member, h5py.Group):
            yield from _data_sets(member)
        else:
            yield member.name, member


def _values(name: str, data: h5py.Dataset) -> np.ndarray:
    if data.external or data.is_virtual or data.nbytes > _MOST_PACKED * max(data.id.get_storage_size(), 1):
        raise ValueError(f"the values of {name} are not in the file")
    values = data[()]
    if data.attrs.get("dtype") == "bfloat16":
        return safe_tensors.widened(np.asarray(values).view(np.uint16)).reshape(data.shape)
    if np.asarray(values).dtype.kind not in "biuf":
        raise ValueError(f"{name} has type {data.dtype}, which is no number")
    return np.asarray(values)
