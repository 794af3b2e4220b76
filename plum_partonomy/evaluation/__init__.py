"""Evaluation runs: PARTONOMY's questions, other tasks, and corrections."""
