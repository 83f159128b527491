"""The input pipeline by itself, without a model: ours beside tf.data as it is commonly written.

Each contender is measured in fresh processes (`trainers.measure.input_contenders`), so that a peak of memory is its
own, and they take turns in rounds. Free of TensorFlow.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.measure import charts
from trainers.settings import augmentation
from trainers.settings.exit_codes import BAD_CONFIGURATION, BadConfiguration, RunEnded
from trainers.show.tables import paragraph, readable, table
from trainers.world import files
from trainers.world.machine import ROOT

KINDS = {
    "lockstep": "ours: each example of the run by its index, in a global shuffle, from any step",
    "sequential": "ours without the shuffle: the files from the begin, which random access cannot outdo",
    "usual": "tf.data at its best: encoded records in a shuffle buffer of 10,000 (of a folder: the shuffled list of "
    "its files), then tf.image.decode_and_crop_jpeg and the rest in one parallel map",
    "usual_decoded": "tf.data as most public code has it: whole images are decoded, then shuffled in a buffer of up "
    "to 10,000, then cropped",
}
# Of one process, in the order in which it finds them.
FIGURES = {
    "first_batch_seconds": "first batch",
    "images_per_second": "images/s",
    "images_per_cpu_second": "images per CPU-second",
    "peak_mib": "peak MiB",
    "middle_batch_seconds": "first batch, mid-epoch",
}
PREPARE = "prepare"
# A contender ends with the process that has started it, however that ended: a pipe between them is closed then.
_CODE = """
import os, sys, threading
def end_with_the_other():
    os.read(int(sys.argv[3]), 1)
    os._exit(143)
threading.Thread(target=end_with_the_other, daemon=True).start()
from trainers.world import process, quiet
quiet.import_tensorflow()
from trainers.measure import input_contenders
process.main(input_contenders.read, input_contenders.run)
"""
# What the peers have, too.
AUGMENTS = ("inception", "flip")
# A process has this long, and this many times the seconds of its measurement.
_LIMIT_SECONDS, _LIMIT_FACTOR = 180, 10
_MESSAGE_LINES = 5


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """What is measured. `seconds`: of one measurement; `image_size`: height and width of what a model would see."""

    dataset: str
    augment: str = "inception,flip"
    image_size: int = 224
    batch_size: int = 128
    seconds: float = 2.0
    repeats: int = 5
    data_dir: str = ""
    seed: int = 0

    @property
    def limit(self) -> int:
        """Seconds after which the process of a contender is ended."""
        return int(_LIMIT_SECONDS + _LIMIT_FACTOR * self.seconds)

    def check(self) -> None:
        """Raises BadConfiguration if the peers cannot do what is asked for."""
        words = augmentation.parse(self.augment)
        if "inception" not in words or not set(words) <= set(AUGMENTS):
            raise BadConfiguration(
                f"--augment {self.augment!r} with --input: the peers have inception and flip; pass inception, or both"
            )


# Of a contender, by figure: a value for each round, None where the process was ended before it had it.
Figures = dict[str, list[float | None]]


@dataclasses.dataclass
class InputResult:
    """What was measured. `facts`: of the machine and of the data, as the contenders' processes found them."""

    settings: InputSettings
    facts: dict[str, Any]
    figures: dict[str, Figures]

    def median(self, key: str, figure: str) -> float | None:
        """Over the rounds; None where one of them has no value."""
        values = self.figures[key][figure]
        return None if None in values else statistics.median(values)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            **self.facts,
            "flags": dataclasses.asdict(self.settings),
            "contenders": {
                key: {"what": KINDS[key], "rounds": values, "median": {name: self.median(key, name) for name in values}}
                for key, values in self.figures.items()
            },
        }


