"""The API's description as an HTML page that loads nothing from other hosts."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from quart import Blueprint, Response, current_app
from quart_schema import hide

from fabula.engine.sampling import MODEL_SETTINGS
from fabula.server.state import server
from fabula.server.stream import dumps

routes = Blueprint("docs", __name__)

DESCRIBED = "fabula.described"
MODELS_HERE = "<!-- models -->"
SAMPLING = "Sampling"  # the schema of sampling settings

STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff;
}
h1 { margin-bottom: 0 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
summary { cursor: pointer; padding: .3rem 0 }
code { font: 14px/1.4 ui-monospace, monospace }
.method { display: inline-block; width: 4rem; font-weight: 600 }
.quiet { color: #595959 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem }
td, th { text-align: left; vertical-align: top; padding: .25rem .6rem; border-top: 1px solid #ddd }
.wide { overflow-x: auto }
details { margin: .2rem 0 }
pre { overflow-x: auto; padding: .5rem .8rem; border-left: 3px solid #ccc; font: 14px/1.4 ui-monospace, monospace }
details[open] > summary { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #161616 }
  .quiet { color: #a5a5a5 }
  td, th, h2, pre { border-color: #444 }
  a { color: #8ab4f8 }
}
"""


@routes.get("/docs/style.css")
@hide
async def style() -> Response:
    return Response(STYLE, mimetype="text/css")


@routes.get("/docs")
@hide
async def docs() -> Response:
    """The page, with the sampling defaults of each model."""
    before, after = (await _described())[1].split(MODELS_HERE)
    return Response(before + _models() + after, mimetype="text/html")


def _models() -> str:
    """The sampling defaults of the models that are loaded, as a table; "" for none."""
    loaded = [(name, serving.model.defaults) for name, serving in server().models.items() if serving.model is not None]
    if not loaded:
        return ""
    heads = "".join(f"<th><code>{escape(name)}</code></th>" for name in ("model", *MODEL_SETTINGS, "source"))
    rows = ""
    for name, defaults in loaded:
        values = (escape(str(value)) for value in defaults.to_json().values())
        rows += f"<tr><td>{escape(name)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
    about = "Values of settings that neither a request nor its session gives; <code>/health</code> has them too."
    return f"<h2>Sampling defaults</h2><p>{about}</p><div class='wide'><table><tr>{heads}</tr>{rows}</table></div>"


@routes.get("/openapi.json")
@hide
async def openapi() -> Response:
    """The OpenAPI document of the page."""
    return Response((await _described())[0], mimetype="application/json")


async def _described() -> tuple[str, str]:
    """The description as JSON and as HTML. Cached, since it takes 0.2 s and needs no key."""
    extensions = current_app.extensions
    if DESCRIBED not in extensions:
        provider = extensions["QUART_SCHEMA"].openapi_provider

        def make() -> tuple[str, str]:
            schema = provider.schema()
            return dumps(schema) + "\n", page(schema)

        extensions[DESCRIBED] = await server().call(make)
    found: tuple[str, str] = extensions[DESCRIBED]
    return found


