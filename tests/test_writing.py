"""Words that people write into a tree themselves: pieces of a story, notes for the model, other words in an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabula import ContextOverflow, InvalidArgument, Model, SamplingParams, SessionBusy, StoreError, Workspace
from fabula.engine.generation import Generation
from fabula.sessions.turn import Turn
from serving import Running

SHORT = SamplingParams(temperature=1.0, max_tokens=9, seed=11)
PIECE = SamplingParams(temperature=1.0, max_tokens=9, seed=11, ignore_eos=True)


def alone(model: Model, turn: Turn) -> list[int]:
    """A turn's answer from scratch, after the same ids."""
    assert turn.params is not None
    model.clear_cache()
    prompt = turn.ids()[: turn.n_ids - len(turn.token_ids)]
    generation = Generation(model._engine, prompt, turn.params, continues=not turn.chat)
    generation.text()
    return generation.token_ids


# ---- Other words in place of an answer ------------------------------------------------------------------------------


def test_rewrite_is_a_sibling_and_the_model_goes_on_with_it(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.say("hello there", SHORT).text()
    second = session.say("and then", SHORT)
    second.text()
    drawn = session.head
    written = session.rewrite(drawn, "I am a lighthouse")
    assert session.head is written and session.children(1) == [drawn, written]
    assert (written.text, written.finish_reason, written.prompt) == ("I am a lighthouse", "written", "and then")
    assert tiny_model.tokenizer.decode(written.token_ids) == "I am a lighthouse"
    assert written.to_json()["generated"] == 0 and session.messages[-1]["content"] == "I am a lighthouse"
    session.say("why", SHORT).text()
    third = session.head
    assert third.parent is written and third.recomputed == 0
    assert third.reused >= written.n_ids - len(written.token_ids), "the prompt before it was read once"
    assert list(third.token_ids) == alone(tiny_model, third)
    assert "lighthouse" in tiny_model.tokenizer.decode(third.ids())


def test_continue_goes_on_with_the_written_words(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.say("hello", SHORT).text()
    session.rewrite(1, "Once")
    reply = session.continue_(5)
    assert reply.begun_text == "Once" and reply.text().startswith("Once")
    assert session.head.token_ids[: session.head.n_begun] == session.children(0)[1].token_ids
    with pytest.raises(InvalidArgument, match="written by hand"):
        session.replay(session.children(0)[1])
    session.rollback(session.children(0)[1])
    assert session.regenerate(SHORT).text() == session.children(0)[0].text, "regenerate asks the model again"


def test_rewrite_refuses_what_cannot_be(tiny_model: Model) -> None:
    session = tiny_model.session()
    with pytest.raises(InvalidArgument, match="turn 0 is the empty start"):
        session.rewrite(0, "a")
    session.say("hello", SHORT).text()
    with pytest.raises(InvalidArgument, match="text is empty"):
        session.rewrite(1, "")
    with pytest.raises(InvalidArgument, match="is a chat"):
        session.write("a")
    with pytest.raises(ContextOverflow):
        session.rewrite(1, "word " * tiny_model.context)
    reply = session.say("hello", SHORT)
    next(reply)
    with pytest.raises(SessionBusy):
        session.rewrite(1, "a")
    reply.cancel()
    assert len(session.turns) == 2


# ---- Pieces of a story ----------------------------------------------------------------------------------------------


def test_written_pieces_and_what_follows(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.write("Once upon a time ")
    session.write("there was a fox. ")
    assert session.head.number == 2 and session.head.text == "" and session.head.n_ids > 0
    session.tell(prompt="It ", params=PIECE).text()
    told = session.head
    assert (told.reused, told.recomputed) == (0, 0), "what nobody had read is not read again"
    assert list(told.token_ids) == alone(tiny_model, told)
    session.rollback(2)
    replies = session.branch(2, params=PIECE)
    for reply in replies:
        reply.text()
        assert reply.turn is not None and reply.turn.parent is session.head
    with pytest.raises(InvalidArgument, match="text is empty"):
        session.write("")
    session.rollback(1)
    assert session.continue_(3, params=PIECE).text()


def test_an_exchange_of_a_chat(tiny_model: Model) -> None:
    """What is written reads for the model like what was said: the prompt is the one that the template renders."""
    session, other = tiny_model.session(system="s"), tiny_model.session(system="s")
    first = session.write("the whale", said="who?")
    assert session.head is first and (first.prompt, first.text, first.finish_reason) == ("who?", "the whale", "written")
    session.write("", said=[{"role": "system", "content": "be calm"}, {"role": "user", "content": "where?"}])
    past = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "the whale"},
        {"role": "system", "content": "be calm"},
        {"role": "user", "content": "where?"},
    ]
    assert session.messages == past
    params = replace(PIECE, max_tokens=5)
    reply = session.say("and when?", params)
    text = reply.text()
    asked = [*past, {"role": "user", "content": "and when?"}]
    assert tiny_model.tokenizer.decode(reply.generation.prompt_ids, skip_special=False) == (
        tiny_model.template.render(asked, add_generation_prompt=True)
    )
    turn = session.head
    assert (turn.number, turn.recomputed, turn.why_recomputed) == (3, 0, "")  # it was new to the model, all of it
    assert session.say("on", params).text() is not None and session.head.recomputed == 0
    assert session.messages[:6] == [*asked, {"role": "assistant", "content": text}][:6]
    # Its turns are like any others.
    session.rollback(2)
    answer = session.regenerate(params).text()
    assert session.messages == [*past, {"role": "assistant", "content": answer}] and session.head.number == 2
    session.rollback(1)
    assert session.continue_(3).text().startswith("the whale")
    session.rollback(first)
    assert session.rewrite(1, "a squid").text == "a squid" and session.messages[-1]["content"] == "a squid"
    alone = other.write("", said="who?")
    wanted = tiny_model.session(system="s").say("who?", replace(params, max_tokens=4)).text()
    assert other.continue_(4, params=params).text() == wanted
    other.rollback(alone)
    assert other.rewrite(1, "the whale").token_ids == first.token_ids
    for call in (lambda: other.fork_at(alone.id, 0, 5), lambda: other.alternatives(alone.id, 0)):
        with pytest.raises(InvalidArgument, match="message without an answer"):
            call()


def test_exchanges_are_kept_and_travel(tiny_folder: Path, tmp_path: Path) -> None:
    params = replace(PIECE, max_tokens=5)
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="m", threads=1)
        session = workspace.session("s", model="m")
        session.write("the whale", said="who?")
        session.write("", said="where?")
        data = json.loads(json.dumps(session.export()))
        text, ids = session.say("when?", params).text(), session.head.ids()
        session.rollback(2)
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="m", threads=1)
        for again in (workspace.open("s"), workspace.import_(data, id="t")):
            assert [turn.is_unanswered for turn in again.path] == [False, True]
            assert again.say("when?", params).text() == text and again.head.ids() == ids
            assert again.head.recomputed == 0


