"""KV cache: Python has page tables, reference counts and eviction; the native pool has the bytes."""
