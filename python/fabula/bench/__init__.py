"""Benchmarks: operators against plain loops, models and servers against other engines, sessions, perplexity."""
