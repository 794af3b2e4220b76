"""Make benchmark questions and training conversations from part examples: statistics, distractors, wording."""
