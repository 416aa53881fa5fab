"""Measuring: operators against plain loops, models against other engines, perplexity."""
