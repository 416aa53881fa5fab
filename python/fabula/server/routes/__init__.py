"""The routes of the server, a file for each part of the API."""

from __future__ import annotations

from quart import Blueprint


def blueprints() -> list[Blueprint]:
    """Every part of the API."""
    from fabula.server import anthropic, llama, ollama, openai
    from fabula.server.routes import chat, docs, health, metrics, page, sessions, streams, text, usage, walk

    own = [module.routes for module in (chat, walk, sessions, streams, text, health, metrics, usage, page, docs)]
    return own + [one for face in (openai, llama, anthropic, ollama) for one in face.blueprints()]
