"""What training, evaluation, the shell and the app share around the model; none of it travels with a checkpoint."""
