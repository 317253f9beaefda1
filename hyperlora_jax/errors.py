"""Exceptions that end a command with one line instead of a traceback."""


class UserError(Exception):
    """Bad input. The message is one line: the file or argument, what was found, what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


class Preempted(Exception):
    """The run was told to stop and has saved `step`; start the same command again to go on."""

    def __init__(self, step: int, workdir: str):
        super().__init__(f"preempted: saved step {step} in {workdir}; the same command continues")
        self.step = step
        self.workdir = workdir


class Interrupted(Exception):
    """Ctrl-C was pressed, and the run has saved `step`."""

    def __init__(self, step: int, workdir: str):
        super().__init__(f"interrupted: the same command goes on from step {step} ({workdir})")
        self.step = step
        self.workdir = workdir


class TrainingDiverged(Exception):
    """The loss or its gradient is not finite. The last checkpoint is from before."""
