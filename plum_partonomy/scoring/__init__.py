"""Predictions and answers of any model, their metrics, intervals and reports. Never imports torch."""
