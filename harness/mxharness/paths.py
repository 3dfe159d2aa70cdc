"""Where things lie: the only place that knows whether this is a checkout or an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from mxharness.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The repository root when the package lies in <root>/harness/mxharness, None in an installed wheel."""
    root = _PACKAGE.parent.parent
    if _PACKAGE.parent.name == "harness" and (root / "kernels").is_dir():
        return root
    return None


def root() -> Path:
    """The folder that holds kernels/, suites/, baselines/ and reports/; never written to by an installed wheel."""
    return checkout() or _PACKAGE / "_bundle"


def kernels() -> Path:
    """The folder of the .cu and .cuh files."""
    return root() / "kernels"


def suites() -> Path:
    """The folder of the pytest suites."""
    return root() / "suites"


def baselines() -> Path:
    """The folder of the baselines that came with this version, to read."""
    return root() / "baselines"


def reports() -> Path:
    """The folder of the report's templates and styles."""
    return root() / "reports"


def writable_baselines() -> Path:
    """Where `baseline create` writes: the checkout's baselines/, else ./baselines in the working directory."""
    return (checkout() or Path.cwd()) / "baselines"


def cache() -> Path:
    """Where compiled kernels and downloads are kept; the environment variable MXHARNESS_CACHE overrides it.

    Not created here: the caller that writes makes it.
    """
    override = os.environ.get("MXHARNESS_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    try:
        return Path(platformdirs.user_cache_dir("mxharness"))
    except RuntimeError as error:  # no HOME and no entry in the user database
        raise UserError("this user has no home folder; set MXHARNESS_CACHE to a folder for the cache") from error