def in_a_process(key: str, settings: InputSettings, limit: float | None) -> dict[str, Any]:
    """What a fresh process says of a contender; a part of it if it took longer than `limit` seconds.

    Raises:
      BadConfiguration: the data set cannot be used.
      RunEnded: the process has failed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours, theirs = os.pipe()[::-1]
    command = [sys.executable, "-c", _CODE, key, json.dumps(dataclasses.asdict(settings)), str(theirs)]
    child = None
    try:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[theirs],
        )
        said, complaints = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        return _merged(child.communicate()[0])
    finally:
        os.close(ours)
        os.close(theirs)
        if child:
            child.kill()
            child.wait()
    if child.returncode:
        lines = complaints.strip().splitlines()[-_MESSAGE_LINES:] or [f"code {child.returncode}"]
        if child.returncode == BAD_CONFIGURATION:
            raise BadConfiguration(lines[-1].partition(": ")[2])
        raise RunEnded(f"the contender {key} has failed: {' / '.join(lines)}")
    return _merged(said)


def _merged(said: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in said.splitlines():
        with contextlib.suppress(ValueError):  # of a process that was ended, the last line may be torn
            facts |= json.loads(line)
    return facts


def measure(settings: InputSettings) -> InputResult:
    """Rounds in which each contender has a process; each round begins with another one."""
    result = InputResult(settings, in_a_process(PREPARE, settings, None), {})
    print(describe_machine(result), flush=True)
    keys = list(KINDS)
    result.figures |= {key: {figure: [] for figure in FIGURES} for key in keys}
    for number in range(settings.repeats):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            facts = in_a_process(key, settings, settings.limit)
            for figure in FIGURES:
                result.figures[key][figure].append(facts.get(figure))
        rates = (f"{key} {result.figures[key]['images_per_second'][-1] or 0:.0f}" for key in keys)
        print(f"round {number + 1} of {settings.repeats}, images/s: {', '.join(rates)}", flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written.


def describe_machine(result: InputResult) -> str:
    """Where and how it is measured."""
    settings, machine = result.settings, result.facts["machine"]
    return paragraph(
        f"{machine['cores']} CPU cores (load average at the start {machine['load_average']}), TensorFlow "
        f"{machine['versions']['tensorflow']}: {settings.dataset}, {result.facts['examples']:,} images for training, "
        f"--augment={settings.augment}, {settings.image_size}×{settings.image_size}, batch {settings.batch_size}; "
        f"{settings.repeats} rounds, in each of them a process of about {settings.seconds:g} s for each contender. "
        "After the first round the files are in the page cache."
    )


def _cell(figure: str, values: Sequence[float | None], limit: float) -> str:
    """`412 (398–420)`; seconds with their unit."""
    if None in values:
        return f"not within {limit:g} s"
    seconds = figure.endswith("seconds")

    def said(value: float) -> str:
        return readable(value) if seconds else f"{value:,.0f}"

    return f"{said(statistics.median(values))} ({said(min(values))}–{said(max(values))})"


def describe(result: InputResult) -> str:
    """The table: a row for each contender."""
    rows = [
        [key, *(_cell(figure, figures[figure], result.settings.limit) for figure in FIGURES)]
        for key, figures in result.figures.items()
    ]
    legend = "\n".join(f"- {key}: {text}" for key, text in KINDS.items())
    return "\n\n".join(
        [
            "Median over the rounds (lowest–highest). Peak: above what the process had before its pipeline.",
            table(["pipeline", *FIGURES.values()], rows),
            legend,
        ]
    )


def write(out: Path, result: InputResult) -> Mapping[str, Any]:
    """Writes `input.json`, `input.md` and `input.png`. Returns the content of the JSON file."""
    record, settings = result.record(), result.settings
    title = (
        f"{result.facts['examples']:,} images at {settings.image_size}×{settings.image_size}, "
        f"{result.facts['machine']['cores']} cores"
    )
    try:
        files.write_text(out / "input.json", files.to_json(record, indent=2, ensure_ascii=False) + "\n")
        files.write_text(out / "input.md", describe(result) + "\n")
        charts.write_inputs(out / "input.png", result, title)
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out} cannot be written: {error}; free space or name another") from error
    return record


def benchmark(settings: InputSettings, out: Path) -> Mapping[str, Any]:
    """Measures all contenders, prints the table and writes it to `out`. Returns the content of the JSON file.

    Raises:
      BadConfiguration: the data set cannot be used, or `out` cannot be written.
      RunEnded: a contender has failed.
    """
    result = measure(settings)
    print(f"\n{describe(result)}", flush=True)
    record = write(out, result)
    print(f"\nwritten to {out}: input.json, input.md, input.png")
    return record
