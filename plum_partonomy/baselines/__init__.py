"""Other models on PARTONOMY's questions: SAM 3, any vision-language model, both combined, or your own."""
