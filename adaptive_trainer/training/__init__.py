"""The Trainer: stages, rungs, epochs, checkpoints, and taking them up again."""
