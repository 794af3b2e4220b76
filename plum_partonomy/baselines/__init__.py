"""Models of others on PARTONOMY's questions: SAM 3, any vision-language model, both together, or your own."""
