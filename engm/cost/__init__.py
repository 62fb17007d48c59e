"""Which form of a norm is cheaper on a device: the constants that decide, where they lie and how they are measured."""
