"""Data to an object store: whole, or not there for who reads it.

While they come, `.incoming.json` lies among them, which readers heed; it is removed last, after `.manifest.json` was
written. Both hold the SHA-256 of each file. An upload that was interrupted goes on where it was: objects are whole or
not there. Free of TensorFlow.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Mapping

from trainers.input.manifests import BESIDE, Manifest, Source
from trainers.settings.exit_codes import BadConfiguration
from trainers.world.stores import Store, Version

INCOMING, WHOLE = ".incoming.json", ".manifest.json"
_AT_ONCE, _PATIENCE = 8, 120.0
_REMEDY = "bring this under another name, or remove what is there"


def marker(name: str, suffix: str) -> str:
    """The object that says how an upload stands: within a folder, `name` empty; of a file beside it."""
    return f".{name}{suffix}" if name else suffix


def upload(folder: str, source: Source, say: Callable[[str], None], alone: bool = False) -> bool:
    """Brings a file or a folder below an address. Returns False if it is there already. `say`: takes lines of progress.

    `alone`: nobody else brings it, so that what an upload of other data has left, which did not end, is replaced.

    Raises:
      BadConfiguration: other data are there, the source changes, or the store refuses.
      StoreLost: the store cannot be reached.
    """
    address = f"{folder}/{source.name}"
    store = Store(address if source.is_folder else folder, _PATIENCE)
    own = "" if source.is_folder else source.name
    incoming, whole = marker(own, INCOMING), marker(own, WHOLE)
    there = _there(store, source)
    before, version = _manifest(store, incoming)
    if before is None:
        finished, _ = _manifest(store, whole)
        if finished is not None and not finished.difference(source.manifest) and _is_all(there, source.manifest):
            return False
        if there or finished is not None:
            why = finished.difference(source.manifest) if finished else "no manifest says what they are"
            raise BadConfiguration(f"{address} holds other data ({why or 'files were removed'}); {_REMEDY}")
    elif not alone and (why := before.difference(source.manifest)):
        raise BadConfiguration(
            f"{address}: an upload of other data has not ended there ({why}); repeat that, or {_REMEDY}"
        )
    text = source.manifest.text().encode()
    if (store.replace(incoming, text, version) if version else store.create(incoming, text)) is None:
        raise BadConfiguration(f"{address}: other data have begun to be brought there meanwhile; wait, and repeat it")
    kept = _kept(before, there, source.manifest)
    store.remove([name for name in there if name not in source.manifest.files])
    _write(store, source, [name for name in source.manifest.files if name not in kept], say)
    source.check_unchanged()
    still, _ = _manifest(store, incoming)
    if still is None or still.difference(source.manifest) or not _is_all(_there(store, source), source.manifest):
        raise BadConfiguration(f"{address} was changed by others while data were brought there; repeat it")
    store.write(whole, text)
    store.remove([incoming])
    return True


def _there(store: Store, source: Source) -> dict[str, int]:
    """The sizes of the objects that are there: all of a folder, or the file and what describes it."""
    if source.is_folder:
        entries = store.entries()
    else:
        names = (source.name, *(source.name + suffix for suffix in BESIDE))
        entries = {name: entry for name in names if (entry := store.entry(name))}
    return {name: size for name, (_, size) in entries.items() if name not in (INCOMING, WHOLE)}


def _manifest(store: Store, name: str) -> tuple[Manifest | None, Version]:
    """The manifest in an object, and its version; None if it is not there. One that cannot be read is empty."""
    with contextlib.suppress(FileNotFoundError):
        content, version = store.read_versioned(name)
        try:
            return Manifest.from_text(content), version
        except ValueError:
            return Manifest({}), version
    return None, {}


def _is_all(there: Mapping[str, int], manifest: Manifest) -> bool:
    return dict(there) == {name: size for name, (size, _) in manifest.files.items()}


def _kept(before: Manifest | None, there: Mapping[str, int], manifest: Manifest) -> set[str]:
    """What an upload before has brought of the same content."""
    if before is None:
        return set()
    return {
        name for name, entry in manifest.files.items() if before.files.get(name) == entry == (there.get(name), entry[1])
    }


def _write(store: Store, source: Source, names: list[str], say: Callable[[str], None]) -> None:
    """Writes objects, several at a time, in their order."""
    done, told, total = 0, 0, sum(source.manifest.files[name][0] for name in names)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE if source.is_folder else 1) as pool:
        futures = {pool.submit(store.write, name, source.root / name): name for name in names}
        for future in concurrent.futures.as_completed(futures):
            if error := future.exception():
                pool.shutdown(cancel_futures=True)
                source.check_unchanged()
                raise error
            done += source.manifest.files[futures[future]][0]
            if 10 * done // max(total, 1) > told:
                told = 10 * done // max(total, 1)
                say(f"{store.address}: {done / 2**20:.1f} of {total / 2**20:.1f} MiB")
