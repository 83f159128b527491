"""Ends the process when Python cannot: while a call of C++ holds Python's lock, no Python thread or handler runs.

TensorFlow's start of a context of several workers waits for peers that way. What ends the process then is a chain of
calls of the C library, prepared beforehand, in a thread that knows nothing of Python: a timer of the kernel starts
it, or it waits for a signal. Each call is a context of its own (man 3 makecontext) that continues with the next. Where
the C library has none of this, `available()` is false and nothing here does anything.
"""

from __future__ import annotations  # launch/doctor.py runs on Python 3.9 too

import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from trainers.settings.exit_codes import PEER_LOST, PREEMPTED

# Between the first call of a chain and the one that cannot be undone: time in which a living Python can close the gate.
GRACE_SECONDS = 2
# For the stacks of all threads to be written.
_TELLING_SECONDS = 5
# For a thread to read what is there already.
_READING_SECONDS = 5
# Upon it Python's C code writes the stacks of all threads, without its lock.
_DUMP = signal.SIGRTMAX - 2 if sys.platform == "linux" else None
_CONTEXT_BYTES, _STACK_BYTES, _SEMAPHORE_BYTES, _TEXT_BYTES = 4096, 32768, 64, 400
_CLOCK_MONOTONIC, _SIGEV_THREAD = 1, 2


