"""Load a checkpoint, ask about one image, and predict batches of benchmark questions."""
