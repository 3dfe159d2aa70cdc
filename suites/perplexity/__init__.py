"""Tests of perplexity; measuring.py has what they share."""
