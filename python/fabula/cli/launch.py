"""`fabula launch`: runs a coding agent with a running server as its model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import click

from fabula.cli.console import note
from fabula.errors import InvalidArgument

ADDRESS = "http://127.0.0.1:8000"  # where `fabula serve` listens by default
NO_KEY = "none"  # what clients that insist on a key send to a server without any
MAX_REPLY_BYTES = 1 << 20
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Launch:
    """How a client is started.

    Attributes:
        words: program and arguments.
        environment: variables to set.
    """

    words: tuple[str, ...]
    environment: dict[str, str]

    def as_shell(self) -> str:
        """The same as a line for a shell."""
        values = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*values, *map(shlex.quote, self.words)])


def claude(url: str, model: str, key: str) -> Launch:
    """Claude Code (its documentation: "Environment variables")."""
    tiers = {f"ANTHROPIC_DEFAULT_{tier}_MODEL": model for tier in ("OPUS", "SONNET", "HAIKU")}
    return Launch(
        ("claude", "--model", model),
        {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": key,
            "ANTHROPIC_API_KEY": "",  # any value would be preferred to the token
            "ANTHROPIC_MODEL": model,
            **tiers,
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a line of the prompt that changes with every request
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
    )


def codex(url: str, model: str, key: str) -> Launch:
    """Codex (its documentation: "Custom model providers")."""
    settings = {
        "model_provider": "fabula",
        "model_providers.fabula.name": "Fabula",
        "model_providers.fabula.base_url": f"{url}/v1",
        "model_providers.fabula.env_key": "OPENAI_API_KEY",
        "model_providers.fabula.wire_api": "responses",
    }
    flags = [word for name, value in settings.items() for word in ("-c", f"{name}={json.dumps(value)}")]
    return Launch(("codex", "--model", model, *flags), {"OPENAI_API_KEY": key})


def opencode(url: str, model: str, key: str) -> Launch:
    """opencode (its documentation: "Config" and "Providers")."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Fabula",
        "options": {"baseURL": f"{url}/v1", "apiKey": key},
        "models": {model: {"name": model}},
    }
    config = {"provider": {"fabula": provider}, "model": f"fabula/{model}"}
    return Launch(("opencode",), {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def aider(url: str, model: str, key: str) -> Launch:
    """aider (its documentation: "OpenAI compatible APIs")."""
    return Launch(("aider", "--model", f"openai/{model}"), {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": key})


CLIENTS: dict[str, Callable[[str, str, str], Launch]] = {
    "aider": aider, "claude": claude, "codex": codex, "opencode": opencode,
}  # fmt: skip


@click.command(short_help="Run a coding agent with this server's model.")
@click.argument("client", type=click.Choice(sorted(CLIENTS)))
@click.argument("words", nargs=-1, metavar="[-- WORDS...]")
@click.option("--url", default=ADDRESS, metavar="URL", help=f"Address of the server.  [{ADDRESS}]")
@click.option("--model", metavar="NAME", help="Default: the server's first.")
@click.option("--key", default=NO_KEY, metavar="KEY", help="API key of the server, if it has keys.")
@click.option("--print", "only_print", is_flag=True, help="Print the line for a shell and run nothing.")
def launch(client: str, words: tuple[str, ...], url: str, model: str | None, key: str, only_print: bool) -> None:
    """Run CLIENT with its variables set so that it uses a running Fabula server. WORDS are passed on to it.

    \b
    Examples:
      fabula launch claude
      fabula launch aider --model smollm2-135m-instruct -- README.md
      fabula launch codex --print
    """
    url = url.rstrip("/")
    made = CLIENTS[client](url, model or first_model(url, key), key)
    made = Launch((*made.words, *words), made.environment)
    if only_print:
        click.echo(made.as_shell())
        return
    program = shutil.which(made.words[0])
    if program is None:
        raise InvalidArgument(f"{made.words[0]} is not installed; the line for it: {made.as_shell()}")
    note(f"{client} uses {url}")
    os.execve(program, made.words, {**os.environ, **made.environment})


def first_model(url: str, key: str) -> str:
    """Name of a server's first model.

    Raises:
        InvalidArgument: there is no server, or it refuses.
    """
    try:
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            name = json.loads(reply.read(MAX_REPLY_BYTES))["data"][0]["id"]
    except urllib.error.HTTPError as error:
        raise InvalidArgument(f"{url} replied {error.code}; --key gives its API key") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidArgument(f"there is no server at {url} ({error}); `fabula serve` starts one") from None
    return str(name)
