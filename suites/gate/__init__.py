"""Tests of the gate; made.py has what they share."""
