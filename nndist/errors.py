"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input: one line that names the flag or file, the value, and the remedy.

    Commands print it once and exit with code 2, without a traceback unless `--traceback` is given.
    """


class TrainingError(Exception):
    """Training can't go on, such as a loss that is not finite: one line with the step, the cause and the remedy.

    Commands print it once and exit with code 1.
    """
