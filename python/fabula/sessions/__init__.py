"""Conversations as trees of turns."""
