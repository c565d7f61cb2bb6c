"""Epochs: updates, what is watched between them, evaluation, and the stop by a signal."""
