"""The search for flags with Optuna: the space, the trials, the picture."""
