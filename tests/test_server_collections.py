"""Routes over sessions as wholes: creating, deleting, search, exports for people, usage; and names of turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fabula import InvalidArgument, SamplingParams, Workspace
from fabula.server.examples import EXAMPLES, SESSION
from serving import Running

SHORT = {"max_len": 3, "seed": 1, "ignore_eos": True}


def chat(server: Running, id: str, message: str) -> Any:
    return server.post("/chat", session_id=id, message=message, **SHORT)


@pytest.fixture(scope="module")
def tiny_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One of its own: all sessions are deleted."""
    with Running(tmp_path_factory.mktemp("server"), tiny_folder) as running:
        yield running


# ---- Sessions -------------------------------------------------------------------------------------------------------


def test_an_empty_session_is_created(tiny_server: Running) -> None:
    made = tiny_server.post(
        "/sessions", 201, session_id="empty-one", title="T", system="Be brief.", tags=["a"], sampling={"top_k": 7}
    )
    assert (made["session_id"], made["title"], made["system"], made["tags"]) == ("empty-one", "T", "Be brief.", ["a"])
    assert made["head"] == 0 and made["path"] == [] and made["sampling"]["top_k"] == 7
    assert tiny_server.get("/sessions/empty-one")["system"] == "Be brief."
    again = tiny_server.post("/sessions", 409, session_id="empty-one")
    assert again["error"]["code"] == "session_exists"
    refused = tiny_server.client.post("/chat", json={"session_id": "empty-one", "message": "x", "top_p": 7.0})
    assert refused.status_code == 400
    tiny_server.get("/sessions/empty-one")  # what was asked for stays
    assert tiny_server.post("/sessions", 201)["session_id"] != tiny_server.post("/sessions", 201)["session_id"]
    assert tiny_server.post("/sessions", 400, session_id="resp.x")["error"]["code"] == "invalid_value"
    assert tiny_server.post("/sessions", 400, window=5)["error"]["message"].startswith("window needs")


def test_sessions_are_deleted_by_name_and_by_age(tiny_server: Running) -> None:
    chat(tiny_server, "gone", "the sea")
    reply = tiny_server.client.delete("/sessions/gone")
    assert reply.status_code == 200 and reply.json()["session_id"] == "gone" and reply.json()["freed_bytes"] > 0
    assert tiny_server.client.delete("/sessions/gone").status_code == 404
    tiny_server.post("/sessions", 201, session_id="young")
    assert tiny_server.client.delete("/sessions", params={"older_than": "1d"}).json()["session_ids"] == []
    for bad in ({}, {"older_than": "1"}, {"older_than": "-1d"}, {"older_than": "1w"}):
        assert tiny_server.client.delete("/sessions", params=bad).status_code == 400
    deleted = tiny_server.client.delete("/sessions", params={"older_than": "0m"})
    assert deleted.status_code == 200 and "young" in deleted.json()["session_ids"]
    assert tiny_server.get("/sessions")["sessions"] == []


def test_what_was_said_is_found(tiny_server: Running) -> None:
    first = chat(tiny_server, "found-1", "The Straße to the lighthouse")
    chat(tiny_server, "found-2", "no such thing")
    hits = tiny_server.get("/search?text=STRASSE")["matches"]
    assert [(hit["session_id"], hit["turn_id"], hit["field"]) for hit in hits] == [
        ("found-1", first["turn_id"], "prompt")
    ]
    assert hits[0]["excerpt"] == "The Straße to the lighthouse" and hits[0]["number"] == 1
    answer = first["text"].strip()
    if answer:
        assert any(hit["field"] == "text" for hit in tiny_server.get(f"/search?text={answer[:5]}")["matches"])
    assert tiny_server.get("/search?text=lighthouse&session_id=found-2")["matches"] == []
    tiny_server.get("/search?text=x&session_id=nowhere", 404)
    assert tiny_server.get("/search?text=", 400)["error"]["param"] == "text"


def test_exports_for_people(tiny_server: Running) -> None:
    said = chat(tiny_server, "export-1", "the sea")
    tiny_server.client.patch("/sessions/export-1", json={"title": "By the sea"})
    text = tiny_server.client.get("/sessions/export-1/export?format=markdown")
    assert (
        text.headers["Content-Type"].startswith("text/markdown")
        and 'export-1.md"' in text.headers["Content-Disposition"]
    )
    assert text.text == f"# By the sea\n\n## User\n\nthe sea\n\n## Assistant\n\n{said['text'].strip()}\n".replace(
        "\n\n\n", "\n"
    )
    plain = tiny_server.client.get("/sessions/export-1/export?format=text").text
    assert plain.startswith("By the sea\n\nUser: the sea\n\nAssistant: ")
    assert tiny_server.client.get("/sessions/export-1/export").json()["turns"]
    assert tiny_server.client.get("/sessions/export-1/export?format=pdf").status_code == 400


def test_usage_of_a_key(tiny_server: Running) -> None:
    before = tiny_server.get("/usage")
    said = chat(tiny_server, "usage-1", "the sea")
    after = tiny_server.get("/usage")
    assert after["answers"] == before["answers"] + 1 and after["since"] == before["since"]
    assert after["generated_tokens"] - before["generated_tokens"] == said["usage"]["generated_tokens"] == 3
    assert after["prompt_tokens"] - before["prompt_tokens"] == said["usage"]["prompt_tokens"]
    assert after["key"] is None and after["limits"]["tokens_per_minute"] is None and after["active_answers"] == 0


