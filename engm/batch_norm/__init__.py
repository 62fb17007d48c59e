"""Batch normalisation in training mode: statistics held constant, the factors that map norms, the local correction."""
