"""Which form of a norm is cheaper on a device: the constants that decide, how they are kept and how they are measured."""
