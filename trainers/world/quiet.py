"""Importing TensorFlow without what its C++ prints, and without what Keras loads and a trainer never uses."""

import contextlib
import gc
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator

from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.paths import has_home

_NOISE = re.compile(
    r"All log messages before absl::InitializeLog|oneDNN custom operations are on|Could not find cuda drivers|"
    r"failed call to cuInit|computation_placer already registered|Unable to register cu|"
    r"This TensorFlow binary is optimized|To enable the following instructions"
)


@contextlib.contextmanager
def known_noise_removed() -> Iterator[None]:
    """Within the block standard error is held back, then printed without the lines that are known to mean nothing."""
    sys.stderr.flush()
    held = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed below
    original = os.dup(2)
    os.dup2(held.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)
        held.seek(0)
        for line in held.read().decode(errors="replace").splitlines(keepends=True):
            if not _NOISE.search(line):
                sys.stderr.write(line)
        held.close()


@contextlib.contextmanager
def not_installed(*packages: str) -> Iterator[None]:
    """Within the block these packages look as if they were not installed, unless they are loaded already.

    Keras imports scikit-learn and matplotlib wherever it finds them, for wrappers and plots: a third of its start.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras without noise, and looks for devices once, which is when TensorFlow complains.

    Keras runs on TensorFlow, whatever KERAS_BACKEND or the user's keras.json says.

    Raises:
      BadConfiguration: Keras does not take its configuration.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not has_home():
        # Keras would make a folder of the name ~ here, for its configuration.
        os.environ.setdefault("KERAS_HOME", os.path.join(tempfile.gettempdir(), f"keras-{os.getuid()}"))
    # Threads of their own that only feed a GPU (TensorFlow's guide "Optimize GPU performance with the Profiler").
    os.environ.setdefault("TF_GPU_THREAD_MODE", "gpu_private")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with known_noise_removed(), not_installed("sklearn", "matplotlib"), _readable_errors(), _without_collections():
        import keras  # noqa: F401
        import tensorflow as tf

        tf.config.list_physical_devices()
    set_keras_defaults()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Within the block Python's collector rests; what is there afterwards, it leaves alone for good.

    Modules make half a million objects that stay. Going through them again and again is a fifth of the import, and
    0.2 to 0.5 s of each whole collection after it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Within the block an error that Keras, or TensorFlow's copy of it, raises over its configuration is one line."""
    try:
        yield
    except Exception as error:
        places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any(place.endswith(("/keras/src/backend/config.py", "/python/keras/backend.py")) for place in places):
            raise
        reason = str(error) or "a value in it is not known"
        raise BadConfiguration(
            f"Keras cannot use its configuration: {reason}; correct or delete keras.json in $KERAS_HOME or ~/.keras"
        ) from error


def set_keras_defaults() -> None:
    """Sets what a user's keras.json may have changed for all models back to what Keras documents.

    A run is what its flags say: `floatx`, `epsilon` and `image_data_format` would make another model of it.

    Raises:
      BadConfiguration: Keras runs on another backend.
    """
    import keras

    if keras.config.backend() != "tensorflow":
        raise BadConfiguration(
            f"Keras runs on {keras.config.backend()}; set KERAS_BACKEND=tensorflow before anything imports Keras"
        )
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
