"""Exports models as GGUF files in any precision: tensors, and config and tokenizer as GGUF metadata."""
