"""`--tracker`: the metrics of a run in MLflow or in W&B too, sent by the chief from a thread of its own.

What is sent is read from metrics.jsonl, as it grows: that file is the queue. So nothing is handed over in the step,
what waits takes no memory, and a tracker that was down gets what it has missed, in this attempt or in the next. How far
it has come lies in `run_dir/tracker.json`, with the tracked run's id, by which a resumed run goes on with it.
"""

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.record import carriers, reading, trackers
from trainers.record.goodput import FACT
from trainers.record.run_record import RunRecord
from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.settings.tracker import parse
from trainers.world import files, process
from trainers.world.watchdog import Watchdog

# Seconds between two looks at metrics.jsonl, and at most between two tries of a tracker that fails.
_EVERY_SECONDS, _LONGEST_PAUSE = 2.0, 60.0
# Seconds that the end of a run waits for what is left.
END_SECONDS = 10.0
_TRY_AGAIN_SECONDS = 0.5
# Bytes of metrics.jsonl that are sent at once. The thread rests so many times as long as it has computed for them:
# Python's lock is also the training's.
_MOST_BYTES, _RESTS = 1 << 16, 20.0


class Lines:
    """metrics.jsonl as it grows, each whole line once; from its begin again where it was replaced."""

    def __init__(self, path: Path):
        self._path, self._at, self._file = path, 0, None

    def again(self) -> None:
        """What comes next is the first line."""
        self._at = 0

    def take(self) -> tuple[list[dict[str, Any]], bool]:
        """Some lines that have come, and whether there are more. Raises OSError."""
        try:
            with open(self._path, "rb") as file:
                stat = os.fstat(file.fileno())
                if self._file != stat.st_ino or stat.st_size < self._at:
                    self._file, self._at = stat.st_ino, 0
                file.seek(self._at)
                data = file.read(_MOST_BYTES)
                if b"\n" not in data:  # a long line, or one that is not written to its end
                    data += file.readline()
                    data = data if data.endswith(b"\n") else b""
        except FileNotFoundError:
            return [], False
        data = data[: data.rfind(b"\n") + 1]
        self._at += len(data)
        found = []
        for text in data.splitlines():
            with contextlib.suppress(ValueError):
                found.append(reading.numbers(json.loads(text)))
        return [line for line in found if "step" in line and "split" in line], bool(data)


