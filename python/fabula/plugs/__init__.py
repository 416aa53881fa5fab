"""Plugins for other programs. Each module is loaded by its program, and nothing here imports them."""
