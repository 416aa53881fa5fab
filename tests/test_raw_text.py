"""Control tokens written in a text: control tokens in raw texts, text in messages, and a switch each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import InvalidArgument, Model, SamplingParams, Session, Workspace
from fabula.text.tokenizer import Tokenizer
from test_openai_inside import Inside, inside

BOS, EOS, IM_START, IM_END = range(4)
SHORT = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
RAW = "<|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture
def with_bos(tmp_path: Path) -> Tokenizer:
    """The tiny tokenizer with the habit of putting its start token in front."""
    tokenizer = Tokenizer.from_folder(tiny.write_model(tmp_path / "bos"))
    tokenizer.add_bos = True
    return tokenizer


def ids(model: Model, text: str, special: bool) -> list[int]:
    return model.tokenizer.encode(text, special=special)


# ---- SDK ------------------------------------------------------------------------------------------------------------


def test_generate_reads_control_tokens_unless_told_not_to(model: Model) -> None:
    assert IM_START in ids(model, RAW, True) and IM_START not in ids(model, RAW, False)
    for options, special in (
        ({}, True),
        ({"parse_special": True}, True),
        ({"parse_special": False}, False),
        ({"special": False}, False),
        ({"special": True, "parse_special": False}, True),
    ):
        with model.generate(RAW, SHORT, **options) as generation:
            assert generation.prompt_ids == ids(model, RAW, special), options


def test_messages_are_text_unless_told_otherwise(model: Model) -> None:
    typed = [{"role": "user", "content": "a<|im_end|>b"}]
    plain, parsed = model.chat_ids(typed), model.chat_ids(typed, parse_special=True)
    assert plain.count(IM_END) == 1 and parsed.count(IM_END) == 2
    assert parsed == ids(model, "<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n", True)
    with model.chat(typed, SHORT, parse_special=True) as generation:
        assert generation.prompt_ids == parsed
    parts = [{"role": "user", "content": [{"type": "text", "text": "a<|im_end|>b"}]}]
    template = model.tokenizer.make_template(
        "{% for m in messages %}<|im_start|>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    from fabula.text.chat import with_control_tokens

    assert model.tokenizer.encode_chat(template, with_control_tokens(parts)).count(IM_END) == 1
    assert model.tokenizer.encode_chat(template, parts).count(IM_END) == 0


def test_a_text_that_brings_its_start_token_gets_no_second_one(with_bos: Tokenizer) -> None:
    assert with_bos.encode("<s>the", special=True)[:2] == [BOS, with_bos.encode("the", add_bos=False)[0]]
    assert with_bos.encode("the", special=True)[0] == BOS
    assert with_bos.encode("<s>the").count(BOS) == 1  # as text, after the start token
    assert with_bos.encode("<s><s>the", special=True).count(BOS) == 2  # both are the caller's
    assert with_bos.encode("<s>the", special=True, add_bos=True).count(BOS) == 2  # asked for


def test_embeddings_read_control_tokens_unless_told_not_to(model: Model) -> None:
    parsed, plain = model.embed(["the<|im_end|>"]), model.embed(["the<|im_end|>"], parse_special=False)
    assert parsed.n_tokens == (len(ids(model, "the<|im_end|>", True)),)
    assert plain.n_tokens == (len(ids(model, "the<|im_end|>", False)),)
    assert not np.allclose(parsed.vectors, plain.vectors)


# ---- Stories --------------------------------------------------------------------------------------------------------


def prompt_of(session: Session) -> list[int]:
    return list(session.head.prompt_ids)


def test_a_story_keeps_its_switch(model: Model) -> None:
    """An option that is not given stays as before, wherever the story continues."""
    for begin, special in ((None, True), (True, True), (False, False)):
        session = model.session()
        session.tell(prompt=RAW, params=SHORT, parse_special=begin).text()
        assert prompt_of(session) == ids(model, RAW, special)
        first = session.head
        session.tell(prompt="<|im_end|>b", params=SHORT).text()
        assert prompt_of(session)[-len(ids(model, "<|im_end|>b", special)) :] == ids(model, "<|im_end|>b", special)
        session.edit(session.head, "<|im_start|>", SHORT).text()
        assert (IM_START in prompt_of(session)) is special
        session.write("<|im_start|>x")
        assert (IM_START in prompt_of(session)) is special
        session.rollback(first)
        written = session.rewrite(first, "<|im_end|>!")
        assert list(written.token_ids) == ids(model, "<|im_end|>!", special)
        assert session.count("<|im_start|>", chat=False).new_tokens == len(ids(model, "<|im_start|>", special))
        # The other way, where it is said.
        session.tell(prompt="<|im_start|>", params=SHORT, parse_special=not special).text()
        assert (IM_START in prompt_of(session)) is not special
        replies = session.branch(2, "<|im_start|>", SHORT, parse_special=special)
        assert all(IM_START in list(reply.generation.prompt_ids)[-2:] for reply in replies) is special
        for reply in replies:
            reply.cancel()


def test_replay_gives_the_same_ids_here_and_elsewhere(model: Model, tiny_folder: Path, tmp_path: Path) -> None:
    for special in (True, False):
        session = model.session()
        hot = SamplingParams(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
        session.tell(prompt=RAW, params=hot, parse_special=special).text()
        made = session.head
        session.replay(made).text()
        assert (session.head.prompt_ids, session.head.token_ids) == (made.prompt_ids, made.token_ids)
        taken = model.import_(session.export(), id=f"elsewhere{special}")
        turn = taken.path[-1]
        assert turn.said.parse_special is special and turn.prompt_ids == made.prompt_ids
        taken.replay(turn).text()
        assert (taken.head.prompt_ids, taken.head.token_ids) == (made.prompt_ids, made.token_ids)
    with Workspace(tmp_path / "kept") as workspace:
        workspace.load(tiny_folder, threads=1, name="tiny")
        kept = workspace.session("kept", model="tiny")
        kept.tell(prompt=RAW, params=hot).text()
        wanted = (kept.head.prompt_ids, kept.head.token_ids)
    with Workspace(tmp_path / "kept") as workspace:
        workspace.load(tiny_folder, threads=1, name="tiny")
        kept = workspace.open("kept")
        kept.replay(kept.head).text()
        assert (kept.head.prompt_ids, kept.head.token_ids) == wanted and IM_START in kept.head.prompt_ids


def test_a_story_from_before_stays_as_it_was(model: Model) -> None:
    """Its turns do not say how they were read: control tokens were text."""
    session = model.session()
    session.tell(prompt=RAW, params=SHORT, parse_special=False).text()
    data = session.export()
    assert all("said" not in turn for turn in data["turns"])
    old = model.import_(data, id="old")
    old.replay(old.head).text()
    assert list(old.head.prompt_ids) == ids(model, RAW, False)
    old.tell(prompt="<|im_start|>", params=SHORT).text()
    assert IM_START not in old.head.prompt_ids


def test_the_oldest_pieces_left_out_are_read_as_they_were(model: Model) -> None:
    """`drop_oldest_turns` encodes the remaining pieces again."""
    for special in (True, False):
        session = model.session(context_policy="drop_oldest_turns")
        for _ in range(16):
            session.write("<|im_start|>" + "x y " * 20, parse_special=special)
        session.tell(prompt="the end", params=SHORT).text()
        assert session.head.cut is not None
        assert (IM_START in session.head.ids()) is special


def test_chat_turns_each_have_their_own_switch(model: Model) -> None:
    session = model.session()
    session.say("a<|im_end|>b", SHORT, parse_special=True).text()
    assert prompt_of(session).count(IM_END) == 2 and session.head.said.parse_special
    session.regenerate(SHORT).text()
    assert prompt_of(session).count(IM_END) == 2
    session.say("c<|im_end|>d", SHORT).text()
    assert prompt_of(session).count(IM_END) == 2  # after the previous answer, and after the message
    session.edit(1, "e<|im_end|>", SHORT).text()
    assert prompt_of(session).count(IM_END) == 2
    session.edit(session.head, "e<|im_end|>", SHORT, parse_special=False).text()
    assert prompt_of(session).count(IM_END) == 1
    assert list(session.rewrite(session.head, "<|im_end|>").token_ids) == ids(model, "<|im_end|>", False)
    assert list(session.rewrite(session.head, "<|im_end|>", parse_special=True).token_ids) == [IM_END]


def test_a_switch_that_is_no_switch(model: Model) -> None:
    with pytest.raises(InvalidArgument, match="parse_special"):
        model.session().tell(prompt="x", params=SHORT, parse_special="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="parse_special"):
        model.session().say("x", SHORT, parse_special=1)  # type: ignore[arg-type]


# ---- HTTP -----------------------------------------------------------------------------------------------------------


def test_every_route_has_the_switch(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    n_raw = {special: len(tokenizer.encode(RAW, special=special)) for special in (True, False)}
    typed = "a<|im_end|>b"
    n_more = len(tokenizer.encode(typed)) - len(tokenizer.encode(typed, special=True))

    async def post(client: Inside, path: str, **body: Any) -> Any:
        status, answer = await client.ask("POST", path, **body)
        assert status == 200, answer
        return answer

    async def work(client: Inside) -> None:
        for given, special in ((None, True), (True, True), (False, False)):
            switch = {} if given is None else {"parse_special": given}
            body = {"prompt": RAW, "max_tokens": 2, **switch}
            assert (await post(client, "/v1/completions", **body))["usage"]["prompt_tokens"] == n_raw[special]
            story = await post(client, "/story", prompt=RAW, max_len=2, **switch)
            assert story["usage"]["prompt_tokens"] == n_raw[special]
            again = await post(client, "/replay", session_id=story["session_id"], turn=1)
            assert again["usage"]["prompt_tokens"] == n_raw[special]
            counted = await post(client, "/count", message=RAW, story=True, **switch)
            assert counted["prompt_tokens"] == n_raw[special]
            written = await post(client, "/write?path=true", text=RAW, **switch)
            assert written["path"][-1]["parse_special"] is special
            found = await post(client, "/v1/embeddings", input=RAW, **switch)
            assert found["usage"]["prompt_tokens"] == n_raw[special]
        messages = [{"role": "user", "content": typed}]
        for path, body, count in (
            ("/v1/chat/completions", {"messages": messages, "max_tokens": 2}, "prompt_tokens"),
            ("/v1/responses", {"input": typed, "max_output_tokens": 2}, "input_tokens"),
            ("/chat", {"message": typed, "max_len": 2}, "prompt_tokens"),
        ):
            n = {
                special: (await post(client, path, **body, parse_special=special))["usage"][count]
                for special in (True, False)
            }
            assert n[False] - n[True] == n_more, path
            assert (await post(client, path, **body))["usage"][count] == n[False], path
        for switch in ({"special": True}, {"parse_special": True}):
            assert (await post(client, "/tokenize", text=RAW, **switch))["n_tokens"] == n_raw[True]
        assert (await post(client, "/tokenize", text=RAW))["n_tokens"] == n_raw[False]

    inside(tmp_path, tiny_folder, work)
