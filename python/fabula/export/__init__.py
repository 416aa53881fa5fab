"""A model written as a GGUF file, in any precision: what each tensor becomes, and what a Hugging Face folder says as
GGUF metadata."""
