"""PARTONOMY as tasks of lmms-eval, and PLUM as one of its models. No other package imports this one."""
