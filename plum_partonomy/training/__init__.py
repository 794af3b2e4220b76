"""Examples, mixtures, the starting model, and the trainer."""
