"""Tests of the drop-in modules; layers.py has what they share."""
