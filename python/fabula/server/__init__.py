"""The server: Fabula's own API and one that OpenAI's clients speak, over the sessions of one workspace."""

from fabula.server.app import create_app
from fabula.server.settings import Settings

__all__ = ["Settings", "create_app"]
