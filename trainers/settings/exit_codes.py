"""The one place that names the exit codes of a run, and the exceptions that end it with one.

A launcher, a Job's podFailurePolicy or a shell decides by these numbers whether to start the run again.
"""

OK = 0
CRASHED = 1
BAD_CONFIGURATION = 2
DIVERGED = 65
PEER_LOST = 75
PREEMPTED = 143
# Of trainers/predict.py alone: rows of the input could not be used, and the others are answered.
ROWS_UNUSABLE = 3

RETRY = {
    OK: "complete",
    BAD_CONFIGURATION: "never: a flag, the configuration, the data or run_dir is unusable",
    DIVERGED: "never: the loss or a gradient is not finite",
    PEER_LOST: "yes: a worker was lost, a step took too long, or a store did not answer; a checkpoint exists",
    PREEMPTED: "yes, free: SIGTERM or SIGINT came; a checkpoint was written first",
}
# What a cluster's manager does with them: any other code but 0 is retried, and counted.
NEVER_RETRIED = (BAD_CONFIGURATION, DIVERGED)
RETRIED_FREE = (PREEMPTED,)


class RunEnded(Exception):  # noqa: N818 - not every end is an error
    """A run ends for a reason that the user can act on; the message is one line, `exit_code` its number."""

    exit_code = 1


class BadConfiguration(RunEnded):
    """A value breaks a rule. The message names the value, the rule and the remedy."""

    exit_code = BAD_CONFIGURATION


class RunDirRemoved(BadConfiguration):
    """Somebody has removed run_dir while the run writes to it."""


class UnsavedVariable(BadConfiguration):
    """A variable is used in training and would be missing from checkpoints."""


class Diverged(RunEnded):
    """The loss or a gradient is not finite. The message names the step and the last good checkpoint."""

    exit_code = DIVERGED


class PeerLost(RunEnded):
    """A peer was lost or never came, or the step watchdog fired."""

    exit_code = PEER_LOST


class StoreLost(PeerLost):
    """An object store cannot be reached, or what belongs there could not be written."""


class Preempted(RunEnded):
    """SIGTERM or SIGINT came, and a checkpoint of the last finished step lies in run_dir."""

    exit_code = PREEMPTED
