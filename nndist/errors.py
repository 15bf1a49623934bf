"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input: one line that names the flag or file, the value, and the remedy.

    Commands print it once and exit with code 2, without a traceback unless `--traceback` is given.
    """


class Preempted(Exception):
    """A signal asked the run to stop; it has been saved and the same command continues it.

    signal: the signal's number. Commands exit with 128 + that.
    """

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


class TrainingError(Exception):
    """Training can't go on, such as a loss that is not finite: one line with the step, the cause and the remedy.

    Commands print it once and exit with code 1.
    """


def lost_a_process(error: BaseException) -> bool:
    """Whether an error says that another process went away or did not answer in time."""
    words = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "Broken pipe", "NCCL", "gloo")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def timed_out(error: BaseException) -> bool:
    """Whether another process did not answer in time, so that it will not say why either."""
    return lost_a_process(error) and any(word in str(error) for word in ("Timed out", "timed out", "timeout"))
