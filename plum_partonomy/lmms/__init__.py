"""PARTONOMY as tasks of lmms-eval and PLUM as one of its models; neither package imports the other without it."""
