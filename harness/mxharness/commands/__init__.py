"""The commands of `mxharness`: one module per group, thin, heavy imports inside the functions."""