def test_exchanges_are_left_out_when_the_context_is_full(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=128) as model:
        session = model.session(context_policy="drop_oldest_turns")
        for i in range(4):
            session.write("the sea " * 3, said=f"{i} " + "the whale " * 5)
        session.write("", said="last of all")
        reply = session.say("and?", replace(PIECE, max_tokens=4))
        reply.text()
        prompt = model.tokenizer.decode(reply.generation.prompt_ids, skip_special=False)
        assert session.head.cut is not None and "last of all" in prompt and "0 the whale" not in prompt


def test_what_cannot_be_written_to_a_chat(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.write("b", said="a")
    with pytest.raises(InvalidArgument, match="chat"):
        session.write("b")
    with pytest.raises(InvalidArgument, match="frozen"):
        session.write("b", said="a", frozen=True)
    with pytest.raises(InvalidArgument, match="role"):
        session.write("b", said=[{"role": "nobody", "content": ""}])
    story = tiny_model.session()
    story.write("once")
    with pytest.raises(InvalidArgument, match="story"):
        story.write("b", said="a")
    with pytest.raises(ContextOverflow):
        session.write("the whale " * 4000, said="a")
    assert session.head.number == 1


def test_notes_stay_when_the_oldest_turns_are_left_out(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=160) as model:
        session = model.session(context_policy="drop_oldest_turns")
        note = session.write("The fox is called Rust. ", frozen=True)
        for i in range(12):
            session.tell(prompt=f"Part {i} of it all. ", params=replace(PIECE, max_tokens=12, seed=i)).text()
            ids = session.head.ids()
            assert ids[: len(note.prompt_ids)] == list(note.prompt_ids), "the note is in front"
            assert list(session.head.token_ids) == alone(model, session.head)
        cut = session.head.cut
        assert cut is not None and cut.n_turns > 1 and cut.n_tokens > 0
        assert "Part 0" not in model.tokenizer.decode(session.head.ids())
        middle = session.write("The sea is near. ", frozen=True)
        for i in range(12):
            session.tell(prompt=f"More {i} of it all. ", params=replace(PIECE, max_tokens=12, seed=i)).text()
        words = model.tokenizer.decode(session.head.ids())
        assert words.count("The sea is near.") == 1 and words.count("Rust") == 1 and "More 0" not in words
        assert middle.frozen and session.path[0] is note


def test_notes_in_front_cost_their_tokens_once(tiny_model: Model) -> None:
    session = tiny_model.session()
    note = session.write("The fox is called Rust, and he lives by the sea with his mother. " * 3, frozen=True)
    reused = []
    for start in ("One day ", "At night "):
        session.rollback(note)
        session.tell(prompt=start, params=PIECE).text()
        reused.append(session.head.reused)
        assert session.head.recomputed == 0
    assert reused[0] == 0 and reused[1] >= note.n_ids - 1


# ---- Kept -----------------------------------------------------------------------------------------------------------


def test_written_turns_and_tags_are_kept_and_travel(tiny_folder: Path, tmp_path: Path) -> None:
    with Workspace(tmp_path / "a") as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        session = workspace.session("s")
        session.write("A note. ", frozen=True)
        session.write("A piece. ")
        session.tell(prompt="Go", params=PIECE).text()
        session.rewrite(3, "on and on")
        session.configure(tags=["sea", "foxes", "sea"])
        before = [
            (turn.number, turn.prompt, turn.text, turn.finish_reason, turn.frozen, turn.ids()) for turn in session.turns
        ]
        exported = json.loads(json.dumps(session.export()))
    with Workspace(tmp_path / "a") as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        session = workspace.open("s")
        after = [
            (turn.number, turn.prompt, turn.text, turn.finish_reason, turn.frozen, turn.ids()) for turn in session.turns
        ]
        assert after == before and session.head.text == "on and on" and session.tags == ("sea", "foxes")
        assert next(iter(workspace.sessions())).tags == ("sea", "foxes")
        copy = workspace.import_(exported, id="copy")
        assert [turn.frozen for turn in copy.turns] == [True, False, False, False] and copy.tags == ("sea", "foxes")
        session.continue_(4, params=PIECE).text()
        copy.continue_(4, params=PIECE).text()
        assert copy.head.token_ids == session.head.token_ids


def test_nothing_is_written_when_it_cannot_be_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        session = workspace.session("s")
        session.write("One. ")
        session.tell(params=PIECE).text()
        head = session.head

        def full(*_: Any) -> Any:
            raise StoreError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(workspace._keeper.store, "put_turn", full)
            with pytest.raises(StoreError):
                session.write("Two. ")
            with pytest.raises(StoreError):
                session.rewrite(head, "Three")
        assert session.head is head and len(session.turns) == 2
        session.write("Two. ")
        assert session.head.number == 3


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("sea", "must be a list"),
        ([""], "1 .. 60"),
        (["a" * 61], "1 .. 60"),
        ([str(i) for i in range(17)], "at most 16"),
        ([7], "1 .. 60"),
        (["a\nb"], "one line"),
    ],
)
def test_tags_of_a_session_are_checked(tiny_model: Model, tags: Any, wanted: str) -> None:
    session = tiny_model.session()
    with pytest.raises(InvalidArgument, match=wanted):
        session.configure(tags=tags)
    assert session.tags == ()


