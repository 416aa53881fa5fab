#!/bin/sh
# Uses a running `fabula serve` with curl: two turns, a rollback, another second turn, and deletion.
#
#   sh examples/client_rest.sh                          # asks http://127.0.0.1:8000
#   FABULA_URL=http://127.0.0.1:9000 FABULA_KEY=... sh examples/client_rest.sh
set -eu
url=${FABULA_URL:-http://127.0.0.1:8000}

post() { # path, JSON
    echo "> POST $1 $2"
    curl --silent --show-error --fail-with-body "$url$1" \
        -H "Content-Type: application/json" -H "Authorization: Bearer ${FABULA_KEY:-}" -d "$2"
}

post /chat '{"session_id": "abc123", "message": "Hello, how are you?", "max_len": 60, "top_p": 0.8, "top_k": 30, "temperature": 1.0}'
post /chat '{"session_id": "abc123", "message": "Tell me about the sea.", "max_len": 60}'
post /rollback '{"session_id": "abc123", "target_turn": 1}'
post /chat '{"session_id": "abc123", "message": "Tell me about the hills, word by word.", "max_len": 20, "stream": true}'
post /delete_session '{"session_id": "abc123"}'