def page(schema: dict[str, Any]) -> str:
    """HTML of an OpenAPI document."""
    about: dict[str, Any] = schema["info"]
    groups: dict[str, list[str]] = {}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            group = (operation.get("tags") or ["Other"])[0]
            groups.setdefault(group, []).append(_operation(path, method, operation, schema))
    parts = "".join(f"<h2>{escape(name)}</h2>{''.join(found)}" for name, found in groups.items())
    sampling = schema["components"]["schemas"].get(SAMPLING)
    if sampling is not None:
        about_sampling = (
            "Every body that says “Sampling settings” may have these; so may the field <code>sampling</code>."
        )
        parts += (
            f'<h2 id="{SAMPLING}">Sampling settings</h2><p>{about_sampling}</p>{_table("Setting", _rows(sampling))}'
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(about["title"])} API</title><link rel="stylesheet" href="/docs/style.css"></head><body>'
        f'<h1>{escape(about["title"])} API</h1><p class="quiet">Version {escape(about["version"])} · '
        f'<a href="/openapi.json">OpenAPI document</a></p><p>{escape(about.get("description") or "")}</p>'
        f"{MODELS_HERE}{parts}</body></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    parts = [f"<p>{escape(operation.get('description') or operation.get('summary') or '')}</p>"]
    rows = [
        (one["name"], one.get("schema", {}), one.get("required", False), one.get("description", ""))
        for one in operation.get("parameters", [])
    ]
    if rows:
        parts.append(_table("Parameter", rows))
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if "schema" in content:
        parts.append(_fields("Body", content["schema"], schema))
    if "example" in content:
        parts.append(_example(content["example"]))
    for status, response in sorted(operation.get("responses", {}).items()):
        if status.startswith("2"):
            content = response.get("content", {})
            found = content.get("application/json", {}).get("schema")
            stream = " or a stream of events" if "text/event-stream" in content else ""
            parts.append(f"<p>{escape(status)}{stream}: {escape(response.get('description') or '')}</p>")
            if found is not None:
                parts.append(_fields("Reply", found, schema))
    errors = [
        f"<tr><td>{escape(status)}</td><td>{escape(response.get('description') or '')}</td></tr>"
        for status, response in sorted(operation.get("responses", {}).items())
        if not status.startswith("2")
    ]
    if errors:
        parts.append(f"<details><summary class='quiet'>Errors</summary><table>{''.join(errors)}</table></details>")
    title = escape(operation.get("summary") or "")
    return (
        f'<details id="{escape(method + path.replace("/", "-"))}"><summary><code><span class="method">'
        f'{escape(method.upper())}</span>{escape(path)}</code> <span class="quiet">{title}</span></summary>'
        f"{''.join(parts)}</details>"
    )


def _fields(title: str, found: dict[str, Any], schema: dict[str, Any]) -> str:
    """A table of a body's fields, those that must be given first; sampling settings are listed once, behind."""
    found = _resolved(found, schema)
    rows = _rows(found)
    sampling = schema["components"]["schemas"].get(SAMPLING, {}).get("properties", {})
    has_sampling = bool(sampling) and sampling.keys() <= found.get("properties", {}).keys()
    if has_sampling and len(rows) > len(sampling):
        rows = [row for row in rows if row[0] not in sampling]
        rows.append(("…", {"$ref": SAMPLING}, False, "Sampling settings, as listed below."))
    return _table(title, rows) if rows else ""


def _rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool, str]]:
    required = set(found.get("required", []))
    rows = [
        (name, about, name in required, about.get("description", ""))
        for name, about in found.get("properties", {}).items()
    ]
    return sorted(rows, key=lambda row: not row[2])


def _example(example: object) -> str:
    return f"<pre>{escape(json.dumps(example, ensure_ascii=False, indent=2))}</pre>"


def _table(title: str, rows: list[tuple[str, dict[str, Any], bool, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if needed else ''}</td><td><code>{escape(_kind(about))}</code></td>"
        f"<td>{escape(text or '')}</td></tr>"
        for name, about, needed, text in rows
    )
    return f"<table><tr><th>{escape(title)}</th><th></th><th></th></tr>{cells}</table>"


def _resolved(found: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = found.get("$ref", "")
    if not reference:
        return found
    target: dict[str, Any] = schema.get("components", {}).get("schemas", {}).get(reference.rpartition("/")[2], {})
    return target


def _kind(about: dict[str, Any]) -> str:
    """The type of a field, in words."""
    if "$ref" in about:
        return str(about["$ref"]).rpartition("/")[2]
    if "anyOf" in about:
        return " | ".join(_kind(one) for one in about["anyOf"])
    if "enum" in about:
        return " | ".join(str(one) for one in about["enum"])
    if "const" in about:
        return str(about["const"])
    if about.get("type") == "array":
        return f"[{_kind(about.get('items', {}))}]"
    return str(about.get("type", "any"))
