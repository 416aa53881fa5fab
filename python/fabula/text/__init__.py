"""Text to token ids and back: tokenizers from both file formats, streaming decode, chat templates."""
