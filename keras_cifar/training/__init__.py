"""A run: from the configuration to the selected model."""
