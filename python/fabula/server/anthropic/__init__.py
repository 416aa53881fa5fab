"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

Its clients change the base URL and nothing else. Requests become the messages, tools and settings that OpenAI's routes
use too; answers become content blocks, whole or as Anthropic's events.
"""

from __future__ import annotations

from quart import Blueprint


def blueprints() -> list[Blueprint]:
    """The routes below /v1/messages."""
    from fabula.server.anthropic.messages import routes

    return [routes]
