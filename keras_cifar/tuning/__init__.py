"""The search for flags with Optuna: the space and the trials."""
