"""Classifying images with an exported model or a server."""
