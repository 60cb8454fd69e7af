"""Formats that a model is handed over in: a module each, with `export(model, base, class_names)`.

`folding` is no format: it makes the network that is exported out of the one that was trained.
"""
