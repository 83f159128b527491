"""How fast is the loop? Beside its ceiling, Model.fit, a Python call for each compiled step, and the eager loop.

python trainers/benchmark.py
python trainers/benchmark.py --rows=mlp:32:1,resnet:128:2 --seconds=1
python trainers/benchmark.py --peers=jax                # Keras 3 on JAX and JAX by hand beside it, too
python trainers/benchmark.py --input=images:DIR         # the input pipeline alone, beside tf.data as it is written
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from models.cards import MODELS
from trainers.measure import charts, input_pipelines, jax_process, rounds
from trainers.measure.input_pipelines import InputSettings
from trainers.measure.rounds import Result, Row, describe
from trainers.settings import paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, Preempted
from trainers.settings.flags import fill, short_help_page
from trainers.settings.rules import resolve
from trainers.show.tables import paragraph, readable
from trainers.world import files, machine, process, quiet, signals

# Those that JAX's peers can train stand alone where `--peers=jax` is given without `--rows`.
JAX_ROWS = "mlp:32:1,resnet:128:1"
DEFAULT_ROWS = "mlp:32:1,mlp:32:2,resnet:128:1,resnet:128:2,vit:128:1,vit:128:2,transformer:64:1"


# ----------------------------------------------------------------------------------------------------------------------
# Flags.


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of the flags. `input`: what is measured in place of the rows, if the input pipeline is.

    `peers`: `jax`, or empty for those on TensorFlow alone.
    """

    rows: tuple[Row, ...]
    repeats: int
    seconds: float
    data_dir: str
    out_dir: Path
    input: InputSettings | None = None
    peers: str = ""


def row_from(text: str) -> Row:
    """The row of `model:batch:replicas`.

    Raises:
      BadConfiguration: the text is not of that form.
    """
    try:
        model, batch_size, replicas = text.split(":")
        return Row(model, int(batch_size), int(replicas))
    except ValueError:
        raise BadConfiguration(
            f"--rows {text!r} is not model:batch:replicas; pass e.g. mlp:32:1,resnet:128:2"
        ) from None


