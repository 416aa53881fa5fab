"""An example body for each operation of the API: `/docs` and the OpenAPI document show them, and a test sends them.

In order: each one finds what those before it left. Only `/sessions/import` has none: it takes what an export gave.
"""

from __future__ import annotations

from typing import Any

SESSION = "letters"

EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/sessions"): {"session_id": SESSION, "title": "To Ada", "system": "Be brief."},
    ("post", "/chat"): {"session_id": SESSION, "message": "Name a lighthouse.", "max_len": 64, "temperature": 0.7},
    ("post", "/tags"): {"session_id": SESSION, "turn": 1, "tag": "harbor"},
    ("post", "/branch"): {"session_id": SESSION, "n": 3, "max_len": 16},
    ("post", "/regenerate"): {"session_id": SESSION, "max_len": 64},
    ("post", "/continue"): {"session_id": SESSION, "max_len": 32},
    ("post", "/edit"): {"session_id": SESSION, "turn": 1, "message": "Name two lighthouses.", "max_len": 64},
    ("post", "/replay"): {"session_id": SESSION, "turn": 1},
    ("post", "/rollback"): {"session_id": SESSION, "turn": "harbor"},
    ("post", "/redo"): {"session_id": SESSION},
    ("post", "/alternatives"): {"session_id": SESSION, "turn": 1, "position": 0, "n": 5},
    ("post", "/turn_tokens"): {"session_id": SESSION, "turn": 1},
    ("post", "/fork_at"): {"session_id": SESSION, "turn": 1, "position": 0, "token_id": 42, "max_len": 32},
    ("post", "/rewrite"): {"session_id": SESSION, "turn": 1, "text": "The Eddystone."},
    ("post", "/fork"): {"session_id": SESSION, "turn": "harbor", "new_session_id": "letters-2"},
    ("patch", "/sessions/{id}"): {"title": "To Ada, again", "sampling": {"top_p": 0.9}},
    ("post", "/count"): {"session_id": SESSION, "message": "And one in Cornwall?"},
    ("post", "/stop"): {"session_id": SESSION},
    ("post", "/story"): {"session_id": "night", "prompt": "Once upon a time", "max_len": 64},
    ("post", "/write"): {"session_id": "night", "text": " It began to rain."},
    ("post", "/tokenize"): {"text": "Hello, world"},
    ("post", "/detokenize"): {"tokens": [42, 43]},
    ("post", "/render"): {"texts": ["**bold**"]},
    ("post", "/delete_session"): {"session_id": "letters-2"},
    ("post", "/v1/chat/completions"): {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64},
    ("post", "/v1/completions"): {"prompt": "Once upon a time", "max_tokens": 64},
    ("post", "/v1/responses"): {"input": "Hello!", "max_output_tokens": 64},
    ("post", "/v1/conversations"): {
        "metadata": {"topic": "lighthouses"},
        "items": [{"type": "message", "role": "user", "content": "Hello!"}],
    },
    ("post", "/v1/conversations/{id}/items"): {"items": [{"type": "message", "role": "user", "content": "Good day."}]},
    ("post", "/v1/responses/input_tokens"): {"input": "Hello!"},
    ("post", "/v1/embeddings"): {"input": ["a lighthouse", "the sea"]},
    ("post", "/completion"): {"prompt": "Once upon a time", "n_predict": 64},
    ("post", "/infill"): {"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "n_predict": 16},
    ("post", "/apply-template"): {"messages": [{"role": "user", "content": "Hello!"}]},
    ("post", "/embedding"): {"content": "a lighthouse"},
    ("post", "/rerank"): {"query": "ships at night", "documents": ["a lighthouse", "a cookbook"]},
    ("post", "/v1/messages"): {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64},
    ("post", "/v1/messages/count_tokens"): {"messages": [{"role": "user", "content": "Hello!"}]},
    ("post", "/api/show"): {"model": "smollm2-135m-instruct"},
    ("post", "/api/chat"): {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Hello!"}],
        "options": {"num_predict": 64},
    },
    ("post", "/api/generate"): {
        "model": "smollm2-135m-instruct",
        "prompt": "Once upon a time",
        "stream": False,
        "options": {"num_predict": 64},
    },
    ("post", "/api/embed"): {"model": "smollm2-135m-instruct", "input": ["a lighthouse", "the sea"]},
    ("post", "/api/embeddings"): {"model": "smollm2-135m-instruct", "prompt": "a lighthouse"},
    ("post", "/api/pull"): {"model": "smollm2-135m-instruct"},
    ("post", "/api/copy"): {"source": "smollm2-135m-instruct", "destination": "smol"},
    ("delete", "/api/delete"): {"model": "smol"},
}
# Which of them need more than any server has: a model with tokens for it, a conversation, leave to load models.
CONDITIONAL = frozenset({"/infill", "/v1/conversations/{id}/items", "/api/pull", "/api/copy", "/api/delete"})
