"""The library behind PLUM and PARTONOMY: records, readers, questions, scoring, training and inference."""
