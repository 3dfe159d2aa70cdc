"""The two ways a command can end badly that are not a failed check."""


class UserError(Exception):
    """The caller asked for something that cannot be done.

    The message is one sentence that says what was wrong and what exists; the command line prints it
    without a traceback and exits 2.
    """


class Unavailable(UserError):
    """Something the machine lacks: a compiler, a driver, a package, a file. The message says what to install."""


class KernelFailure(Exception):
    """A kernel did not end as it should: a barrier not reached by all threads, a fault on the GPU."""