@pytest.mark.parametrize("path", ["/sessions?serach=x", "/health?verbose=1", "/sessions/x?path=true", "/usage?key=x"])
def test_unknown_query_parameters_are_refused(tiny_server: Running, path: str) -> None:
    error = tiny_server.get(path, 400)["error"]
    assert error["code"] == "unknown_parameter" and error["param"] in path
    assert "did you mean search?" in error["message"] or "serach" not in path


def test_links_to_the_page_may_be_decorated(tiny_server: Running) -> None:
    assert tiny_server.client.get("/?utm_source=x").status_code == 200


# ---- The description ----------------------------------------------------------------------------------------------


def test_every_operation_has_an_example_that_works(tiny_server: Running) -> None:
    described = tiny_server.get("/openapi.json")
    paths = described["paths"]
    for method, path in [
        (m, p) for p, operations in paths.items() for m, one in operations.items() if "requestBody" in one
    ]:
        assert (method, path) in EXAMPLES or path == "/sessions/import", f"{method} {path} has no example"
    for (method, path), body in EXAMPLES.items():
        content = paths[path][method]["requestBody"]["content"]["application/json"]
        assert content["example"] == body
        reply = tiny_server.client.request(method, path.replace("{id}", SESSION), json=body)
        assert reply.is_success, (method, path, reply.text)
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_the_page_of_the_description_lists_sampling_settings_once(tiny_server: Running) -> None:
    page = tiny_server.client.get("/docs").text
    assert page.count("<code>dry_breakers</code>") == 1 and page.count("Sampling settings, as listed below.") > 5
    chat = page[page.index('id="post-chat"') :]
    assert chat.index("<code>message</code> *") < chat.index("<code>session_id</code>")
    assert "Name a lighthouse." in chat


# ---- Turns by name --------------------------------------------------------------------------------------------------


def test_rollback_by_steps_tags_and_negative_numbers(tiny_server: Running) -> None:
    ids = [chat(tiny_server, "walk-1", word)["turn_id"] for word in ("one", "two", "three", "four")]
    tiny_server.post("/tags", session_id="walk-1", turn=2, tag="harbor")

    def head(**where: Any) -> Any:
        return tiny_server.post("/rollback", session_id="walk-1", **where)["head_id"]

    assert head(steps=1) == ids[2] and head(turn=-1) == ids[1] and head(turn=ids[3]) == ids[3]
    assert head(turn="harbor") == ids[1] and head(turn=ids[3]) == ids[3]
    assert head() == ids[0]
    assert head(turn=ids[3]) == ids[3] and head(steps=4) == ""
    for wrong in ({"steps": 0}, {"steps": 1, "turn": 2}, {"turn": -1}, {"turn": "nowhere"}, {"steps": 1}):
        assert tiny_server.post("/rollback", 400, session_id="walk-1", **wrong)["error"]["code"] == "invalid_value"
    assert tiny_server.post("/fork", session_id="walk-1", turn="harbor")["head_id"] == ids[1]


@pytest.fixture
def workspace(tiny_folder: Path, tmp_path: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, threads=1)
        yield workspace


def test_turns_by_name(workspace: Workspace) -> None:
    params = SamplingParams(max_tokens=2, seed=1, ignore_eos=True)
    session = workspace.session("tagged")

    def say(text: str) -> Any:
        reply = session.say(text, params=params)
        list(reply)
        return reply.turn

    one, two = say("one"), say("two")
    session.tag(1, "here")
    session.tag(2, "here")
    assert session.turn("here") is two and session.turn(-1) is one and session.turn(-2).number == 0
    session.rollback(1)
    assert session.turn("here") is one, "the one on the path"
    session.rollback(0)
    assert session.turn("here") is two, "else the last made"
    session.tag(two, one.id)
    assert session.turn(one.id) is one, "an id is no tag"
    for wrong in ("nowhere", -1, 1, True, 1.0):
        with pytest.raises(InvalidArgument):
            session.turn(wrong)  # type: ignore[arg-type]
    assert [match.turn_id for match in workspace.search("TW")] == [two.id]
    with pytest.raises(InvalidArgument, match="nothing to search"):
        workspace.search("")
    with pytest.raises(InvalidArgument, match="limit is 0"):
        workspace.search("x", limit=0)


def test_a_story_as_text(workspace: Workspace) -> None:
    session = workspace.session("story", title="Night")
    session.write("Once, ")
    session.write("(It rains.) ", frozen=True)
    session.write("a boat.")
    assert session.to_text() == "Night\n\nOnce, a boat.\n" and session.to_markdown() == "# Night\n\nOnce, a boat.\n"
    empty = workspace.session("nothing")
    assert empty.to_text() == "\n"


def test_matches_are_found_in_pages(workspace: Workspace) -> None:
    session = workspace.session("many", context_policy="slide")
    for i in range(7):
        session.write(f"{'x' * 90} needle {i} {'y' * 90}")
    found = workspace.search("needle", limit=3, offset=2)
    assert [match.number for match in found] == [5, 4, 3]
    assert found[0].excerpt == f"…{'x' * 59} needle 4 {'y' * 57}…"
    assert workspace.search("needle", session_id="other") == [] == workspace.search("needle", tenant="somebody")
    assert workspace.search("needle", but="man") == []
