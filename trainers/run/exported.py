"""Writing what `--export` names: what its metadata says of the run, and what is kept of an export before it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.record import reading
from trainers.record.run_record import RunRecord
from trainers.run.inner_loop import InnerLoop
from trainers.settings.config import Config
from trainers.world import files

FORMAT = 1
# What a run is, of the facts of run.json.
_OF_RUN = ("started", "loop", "flags", "commit", "versions", "data_fingerprint", "parameters", "replicas")


def write(loop: InnerLoop, record: RunRecord, step: int, evaluation: Mapping[str, float]) -> None:
    """Writes what `--export` names of a step, with what is told of it."""
    path, formats = record.directory / reading.EXPORT, loop.config.export.split(",")
    with files.aside(path) as place:
        loop.export(place)
        if place.is_dir():
            formats += kept(path, place, step)
            told = facts(record.facts, loop.config, step, evaluation, formats) | loop.export_facts()
            files.write_text(place / reading.METADATA, files.to_json(told, indent=1, ensure_ascii=False) + "\n")


def facts(
    run: Mapping[str, Any], config: Config, step: int, evaluation: Mapping[str, float], formats: Sequence[str]
) -> dict[str, Any]:
    """What is told of a run: its step, the last evaluation, flags, versions, commit and data."""
    known = {name: run[name] for name in _OF_RUN if name in run}
    last = {name: value for name, value in evaluation.items() if name != "step"}
    told = {"format": FORMAT, "formats": list(formats), "dataset": getattr(config, "dataset", ""), "step": step}
    return told | {"evaluation": last} | known


def kept(old: Path, new: Path, step: int) -> list[str]:
    """Takes over what an export of the same step has in another format. Returns the names of these formats."""
    try:
        before = reading.read_json(old / reading.METADATA)
    except (ValueError, OSError):
        return []
    if before.get("step") != step:
        return []
    names = {path.name for path in new.iterdir()} | {reading.METADATA}
    taken = [path for path in old.iterdir() if path.name not in names]
    for path in taken:
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, new / path.name)
    return [name for name in before.get("formats", ()) if taken and name not in _formats_of(names)]


def _formats_of(names: set[str]) -> list[str]:
    return [form for form, file in (("saved_model", "saved_model.pb"), ("keras", "model.keras")) if file in names]