class _Event(ctypes.Structure):
    """`struct sigevent`."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 64),
    ]


class _Span(ctypes.Structure):
    """`struct itimerspec`: of a timer that fires once, `seconds` and `nanoseconds` from now."""

    _fields_ = [(name, ctypes.c_long) for name in ("every", "every_nanoseconds", "seconds", "nanoseconds")]


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        for name in ("getcontext", "makecontext", "setcontext", "timer_create", "sem_init", "pthread_create"):
            getattr(library, name)
    except (OSError, AttributeError):
        return None
    return library if sys.platform == "linux" and sys.maxsize > 2**32 else None


def available() -> bool:
    """Whether the C library has what this needs."""
    return _library() is not None


def _address(name: str) -> int:
    return ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _memory(size: int) -> int:
    """The address of so many bytes, zeroed. They are never freed: threads use them while Python itself ends."""
    calloc = _library().calloc
    calloc.restype = ctypes.c_void_p
    return calloc(ctypes.c_size_t(1), ctypes.c_size_t(size))


class Gate:
    """Open until it is closed. A chain passes it once; after `close` it waits at it for ever."""

    def __init__(self):
        self.address = _memory(_SEMAPHORE_BYTES)
        _library().sem_init(ctypes.c_void_p(self.address), 0, 1)

    def close(self) -> bool:
        """Nobody passes from now on. A chain that has passed already goes on. Returns whether it was open."""
        return _library().sem_trywait(ctypes.c_void_p(self.address)) == 0

    def opens_within(self, seconds: float) -> bool:
        """Waits until a chain has opened it (`sem_post`), and closes it again. Returns whether one has."""
        end = time.monotonic() + seconds
        while not (opened := self.close()) and time.monotonic() < end:
            time.sleep(0.0005)
        return opened


class Chain:
    """Calls of the C library, `(name, *arguments)` with whole numbers, one after another. The last never returns.

    No signal reaches their thread: a context has the mask that it was made with.
    """

    def __init__(self, calls: Sequence[tuple]):
        with _signals_blocked():
            self.first = self._contexts(calls)

    @staticmethod
    def _contexts(calls: Sequence[tuple]) -> int:
        """Where the context of the first call lies."""
        following = 0
        for name, *arguments in reversed(calls):
            place = (_memory(_CONTEXT_BYTES) + 63) & ~63
            _library().getcontext(ctypes.c_void_p(place))
            # The beginning of a ucontext_t: flags, the context that follows, and the stack's place, flags and size.
            fields = ctypes.cast(place, ctypes.POINTER(ctypes.c_uint64))
            fields[1], fields[2], fields[3], fields[4] = following, _memory(_STACK_BYTES), 0, _STACK_BYTES
            numbers = [ctypes.c_long(argument) for argument in arguments]
            function = ctypes.c_void_p(_address(name))
            _library().makecontext(ctypes.c_void_p(place), function, len(numbers), *numbers)
            following = place
        return following

    def start(self) -> None:
        """Begins the chain in a thread of its own."""
        thread = ctypes.c_ulong()
        begin = ctypes.c_void_p(_address("setcontext"))
        with _signals_blocked():
            _library().pthread_create(ctypes.byref(thread), None, begin, ctypes.c_void_p(self.first))


class _Timer:
    """Starts a chain once, when its time has come."""

    def __init__(self, chain: Chain):
        event = _Event(value=chain.first, notify=_SIGEV_THREAD, function=_address("setcontext"))
        self._timer = ctypes.c_void_p()
        _library().timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))

    def arm(self, seconds: float) -> None:
        """Fires in `seconds`, and not when it would have; 0 = never."""
        whole, rest = divmod(seconds, 1)
        span = _Span(0, 0, int(whole), int(rest * 1e9))
        _library().timer_settime(self._timer, 0, ctypes.byref(span), None)


class Deadline:
    """Ends the process with code 75 and the stacks of all threads, whatever holds Python's lock, unless it is moved."""

    def __init__(self):
        self._text = _memory(_TEXT_BYTES)
        self._begin()

    def _begin(self) -> None:
        """Two chains, since who reads what is written may be stuck as well."""
        # The descriptor: `sys.stderr` may be an object without one, in a notebook or a test.
        faulthandler.register(_DUMP, file=2, all_threads=True)
        self._gates = Gate(), Gate()
        telling = [("sleep", GRACE_SECONDS), ("sem_wait", self._gates[0].address)]
        # At the end the first gate once more, which is closed by now: a chain that is done would end the process.
        telling += [
            ("write", 2, self._text, _TEXT_BYTES),
            ("kill", os.getpid(), _DUMP),
            ("sem_wait", self._gates[0].address),
        ]
        ending = [("sleep", GRACE_SECONDS), ("sem_wait", self._gates[1].address)]
        ending += [("sleep", _TELLING_SECONDS), ("_exit", PEER_LOST)]
        self._timers = [_Timer(Chain(calls)) for calls in (telling, ending)]

    def move(self, seconds: float, message: str) -> None:
        """The end comes in `seconds`, and a little, with this line; 0 = never."""
        line = message.encode()[: _TEXT_BYTES - 1].ljust(_TEXT_BYTES - 1) + b"\n"
        ctypes.memmove(self._text, line, _TEXT_BYTES)
        for timer in self._timers:
            timer.arm(seconds)

    def begin_again(self) -> None:
        """Calls off an end that may have begun: the process did not run for a while."""
        for gate in self._gates:
            gate.close()
        self.move(0, "")
        self._begin()


@functools.cache
def deadline() -> Deadline | None:
    """The one of this process, or None where there cannot be one."""
    return Deadline() if available() else None


class SecondByte:
    """Ends the process with code 143 at the second byte that comes through a pipe: the second signal.

    `pipe`: the end to read from, which this closes.
    """

    def __init__(self, pipe: int):
        self._pipe, self._gate, self._has_read = pipe, Gate(), Gate()
        self._has_read.close()
        read = ("read", pipe, _memory(8), 1)
        has_read = ("sem_post", self._has_read.address)
        Chain([read, read, has_read, ("sem_wait", self._gate.address), ("_exit", PREEMPTED)]).start()

    def call_off(self, writer: int) -> None:
        """The process goes on, whatever comes. `writer`: the pipe's other end, which does not block."""
        self._gate.close()
        with contextlib.suppress(BlockingIOError):  # full: there is enough to read
            os.write(writer, b"\0\0")
        # Closed under a thread that reads, the number might be another file's by the time that it reads once more.
        if self._has_read.opens_within(_READING_SECONDS):
            os.close(self._pipe)
