"""Rungs, the way down them, and the search for a batch size."""
