"""How fast the steps of a run go: for the length of the next call, and for the rates in metrics.jsonl."""

import time

import numpy as np

from trainers.world import process

# A compiled call lasts about this long: short enough to answer a signal, long enough that Python costs nothing.
CALL_SECONDS = 1.0


class Pace:
    """Counts calls, their steps and seconds. `fixed`: updates in a call; 0 = about `CALL_SECONDS` worth of them."""

    def __init__(self, fixed: int):
        self.fixed = fixed
        self.calls = 0
        # What this process has measured, and what all workers have agreed on; 0 = not known yet.
        self.own_seconds = self.seconds_per_step = 0.0
        # For run.json: `first_update`, the seconds of the first call and how old the process was at its end; `steady`,
        # steps and seconds since the second call.
        self.facts: dict[str, dict[str, float]] = {}
        self._window_steps, self._window_seconds = 0.0, 0.0
        self._began = self._steady_began = 0.0
        self._steady_step = 0

    def longest_call(self) -> int:
        """Updates that the next call does at most."""
        if self.fixed:
            return self.fixed
        return max(int(CALL_SECONDS / self.seconds_per_step), 1) if self.seconds_per_step else 1

    def begin_call(self) -> None:
        """Starts the clock of a call."""
        self._began = time.monotonic()

    def end_call(self, first: int, last: int) -> float:
        """Ends the call of steps `first … last`, which reached `last`. Returns its seconds a step."""
        self.calls += 1
        now = time.monotonic()
        took = (now - self._began) / float(last - first)
        if self.calls > 1:  # the first call of all pays for what is done once
            self.own_seconds = took
        if self.calls == 1:
            self.facts["first_update"] = {"call_seconds": now - self._began, "process_seconds": process.age()}
        elif self.calls == 2:
            self._steady_step, self._steady_began = last, now
        elif self.calls > 2:
            self.facts["steady"] = {"steps": last - self._steady_step, "seconds": now - self._steady_began}
        return took

    def rates(self, first: int, steps: np.ndarray, logged: list[bool], took: float) -> list[float]:
        """Steps a second of each window that is logged. `steps`: where the windows of a call end, `first` its begin."""
        rates = []
        for step, is_logged in zip(steps, logged, strict=True):
            self._window_seconds += took * (step - first)
            self._window_steps += step - first
            first = step
            if is_logged:
                rates.append(float(self._window_steps / self._window_seconds))
                self._window_steps, self._window_seconds = 0.0, 0.0
        return rates
