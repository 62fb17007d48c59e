"""How robust networks are, of runs and of files: attacks, radii, corruptions, transfer, and what was found already."""
