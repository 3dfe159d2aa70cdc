"""`python -m mxharness`: the command line, as `mxharness` starts it."""

from mxharness.cli import main

main()
