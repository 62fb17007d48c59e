"""What a forward pass remembers: which layers are watched, the calls they made, and how long those are kept."""
