"""Who owns which KV page: Python keeps the tables, the native pool keeps the bytes."""
