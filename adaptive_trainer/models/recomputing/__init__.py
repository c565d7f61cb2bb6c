"""Recomputation of activations: which operators of a forward pass run again in the backward pass, and how."""
