"""mxharness: numerical validation and regression harness for MXFP4 kernels."""

__version__ = "0.1.0"
