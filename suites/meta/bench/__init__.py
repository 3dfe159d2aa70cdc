"""Tests of the bench; rows.py has what they share."""
