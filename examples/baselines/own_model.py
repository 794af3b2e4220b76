"""Your own model on PARTONOMY, with some of three methods:

    python evaluate_plum.py --baseline examples/baselines/own_model.py --name mini_questions --output_dir runs/own

This example answers by colour: it takes the choice with the most parts, and returns for each part the pixels unlike
the border of the image. `seen` is the result of `encode`, computed once per image.
"""

import numpy as np


class Model:
    def encode(self, image):
        pixels = np.asarray(image, dtype=float)  # (height, width, 3)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        return np.linalg.norm(pixels - np.median(border, axis=0), axis=2) > 60

    def choose(self, seen, messages, choices):
        """Return a score for each choice, larger is better. `messages` are {"role", "content"} up to the question."""
        return [choice.count(",") for choice in choices]

    def answer(self, seen, messages):
        """Return the generated answer: names of parts, in plain text."""
        return "hull, and mast"

    def segment(self, seen, question, parts):
        """Return for each part a boolean mask (height, width) of the image, and a confidence."""
        return [(seen, 0.5) for part in parts]
