"""Which form of a norm is cheaper on a device: the constants that decide, where they lie, how they are measured."""
