"""The process in which JAX's peers train (`trainers.measure.jax_peers`), as contenders of `trainers/benchmark.py`.

JAX and TensorFlow have environments of their own; the rounds ask the process for so many updates, and it says the
seconds. It waits without computing while others have their turn, and ends when its input does. Free of TensorFlow.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainers.measure.rounds import Contender, Steps, best_of, calibrated
from trainers.settings.exit_codes import BadConfiguration, RunEnded
from trainers.world.machine import ROOT

# What JAX's peers train, as `trainers/measure/jax_peers.py` has it.
MODELS = ("mlp", "resnet")
_PYTHON = ROOT / ".venv.jax/bin/python"
_MAKE = "python3 launch/environment.py jax"
_CODE = "from trainers.measure import jax_peers; jax_peers.main()"
_MESSAGE_LINES = 3


def check_there() -> None:
    """Raises BadConfiguration if the environment of JAX's peers has not been made."""
    if not _PYTHON.exists():
        raise BadConfiguration(f"--peers=jax needs an environment of its own, {_PYTHON.parents[1]}; run `{_MAKE}`")


class JaxProcess:
    """A process that trains `model` by `recipe` on a file of examples. `facts`: its versions, parameters, contenders.

    Raises:
      BadConfiguration: the environment is not there, or JAX cannot be used in it.
    """

    def __init__(self, model: dict[str, Any], recipe: dict[str, Any], data: Path):
        check_there()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the process
        self._child = subprocess.Popen(
            [_PYTHON, "-P", "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        )
        try:
            self.facts = self.ask(model=model, recipe=recipe, data=str(data))
        except RunEnded as error:
            self.close()
            raise BadConfiguration(
                f"--peers=jax: {_PYTHON.parents[1]} cannot be used ({error}); remove it and run `{_MAKE}`"
            ) from None
        except BaseException:
            self.close()
            raise

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question.

        Raises:
          RunEnded: there is none, or it is an error.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        if not line.endswith("\n"):
            self._complaints.seek(0)
            said = self._complaints.read().strip().splitlines()[-_MESSAGE_LINES:]
            raise RunEnded(f"the process of JAX's peers has ended: {' / '.join(said) or 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            raise RunEnded(f"JAX's peer: {answer['error']}")
        return answer

    def steps(self, key: str, name: str) -> Steps:
        """Seconds of so many updates of a contender."""
        return lambda count: self.ask(key=key, name=name, steps=count)["seconds"]

    def contenders(self, seconds: float) -> list[Contender]:
        """Each peer at its best in trials. `seconds`: of a measurement; no call lasts longer, but the shortest."""
        trial = seconds / 2

        def ways(key: str) -> Iterator[Contender]:
            made = self.facts["contenders"][key]
            first, *_ = made
            step = calibrated(self.steps(key, first), trial)[1]
            for name, updates in made.items():
                if name == first or updates * step <= seconds:
                    yield Contender(key, name, self.steps(key, name))

        versions = " and ".join(f"{name} {version}" for name, version in self.facts["versions"].items())
        best = [best_of(ways(key), trial) for key in self.facts["contenders"]]
        return [dataclasses.replace(contender, name=f"{contender.name} ({versions})") for contender in best]

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._complaints):
            with contextlib.suppress(OSError):
                stream.close()


@contextlib.contextmanager
def peers(
    model: dict[str, Any], recipe: dict[str, Any], inputs: np.ndarray, targets: np.ndarray, parameters: int
) -> Iterator[JaxProcess]:
    """The process, until the end of the block. `inputs`: `[examples, …]`, float32; `targets`: `[examples]`.

    Raises:
      BadConfiguration: as `JaxProcess`.
      RunEnded: its model has not as many `parameters`.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "examples.npz")
        np.savez(data, inputs=inputs, targets=targets)
        with contextlib.closing(JaxProcess(model, recipe, data)) as process:
            if (found := process.facts["parameters"]) != parameters:
                raise RunEnded(
                    f"JAX's peers have {found:,} parameters and our {model['kind']} {parameters:,}; bring "
                    "trainers/measure/jax_peers.py up to models/"
                )
            yield process
