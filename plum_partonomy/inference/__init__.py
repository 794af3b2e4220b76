"""Loads a checkpoint, asks about one image, and predicts batches of benchmark questions."""
