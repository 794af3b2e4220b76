"""The PARTONOMY toolkit: masks, records, sources, questions and metrics. It never imports the model, nor torch."""
