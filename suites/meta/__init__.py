"""Tests of the harness itself; made.py has what they share."""
