"""The two ways a command can end badly that are not a failed check."""

from __future__ import annotations


class UserError(Exception):
    """The caller asked for something that cannot be done.

    The message is one sentence that says what was wrong and what exists; the command line prints it
    without a traceback and exits 2.
    """


class Unavailable(UserError):
    """Something the machine lacks: a compiler, a driver, a package, a file. The message says what to install."""


class KernelFailure(Exception):
    """A kernel did not end as it should: a barrier not reached by all threads, a fault on the GPU."""


class Hung(KernelFailure):
    """A kernel, or the process that ran it, did not end within its limit."""


class OutOfBounds(KernelFailure):
    """A kernel touched memory that it may not touch, or as it may not; "@" in the text stands for the address."""

    def __init__(self, text: str, address: int) -> None:
        super().__init__(text.replace("@", f"address {address:#x}"))
        self.text = text
        self.address = address

    def at(self, place: str) -> OutOfBounds:
        """The same with a name for the address, as "byte 3 past the end of input codes"."""
        named = OutOfBounds(self.text.replace("@", place), self.address)
        named.text = self.text
        return named
