"""Predictions and answers of any model, their metrics, confidence intervals and reports. Never imports torch."""
