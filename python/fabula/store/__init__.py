"""Durable sessions: trees of turns in a SQLite file or a PostgreSQL database.

records     sessions and turns as data, and their rows with checksums
schema      tables of the newest schema version; migrations/ creates them from older ones
location    path or URL of a store, file lock, connections
failures    converts database errors to Fabula's errors
changes     writes, as SQL
reading     reads, as SQL
writer      the writer thread: group commit, and checkpoints of unfinished turns
store       `Store`, the interface

This file imports nothing: a session in memory needs only the records, and importing SQLAlchemy takes longer than
loading a small model.
"""
