"""Files that survive: checkpoints with checksums, atomic writes, one process a folder."""
