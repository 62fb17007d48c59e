"""What the tests of normalization layers share: losses in a network's dtype, and layers away from their first state."""

import torch
from oracle import dtype_of, random_losses


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x.to(dtype_of(net))), seed)


def shaken(module, seed=0):
    """Scales, shifts and running statistics away from 1 and 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor_ in [*module.parameters(), *module.buffers()]:
            if tensor_.is_floating_point():
                tensor_.add_(0.3 * torch.rand_like(tensor_))
    return module
