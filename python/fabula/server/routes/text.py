"""Tokenizes, detokenizes, and counts a message's tokens."""

from __future__ import annotations

from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.server.describe import WRITING, fails
from fabula.server.failures import ApiError
from fabula.server.replies import CountReply, TextReply, TokensReply
from fabula.server.schemas import CountBody, TextBody, TokensBody
from fabula.server.state import server
from fabula.text.tokenizer import Tokenizer

routes = Blueprint("text", __name__)


@routes.post("/tokenize")
@tag(["Text"])
@validate_request(TextBody)
@document_response(TokensReply, 200)
@fails(*WRITING)
async def tokenize(data: TextBody) -> Any:
    """The token ids of a text."""
    state = server()
    text = data.text if data.content is None else data.content
    if text is None:
        raise ApiError(400, "missing_field", "text is missing", param="text")
    state.limits.check_text(text, "text" if data.content is None else "content")
    model = state.model(data.model).model
    assert model is not None
    tokenizer = model.tokenizer
    default = data.special or data.content is not None
    special = default if data.parse_special is None else data.parse_special
    add_bos = (data.add_bos or data.add_special) and (data.content is None or tokenizer.add_bos)
    ids = await state.call(lambda: tokenizer.encode(text, special=special, add_bos=add_bos))
    return {"tokens": _pieces(tokenizer, ids) if data.with_pieces else ids, "n_tokens": len(ids)}


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, Any]]:
    """Tokens with their texts; bytes where one is not UTF-8 by itself."""
    found = []
    for token in ids:
        data = tokenizer.token_bytes(token)
        try:
            piece: str | list[int] = data.decode()
        except UnicodeDecodeError:
            piece = list(data)
        found.append({"id": token, "piece": piece})
    return found


@routes.post("/detokenize")
@tag(["Text"])
@validate_request(TokensBody)
@document_response(TextReply, 200)
@fails(*WRITING)
async def detokenize(data: TokensBody) -> Any:
    """The text of token ids."""
    state = server()
    model = state.model(data.model).model
    assert model is not None
    tokenizer = model.tokenizer

    def work() -> dict[str, Any]:
        for i, token in enumerate(data.tokens):
            if not 0 <= token < tokenizer.vocab_size:
                message = f"tokens[{i}] is {token}, must be in 0 .. {tokenizer.vocab_size - 1}"
                raise ApiError(400, "invalid_value", message, param="tokens")
        text = tokenizer.decode(data.tokens, skip_special=data.skip_special)
        return {"text": text, "content": tokenizer.decode(data.tokens, skip_special=False)}

    return await state.call(work)


@routes.post("/count")
@tag(["Text"])
@validate_request(CountBody)
@document_response(CountReply, 200)
@fails(*WRITING)
async def count(data: CountBody) -> Any:
    """How many tokens a message adds, and whether it fits. Nothing is generated."""
    state, tenant = server(), g.tenant
    state.limits.check_text(data.message, "message")

    def work() -> dict[str, Any]:
        if data.session_id is None:
            model = state.model(data.model).model
            assert model is not None
            session = model.session(system=data.system)
        elif data.system is not None or data.model is not None:
            raise ApiError(400, "invalid_value", "system and model are set by the session; leave them out")
        else:
            session = state.open(tenant, data.session_id)
        found = session.count(data.message, chat=not data.story, parse_special=data.parse_special)
        return {
            "prompt_tokens": found.prompt_tokens,
            "new_tokens": found.new_tokens,
            "context": found.context,
            "fits": found.fits,
            "max_answer": found.max_answer,
            "cut": found.cut.to_json() if found.cut is not None else None,
        }

    return await state.call(work)
