"""One backward pass without weight gradients, and what comes out of it: terms, norms, gradients of the inputs."""
