"""Training recipes: networks, data, training loop, evaluation, and the `engm` command (extra `engm[recipes]`)."""
