"""Formats that a model is handed over in: a module each, with `export(model, base, class_names)`."""
