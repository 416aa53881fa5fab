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

routes = Blueprint("text", __name__)


@routes.post("/tokenize")
@tag(["Text"])
@validate_request(TextBody)
@document_response(TokensReply, 200)
@fails(*WRITING)
async def tokenize(data: TextBody) -> Any:
    """The token ids of a text."""
    state = server()
    state.limits.check_text(data.text, "text")
    model = state.model(data.model).model
    assert model is not None
    special = data.special if data.parse_special is None else data.parse_special
    ids = await state.call(lambda: model.tokenizer.encode(data.text, special=special, add_bos=data.add_bos))
    return {"tokens": ids, "n_tokens": len(ids)}


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

    def work() -> str:
        for i, token in enumerate(data.tokens):
            if not 0 <= token < tokenizer.vocab_size:
                message = f"tokens[{i}] is {token}, must be in 0 .. {tokenizer.vocab_size - 1}"
                raise ApiError(400, "invalid_value", message, param="tokens")
        return tokenizer.decode(data.tokens, skip_special=data.skip_special)

    return {"text": await state.call(work)}


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
