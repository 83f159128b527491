"""Going back: a run whose loss is not finite continues from its last checkpoint, over the data that led there.

Update `step` takes the data of position `step + ahead`. A run that goes from step `at` back to step `to` is `at - to`
further ahead: a source, by index or as a stream, just goes on where it is, and nothing is traced again. Source of the
idea: Chowdhery et al., "PaLM: scaling language modeling with pathways", JMLR 2023, section 5.1.

run.json has each time at once, so that no restart begins to count anew; checkpoints that follow hold the two numbers.
"""

from typing import Any

import numpy as np

from trainers.record.run_record import RunRecord
from trainers.record.state import State
from trainers.run import workers
from trainers.world.devices import World

# In checkpoints, after the first time: how often, and `ahead`. In run.json: a list of all times.
NAME = "loop/rewinds"
FACT = "rewinds"


class Rewinds:
    """How often a run has gone back, at `most`, and how far it is ahead in the data: the same on all workers."""

    def __init__(self, most: int, record: RunRecord, world: World):
        self.most, self.record, self.world = most, record, world
        self.count = self.ahead = 0
        self.known: list[dict[str, Any]] = list(record.facts.get(FACT, ()))

    def state(self) -> State:
        """What a checkpoint holds."""
        return {NAME: np.array([self.count, self.ahead], np.int64)} if self.count else {}

    def take(self, step: int, values: State) -> None:
        """Takes its part out of the values of the checkpoint of a step.

        What run.json knows beyond the checkpoint went back to it; or it comes again, since a later one is damaged.
        """
        count, ahead = map(int, values.pop(NAME, (0, 0)))
        for each in self.known[count:]:
            if each.get("to") != step:
                break
            count, ahead = count + 1, each["ahead"]
        self.count, self.ahead = (int(workers.from_chief(self.world, value)) for value in (count, ahead))
        self.known = (self.known + [{}] * self.count)[: self.count]  # a run.json may be lost
        if self.known:
            self.record.facts[FACT] = self.known

    def went_back(self, at: int, to: int, ahead: int) -> None:
        """Writes down that a run has gone from a step back to the checkpoint of another, whose part it has taken."""
        self.known = [*self.known, {"at": at, "to": to, "ahead": ahead}]
        self.count, self.ahead = self.count + 1, ahead
        self.record.write(**{FACT: self.known})