def test_tokens_of_an_answer(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.say("hello", SHORT).text()
    tokens = session.tokens(1)
    assert [token for token, _ in tokens] == list(session.head.token_ids)
    assert "".join(text for _, text in tokens).startswith(session.head.text)
    with pytest.raises(InvalidArgument):
        session.tokens(0)


# ---- Over HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tiny_server: Running) -> Running:
    return tiny_server


def post(served: Running, path: str, status: int = 200, **body: Any) -> Any:
    response = served.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def test_writing_over_http(served: Running) -> None:
    told = post(
        served,
        "/write?path=true",
        text="The fox is called Rust. ",
        frozen=True,
        title="Rust",
        sampling={"top_k": 7, "seed": 1},
    )
    id = told["session_id"]
    assert told["head"] == 1 and told["path"][0]["frozen"] is True and told["path"][0]["finish_reason"] == "written"
    assert served.client.get(f"/sessions/{id}").json()["sampling"] == {"top_k": 7, "seed": 1}
    post(served, "/write", session_id=id, text="Once ")
    answer = post(served, "/story", session_id=id, prompt="he ", max_len=6, ignore_eos=True)
    assert answer["turn"] == 3 and answer["usage"]["recomputed_tokens"] == 0
    tokens = post(served, "/turn_tokens", session_id=id, turn=3)["tokens"]
    assert len(tokens) == 6 and "".join(token["text"] for token in tokens) == answer["text"]
    head = post(served, "/rewrite?path=true", session_id=id, turn=3, text="sang")
    assert head["path"][-1]["text"] == "sang" and head["head"] == 3
    assert post(served, "/continue", session_id=id, max_len=4)["text"].startswith("sang")
    assert post(served, "/write", 400, session_id=id, text="")["error"]["code"] == "invalid_value"
    assert post(served, "/rewrite", 404, session_id="none", turn=1, text="a")["error"]["code"] == "session_not_found"


def test_tags_and_nulls_over_http(served: Running) -> None:
    id = post(served, "/chat", message="hello", max_len=3, sampling={"seed": 4, "temperature": 0.5})["session_id"]
    one = served.client.get(f"/sessions/{id}").json()
    assert one["sampling"] == {"temperature": 0.5, "seed": 4} and one["tags"] == []
    changed = served.client.patch(
        f"/sessions/{id}", json={"sampling": {"seed": None, "max_tokens": 9}, "tags": ["Sea", "b"]}
    )
    assert changed.json()["sampling"] == {"temperature": 0.5, "max_tokens": 9} and changed.json()["tags"] == [
        "Sea",
        "b",
    ]
    cleared = served.client.patch(f"/sessions/{id}", json={"sampling": {"max_len": None}})
    assert cleared.json()["sampling"] == {"temperature": 0.5}
    found = served.client.get("/sessions", params={"search": "sea"}).json()["sessions"]
    assert [(one["session_id"], one["tags"]) for one in found] == [(id, ["Sea", "b"])]
    assert served.client.patch(f"/sessions/{id}", json={"tags": ["x" * 61]}).status_code == 400


def test_sampling_of_a_session_that_exists_is_merged(served: Running) -> None:
    id = post(served, "/write", text="Once ", sampling={"seed": 4, "top_k": 7})["session_id"]

    def sampling() -> Any:
        return served.client.get(f"/sessions/{id}").json()["sampling"]

    post(served, "/write", session_id=id, text="upon ", sampling={"temperature": 0.5})
    assert sampling() == {"temperature": 0.5, "top_k": 7, "seed": 4}
    post(served, "/story", session_id=id, max_len=2, sampling={"seed": None, "min_p": 0.1})
    assert sampling() == {"temperature": 0.5, "top_k": 7, "min_p": 0.1}
    post(served, "/write", session_id=id, text="a ")
    assert sampling() == {"temperature": 0.5, "top_k": 7, "min_p": 0.1}
    error = post(served, "/write", 400, session_id=id, text="time ", sampling={"temperature": -1.0})["error"]
    assert error["code"] == "invalid_value" and sampling() == {"temperature": 0.5, "top_k": 7, "min_p": 0.1}
    talk = post(served, "/chat", message="hello", max_len=2, sampling={"seed": None, "top_k": 3})["session_id"]
    post(served, "/chat", session_id=talk, message="again", max_len=2, sampling={"top_p": 0.9})
    assert served.client.get(f"/sessions/{talk}").json()["sampling"] == {"top_k": 3, "top_p": 0.9}


def test_health_tells_of_memory(served: Running) -> None:
    (model,) = served.client.get("/health").json()["models"]
    assert model["weight_bytes"] > 0 and model["context"] > 0 and model["weights"]
    assert 0 <= model["cache_bytes"] <= model["cache_limit_bytes"]
