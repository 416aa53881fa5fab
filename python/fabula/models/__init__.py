"""Model families: each reads a checkpoint's config and emits a program of operators. See `families.py` for the list."""
