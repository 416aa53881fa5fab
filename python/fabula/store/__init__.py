"""Durable sessions: trees of turns in a SQLite file, or in PostgreSQL, that outlive the process.

records     what a session and a turn are as data, and their rows with checksums
schema      tables of the newest schema version; migrations/ makes them from older ones
place       where a store lies: path or URL, lock, connections
failures    what went wrong, as one of Fabula's errors
changes     the writes, as SQL
reading     the reads, as SQL
writer      the thread that writes: group commit, and checkpoints of turns that are being made
store       `Store`: all of it together

Nothing is imported here: a session in memory needs only the records, and SQLAlchemy takes longer to import than a small
model to load.
"""