class Note:
    """`run_dir/tracker.json`: which tracked run this is, and what was sent of it.

    `key`: known before the tracked run is made; `id`: what the tracker calls it; `sent`: the last step by split;
    `rewinds`: how often the run had gone back then.
    """

    def __init__(self, run_dir: Path, about: Mapping[str, Any]):
        self._path = run_dir / reading.TRACKER
        known: dict[str, Any] = {}
        with contextlib.suppress(ValueError, OSError):
            known = reading.read_json(self._path)
        if {name: known.get(name) for name in about} != about:
            known = {}  # another tracker, or another place there
        # Sent, and perhaps not kept yet by who was told: when, and the last steps.
        self._on_the_way: list[tuple[float, dict[str, int]]] = []
        self.facts = dict(about) | {"key": secrets.token_hex(8), "id": None, "sent": {}, "rewinds": 0} | known

    def write(self, **facts: Any) -> None:
        """Adds facts. Raises OSError."""
        self.facts.update(facts)
        files.write_text(self._path, files.to_json(self.facts, indent=1) + "\n")

    def is_new(self, line: Mapping[str, Any]) -> bool:
        """Whether a line was not sent. A resumed run repeats some, to the same values."""
        sent = self._on_the_way[-1][1] if self._on_the_way else self.facts["sent"]
        return line["step"] > sent.get(line["split"], -1)

    def has_sent(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines were sent; `keep` notes it."""
        before = self._on_the_way[-1][1] if self._on_the_way else self.facts["sent"]
        self._on_the_way.append((time.monotonic(), before | {line["split"]: line["step"] for line in lines}))

    def keep(self, after: float) -> None:
        """Notes what was sent so many seconds ago, which a kill cannot take back any more. Raises OSError."""
        sent = None
        while self._on_the_way and self._on_the_way[0][0] <= time.monotonic() - after:
            sent = self._on_the_way.pop(0)[1]
        if sent:
            self.write(sent=sent)

    def go_back(self, step: int, rewinds: int) -> None:
        """What comes after a step is sent anew. Raises OSError."""
        sent = self._on_the_way[-1][1] if self._on_the_way else self.facts["sent"]
        self._on_the_way.clear()
        self.write(sent={split: min(known, step) for split, known in sent.items()}, rewinds=rewinds)


class Tracking:
    """Context in which the chief of a run tells a tracker of it, if `--tracker` names one. Nothing of it ends a run.

    At the end what is left is sent, for `END_SECONDS` at most.
    """

    def __init__(self, record: RunRecord, watchdog: Watchdog):
        self.record, self._watchdog, self.tracker = record, watchdog, parse(record.config.tracker)
        self._ends, self._has_sent_all, self._given_up = threading.Event(), False, False
        self._tracked: trackers.Tracked | None = None
        self._note: Note | None = None
        self._lines, self._batch = Lines(record.metrics_path), []
        self._reason = ""
        # A daemon: who never answers must not keep a process that is to end.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> "Tracking":
        if self.tracker and self.record.writes:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if not self._thread.ident:
            return
        self._watchdog.feed("the tracker", self._watchdog.seconds + 2 * END_SECONDS)
        self._ends.set()
        self._thread.join(END_SECONDS)
        self._given_up = True
        if self.record.begun and not self._has_sent_all:
            why = f" ({self._reason})" if self._reason else ""
            process.say(
                f"--tracker {self.tracker.name}: not all was sent within {END_SECONDS:.0f} s of the end{why}; the rest "
                "goes with the next start of the run"
            )
        if self.record.begun and not (kind and issubclass(kind, StoreLost)):
            # What was noted, and W&B's files, belong to a run in an object store too.
            with contextlib.suppress(StoreLost, BadConfiguration, OSError):
                carriers.settle(self.record.directory, self._watchdog.feed)

    def _work(self) -> None:
        while not (self.record.begun or self._ends.wait(0.05)):
            pass
        pause, ending = 0.0, False
        while self.record.begun and not self._given_up:
            ending = self._ends.wait(pause)
            began = time.thread_time()
            try:
                more = self._send(ending)
                pause = max(_RESTS * (time.thread_time() - began), 0.0 if more else _EVERY_SECONDS)
                if ending and not more:
                    self._has_sent_all = True
                    return
            except (Exception, SystemExit) as error:  # whatever a library raises
                self._tell(error)
                pause = min(max(2 * pause, _EVERY_SECONDS), _LONGEST_PAUSE)
                if ending:
                    time.sleep(_TRY_AGAIN_SECONDS)

    def _tell(self, error: BaseException) -> None:
        """Says once why nothing is sent."""
        # An address may hold a password.
        words = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))
        if not self._reason:
            process.say(
                f"--tracker {self.tracker.name}: {type(error).__name__}: {words[:300]}; the run goes on, and what is "
                "not sent is tried again"
            )
        self._reason = f"{type(error).__name__}: {words[:100]}"

    def _send(self, ending: bool) -> bool:
        """Sends some lines; at the end, after the last, what became of the run. Returns whether there is more to send.

        Raises what the tracker's library raises; what was not sent is the next thing to be sent.
        """
        if self._tracked is None:
            self._begin()
        rewinds = list(self.record.facts.get("rewinds", ()))
        if len(rewinds) > self._note.facts["rewinds"]:
            # What comes after the checkpoint is written anew, with other values.
            last = min(each.get("to", 0) for each in rewinds[self._note.facts["rewinds"] :])
            self._note.go_back(last, len(rewinds))
            self._batch = []
            self._lines.again()
        more = True
        if not self._batch:
            found, more = self._lines.take()
            self._batch = [line for line in found if self._note.is_new(line)]
        if self._batch:
            self._tracked.log(self._batch)
            self._note.has_sent(self._batch)
            self._batch = []
        elif ending and not more:
            self._tracked.end(*self._end())
        if not self._given_up:
            self._note.keep(0.0 if ending and not more else self._tracked.keeps_after)
        return more

    def _begin(self) -> None:
        """Makes the tracked run, or goes on with it."""
        record, options = self.record, dict(self.tracker.options)
        name = options.pop("name", str(record.shown).rstrip("/").rpartition("/")[2])
        self._note = self._note or Note(record.directory, {"tracker": self.tracker.name, "of": options})
        self._note.write()  # the key, before anything is made with it
        card = {key: str(value) for key, value in record.card().items() if not key.startswith("--")}
        facts = card | {"run_dir": str(record.shown), "attempts": str(record.facts["attempts"])}
        flags = {key: value for key, value in record.facts["flags"].items() if value not in (None, "")}
        known = dict(self._note.facts)
        tracked = trackers.KINDS[self.tracker.name](options, name, record.directory, known, flags, facts)
        if self._given_up:
            return
        if known["id"] and tracked.id != known["id"]:  # it was deleted there
            known |= {"sent": {}, "rewinds": 0}
            self._lines.again()
        self._note.write(id=tracked.id, sent=known["sent"], rewinds=known["rewinds"])
        process.say(f"tracker   {tracked.where}")
        self._tracked = tracked

    def _end(self) -> tuple[int, dict[str, float], dict[str, str], int | None]:
        """How this attempt has ended: its last step, goodput, words for it, and its code."""
        facts = self.record.facts
        words = {"exit_code": facts.get("exit_code"), "exit_reason": facts.get("exit_reason"), "ended": facts["ended"]}
        told, goodput = facts.get(FACT), {}
        step = told["attempts"][-1]["step"] if told else facts.get("step", 0)
        if told:
            goodput = {f"{FACT}/{part}": share for part, share in told["shares"].items()}
            goodput[f"{FACT}/wall_seconds"] = told["wall_seconds"]
        exported = {}
        with contextlib.suppress(ValueError, OSError):
            exported = reading.read_json(self.record.directory / reading.EXPORT / reading.METADATA)
        if exported:
            words |= {"export": f"{self.record.shown}/{reading.EXPORT}", "formats": ",".join(exported["formats"])}
        return step, goodput, {key: str(value) for key, value in words.items()}, facts.get("exit_code")