def settings_from(argv: Sequence[str]) -> Settings:
    """The settings of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      SystemExit: `--help` was given and its page has been printed; code 0.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("rows", DEFAULT_ROWS, "what is measured: model:batch:replicas, …", flag_values=values)
    flags.DEFINE_string("peers", "", "further peers: jax, in .venv.jax, on CPUs", flag_values=values)
    flags.DEFINE_string(
        "input", "", "images:DIR, or a set of TensorFlow Datasets: its input pipeline is measured", flag_values=values
    )
    flags.DEFINE_string(
        "augment", InputSettings.augment, "with --input: inception, or inception,flip", flag_values=values
    )
    flags.DEFINE_integer(
        "image_size", InputSettings.image_size, "with --input: of images", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("repeats", 5, "rounds, of which the median counts", lower_bound=1, flag_values=values)
    flags.DEFINE_float("seconds", 2.0, "of one measurement, about", lower_bound=0.05, flag_values=values)
    flags.DEFINE_string("data_dir", Config.data_dir, "where prepared data lies", flag_values=values)
    flags.DEFINE_string("out_dir", "runs/benchmark", "where the numbers, table and chart go", flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)
    fill(values, argv, lambda: short_help_page(__doc__, values))
    if chosen := input_settings(values):
        return Settings((), values.repeats, values.seconds, values.data_dir, Path(values.out_dir).expanduser(), chosen)
    chosen = JAX_ROWS if values.peers and not values["rows"].present else values.rows
    rows = tuple(row_from(text.strip()) for text in chosen.split(",") if text.strip())
    if not rows:
        raise BadConfiguration("--rows is empty; pass e.g. mlp:32:1,resnet:128:2")
    out = paths.local("--out_dir", values.out_dir)
    settings = Settings(rows, values.repeats, values.seconds, values.data_dir, out, peers=values.peers)
    _check_peers(settings)
    for row in rows:
        _check_row(row, settings)
    return settings


def _check_peers(settings: Settings) -> None:
    if settings.peers not in ("", "jax"):
        raise BadConfiguration(f"--peers {settings.peers!r} is not known; pass jax, or leave it out")
    for row in settings.rows if settings.peers else ():
        if row.model not in jax_process.MODELS or row.replicas > 1:
            raise BadConfiguration(
                f"--rows {row.model}:{row.batch_size}:{row.replicas}: JAX's peers train "
                f"{' and '.join(jax_process.MODELS)} on one replica; pass e.g. --rows={JAX_ROWS}"
            )
    if settings.peers:
        jax_process.check_there()


def input_settings(values: flags.FlagValues) -> InputSettings | None:
    """What `--input` and its flags say; None without it.

    Raises:
      BadConfiguration: flags that do not belong together, or a value that breaks a rule.
    """
    of_training = ("rows", "peers")
    given = [name for name in (*of_training, "augment", "image_size") if values[name].present]
    if not values.input:
        if wrong := [name for name in given if name not in of_training]:
            raise BadConfiguration(f"--{wrong[0]} belongs to --input=DATASET, which is not given; leave it out")
        return None
    if wrong := [name for name in given if name in of_training]:
        raise BadConfiguration(f"--{wrong[0]} measures training and --input the input alone; pass one of them")
    settings = InputSettings(
        values.input,
        values.augment,
        values.image_size,
        seconds=values.seconds,
        repeats=values.repeats,
        data_dir=values.data_dir,
    )
    settings.check()
    return settings


def _check_row(row: Row, settings: Settings) -> None:
    config_of(row, settings)
    if row.batch_size % row.replicas:
        raise BadConfiguration(
            f"--rows {row.model}:{row.batch_size}:{row.replicas}: the batch does not divide over the replicas; "
            "pass a multiple"
        )
    if MODELS[row.model].recipe.optimizer == "sam":
        raise BadConfiguration(
            f"--rows {row.model}: its optimizer takes two gradients a step, which Model.fit cannot; pass another model"
        )


def config_of(row: Row, settings: Settings, **changes: Any) -> Config:
    """The trainer's configuration of a row: the model's recipe and the default cadences, except for `changes`."""
    return resolve(
        Config(
            model=row.model,
            batch_size=row.batch_size,
            replicas=row.replicas,
            input="resident",
            data_dir=settings.data_dir,
            **({"eval_every": 0, "checkpoint_every": 0, "run_dir": "unused"} | changes),
        )
    )


# ----------------------------------------------------------------------------------------------------------------------
# The measurement.


def measure(row: Row, settings: Settings) -> Result:
    """Measures all contenders of a row."""
    from trainers.custom_loop import Supervised
    from trainers.input import load
    from trainers.measure.peers import contenders_of, jax_process_of
    from trainers.world import devices

    config = config_of(row, settings)
    world = devices.set_up(config)
    loop = Supervised(config, world, load.load(config.dataset, config.data_dir, "resident"))
    with contextlib.ExitStack() as stack:
        contenders = contenders_of(loop, functools.partial(config_of, row, settings), settings.seconds)
        if settings.peers:
            contenders += stack.enter_context(jax_process_of(loop)).contenders(settings.seconds)
        return rounds.measure(row, loop.num_parameters, contenders, settings.repeats, settings.seconds)


def benchmark(settings: Settings) -> dict[str, Any]:
    """Measures all rows, prints the table and writes it to `settings.out_dir`. Returns the content of the JSON file.

    Raises:
      BadConfiguration: out_dir cannot be written, the data is not available, or there are too few devices.
    """
    import keras

    from trainers.world import devices

    out = settings.out_dir
    # First of all, for the largest row: once an operation has run, the devices are what they are.
    devices.set_up(config_of(max(settings.rows, key=lambda row: row.replicas), settings))
    facts = machine.facts()
    if settings.peers and facts["device"].startswith("GPU"):
        raise BadConfiguration(
            "--peers=jax measures on CPUs, and here is a GPU; set CUDA_VISIBLE_DEVICES= for this run"
        )
    print(describe_machine(facts, settings), flush=True)
    results: list[Result] = []
    for row in settings.rows:
        results.append(measure(row, settings))
        spent = "  ".join(f"{key} {readable(statistics.median(v))}" for key, v in results[-1].seconds.items())
        print(f"{row}: {spent}", flush=True)
        # After each row: it has taken minutes, and the next row may be interrupted.
        record = write(out, facts, settings, results)
        keras.backend.clear_session()
    print(f"\n{describe(results)}", flush=True)
    print(f"\nwritten to {out}: benchmark.json, benchmark.md, benchmark.png")
    return record


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written.


def describe_machine(facts: dict[str, Any], settings: Settings) -> str:
    """Where and how the rows are measured."""
    return paragraph(
        f"{facts['device']}, {facts['cores']} CPU cores (load average at the start {facts['load_average']}), "
        f"TensorFlow {facts['versions']['tensorflow']}: {settings.repeats} rounds; in each of them each contender has "
        f"about {settings.seconds:g} s. Virtual CPU devices share the cores: two of them compute no faster than one. "
        "Compare within a row."
    )


def write(out: Path, facts: dict[str, Any], settings: Settings, results: Sequence[Result]) -> dict[str, Any]:
    """Writes numbers, table and chart of the rows so far. Returns the content of the JSON file."""
    record = {
        "machine": facts,
        "flags": {"repeats": settings.repeats, "seconds": settings.seconds, "peers": settings.peers},
        "rows": [result.facts() for result in results],
    }
    try:
        files.write_text(out / "benchmark.json", files.to_json(record, indent=2, ensure_ascii=False) + "\n")
        files.write_text(out / "benchmark.md", describe(results) + "\n")
        charts.write_throughputs(out / "benchmark.png", results, f"{facts['device']}, {facts['cores']} cores")
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out} cannot be written: {error}; free space or name another") from error
    return record


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def main(settings: Settings) -> None:
    """Runs the benchmark.

    Raises:
      BadConfiguration: as `benchmark`.
      Preempted: a signal came.
    """
    out = settings.out_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out} cannot be made: {error.strerror}; name a directory") from None
    came = signals.unwind_on_signal()
    try:
        if settings.input:
            input_pipelines.benchmark(settings.input, out)
        else:
            measure_training(settings)
    except BaseException as error:
        if not came and not isinstance(error, Preempted):  # that one is of our loop, and speaks of a run
            raise
        done = "nothing is written" if settings.input else f"rows that were measured are in {out}/benchmark.json"
        raise Preempted(f"stopped by a signal; {done}; the same command measures everything again") from None


def measure_training(settings: Settings) -> None:
    """Imports TensorFlow and measures the rows."""
    quiet.import_tensorflow()
    import tensorflow as tf

    logging.set_verbosity(logging.WARNING)
    # TensorFlow warns that replicas are slow eagerly, which is what a contender measures.
    tf.get_logger().setLevel("ERROR")
    benchmark(settings)


if __name__ == "__main__":
    process.main(settings_from, main)
