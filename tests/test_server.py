"""The native API over a real socket, with SmolLM2 where it is present: every route does what it says."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import Running, parse
from waiting import wait_until


@pytest.fixture(scope="module", params=["hypercorn", "uvicorn"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Running]:
    model = request.getfixturevalue("tiny_folder")
    if request.param == "hypercorn":  # the other host says the same of any model
        with suppress(pytest.skip.Exception):
            model = request.getfixturevalue("smollm2_gguf")
    with Running(tmp_path_factory.mktemp("served"), model, host=request.param) as running:
        yield running


def check_answer(found: dict[str, Any], session_id: str, turn: int) -> None:
    assert found["session_id"] == session_id and found["turn"] == turn
    assert found["finish_reason"] in ("stop", "length")
    usage = found["usage"]
    assert usage["generated_tokens"] >= 1 and usage["prompt_tokens"] > usage["reused_tokens"] >= 0
    assert found["timings"]["first_token_ms"] > 0


# ---- The three bodies, to the letter --------------------------------------------------------------------------------


def test_chat_rollback_delete(served: Running) -> None:
    body = (
        '{"session_id": "abc123", "message": "Hello, how are you?", "max_len": 1024, "top_p": 0.8, "top_k": 30, '
        '"temperature": 1.0}'
    )
    json_type = {"Content-Type": "application/json"}
    served.post(
        "/sessions", 201, session_id="abc123", sampling={"seed": 11}
    )  # answers of the tiny model end soon with it
    first = served.client.post("/chat", content=body, headers=json_type)
    assert first.status_code == 200, first.text
    check_answer(first.json(), "abc123", 1)
    second = served.post("/chat", session_id="abc123", message="And you?", max_len=8)
    check_answer(second, "abc123", 2)
    assert second["usage"]["recomputed_tokens"] == 0
    # What was said is not computed again, but for the last token of the answer, which was drawn and never read.
    known = first.json()["usage"]["prompt_tokens"] + first.json()["usage"]["generated_tokens"]
    assert second["usage"]["reused_tokens"] >= known - 1
    third = served.post("/chat", session_id="abc123", message="Why?", max_len=8)
    check_answer(third, "abc123", 3)

    back = served.client.post("/rollback", content='{"session_id": "abc123", "target_turn": 2}', headers=json_type)
    assert back.status_code == 200 and back.json()["head"] == 2 and back.json()["recomputed_tokens"] == 0
    assert "path" not in back.json()
    path = served.post("/rollback?path=true", session_id="abc123", turn=2)["path"]
    assert [turn["number"] for turn in path] == [1, 2]
    assert back.json()["head_id"] == second["turn_id"]
    again = served.post("/chat", session_id="abc123", message="Since when?", max_len=8)
    check_answer(again, "abc123", 3)
    assert again["usage"]["recomputed_tokens"] == 0 and again["turn_id"] != third["turn_id"]

    gone = served.client.post("/delete_session", content='{"session_id": "abc123"}', headers=json_type)
    assert gone.status_code == 200 and gone.json()["freed_bytes"] > 0
    twice = served.client.post("/delete_session", content='{"session_id": "abc123"}', headers=json_type)
    assert twice.status_code == 404 and twice.json()["error"]["code"] == "session_not_found"
    lost = served.client.post("/rollback", content='{"session_id": "abc123"}', headers=json_type)
    assert lost.status_code == 404


def test_an_id_is_made_and_sessions_are_listed(served: Running) -> None:
    found = served.post("/chat", message="Name a river.", max_len=4, title="Rivers", system="Be brief.")
    assert len(found["session_id"]) >= 22  # 128 random bits
    listed = next(one for one in served.get("/sessions")["sessions"] if one["session_id"] == found["session_id"])
    assert listed["title"] == "Rivers" and listed["n_turns"] == 1
    about = served.get(f"/sessions/{found['session_id']}")
    assert about["system"] == "Be brief." and about["path"][0]["text"] == found["text"] and not about["busy"]


def test_the_same_seed_gives_the_same_answer(served: Running) -> None:
    one = served.post("/chat", message="Tell me a story.", max_len=12, seed=7)
    two = served.post("/chat", message="Tell me a story.", max_len=12, seed=7)
    assert one["text"] == two["text"] and one["seed"] == 7


# ---- Streams --------------------------------------------------------------------------------------------------------


def test_stream(served: Running) -> None:
    events = served.events("/chat", session_id="streamed", message="Count to ten.", max_len=12, n_logprobs=2)
    assert [event["#event"] for event in events] == ["start", *["token"] * (len(events) - 2), "done"]
    assert [int(event["#id"]) for event in events] == list(range(len(events)))
    assert events[0]["session_id"] == "streamed" and events[0]["turn"] == 1
    assert "".join(event["text"] for event in events[1:-1]) == events[-1]["text"]
    assert len(events) - 2 == events[-1]["usage"]["generated_tokens"]
    assert all(len(event["top_logprobs"]) == 2 and event["logprob"] <= 0 for event in events[1:-1])

    def read(**how: Any) -> list[dict[str, Any]]:
        with served.client.stream("GET", f"/streams/{events[0]['stream_id']}", **how) as response:
            assert response.status_code == 200
            return list(parse(response.iter_lines()))

    assert read() == events
    assert read(params={"after": 3}) == events[4:]
    assert read(headers={"Last-Event-ID": "3"}) == events[4:]
    assert served.get("/streams/run_nothing", 404)["error"]["code"] == "stream_not_found"


def test_a_stream_that_loses_its_reader_stops(served: Running) -> None:
    body = {"session_id": "left", "message": "Tell me everything.", "max_len": 400, "ignore_eos": True, "stream": True}
    n_read = 0
    with served.client.stream("POST", "/chat", json=body) as response:
        for event in parse(response.iter_lines()):
            n_read += event["#event"] == "token"
            if n_read == 5:
                break
    turn = settled(served, "left")
    # Those on their way when the connection was closed, and two more: test_server_runs.py counts them.
    assert turn["finish_reason"] == "cancelled" and 5 <= turn["generated"] < 400


def settled(served: Running, session_id: str) -> dict[str, Any]:
    """The head's turn once nothing is being made."""
    wait_until(lambda: not served.get(f"/sessions/{session_id}")["busy"], "it is busy", pause=lambda: time.sleep(0.05))
    found: dict[str, Any] = served.get(f"/sessions/{session_id}")["path"][-1]
    return found


def test_background_goes_on(served: Running) -> None:
    body = {"session_id": "behind", "message": "Go on.", "max_len": 30, "ignore_eos": True}
    begun = served.post("/chat", 202, **body, background=True)
    with served.client.stream("GET", f"/streams/{begun['stream_id']}") as response:
        events = list(parse(response.iter_lines()))
    assert events[-1]["#event"] == "done" and events[-1]["usage"]["generated_tokens"] == 30
    with served.client.stream("POST", "/chat", json=body | {"stream": True, "background": True}) as response:
        next(parse(response.iter_lines()))
    assert settled(served, "behind")["generated"] == 30


def test_stop(served: Running) -> None:
    begun = served.post(
        "/chat", 202, session_id="stopped", message="Go on.", max_len=900, ignore_eos=True, background=True
    )
    busy = served.post("/chat", 409, session_id="stopped", message="Me too!")
    assert busy["error"]["code"] == "session_busy"
    assert served.post("/stop", session_id="stopped") == {"stopped": 1}
    with served.client.stream("GET", f"/streams/{begun['stream_id']}") as response:
        assert list(parse(response.iter_lines()))[-1]["#event"] == "cancelled"
    assert served.post("/stop", stream_id=begun["stream_id"]) == {"stopped": 0}
    assert served.post("/stop", 400)["error"]["type"] == "invalid_request_error"


def test_rollback_while_it_is_being_made(served: Running) -> None:
    served.post("/chat", session_id="torn", message="One.", max_len=3)
    events: list[dict[str, Any]] = []
    begun = threading.Event()

    def read() -> None:
        body = {"session_id": "torn", "message": "Two.", "max_len": 900, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=served.address, timeout=None) as client,
            client.stream("POST", "/chat", json=body) as response,
        ):
            for event in parse(response.iter_lines()):
                events.append(event)
                if len(events) == 4:
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    back = served.post("/rollback", session_id="torn", target_turn=1)
    reader.join()
    assert events[-1]["#event"] == "cancelled" and back["head"] == 1
    assert served.get("/sessions/torn")["head"] == 1
    check_answer(served.post("/chat", session_id="torn", message="Two again.", max_len=3), "torn", 2)


# ---- The tree -------------------------------------------------------------------------------------------------------


def test_walking(served: Running) -> None:
    first = served.post("/chat", session_id="walk", message="Name a colour.", max_len=6, ignore_eos=True)
    second = served.post("/regenerate", session_id="walk")
    assert second["turn"] == 1 and second["turn_id"] != first["turn_id"] and second["seed"] != first["seed"]
    same = served.post("/replay", session_id="walk", turn=first["turn_id"])
    assert same["text"] == first["text"] and same["seed"] == first["seed"]
    edited = served.post("/edit", session_id="walk", turn=1, message="Name a bird.", max_len=5)
    longer = served.post("/continue", session_id="walk", max_len=4)
    assert longer["text"].startswith(edited["text"][:3]) and longer["turn"] == 1
    choices = served.post("/alternatives", session_id="walk", turn=first["turn_id"], position=2, n=5)["alternatives"]
    other = next(one for one in choices if not one["chosen"])
    forked = served.post("/fork_at", session_id="walk", turn=first["turn_id"], position=2, token_id=other["token_id"])
    assert forked["turn"] == 1
    several = served.post("/branch", session_id="walk", n=3, message="And a tree?", max_len=4, seed=5)
    assert [reply["turn"] for reply in several["replies"]] == [2, 2, 2]
    assert served.get("/sessions/walk")["head"] == 1
    chosen = several["replies"][1]
    assert served.post("/rollback", session_id="walk", target_turn=chosen["turn_id"])["head_id"] == chosen["turn_id"]
    assert served.post("/redo", session_id="walk")["head_id"] == forked["turn_id"]
    assert served.post("/redo", 400, session_id="walk")["error"]["code"] == "invalid_value"
    assert served.post("/tags", session_id="walk", turn=first["turn_id"], tag="good")["tags"] == ["good"]
    tree = served.get("/sessions/walk/tree")
    assert len(tree["turns"]) == 9 and tree["head_id"] == forked["turn_id"]
    assert next(node for node in tree["turns"] if node["id"] == first["turn_id"])["tags"] == ["good"]
    fork = served.post("/fork", session_id="walk", turn=chosen["turn_id"], new_session_id="walk-on")
    assert fork == {"session_id": "walk-on", "head": 2, "head_id": chosen["turn_id"]}
    check_answer(served.post("/chat", session_id="walk-on", message="Why?", max_len=3), "walk-on", 3)
    pruned = served.post("/rollback", session_id="walk", target_turn=0, prune=True)
    assert pruned["head"] == 0 and pruned["head_id"] == ""
    assert served.get("/sessions/walk")["n_turns"] == 0
    assert served.get("/sessions/walk-on")["head"] == 3  # what a fork goes on from stays


def test_story(served: Running) -> None:
    first = served.post("/story", session_id="tale", prompt="Once upon a time", max_len=8, seed=1, ignore_eos=True)
    second = served.post("/story", session_id="tale", max_len=8, ignore_eos=True)
    assert (first["turn"], second["turn"]) == (1, 2) and second["usage"]["recomputed_tokens"] == 0
    assert served.post("/story", 400, max_len=3)["error"]["message"].startswith("there is no text")
    events = served.events("/story", session_id="tale", max_len=5)
    assert events[-1]["turn"] == 3


def test_export_import_and_settings(served: Running) -> None:
    served.post("/chat", session_id="moved", message="Hello.", max_len=5, title="Before")
    data = served.get("/sessions/moved/export")
    taken = served.client.post("/sessions/import", params={"id": "moved-2"}, json=data)
    assert taken.status_code == 201 and taken.json()["path"][0]["text"] == data["turns"][0]["text"]
    assert served.client.post("/sessions/import", json=data).status_code == 409
    changed = served.client.patch("/sessions/moved-2", json={"title": "After", "sampling": {"temperature": 0.0}})
    assert changed.json()["title"] == "After" and changed.json()["sampling"] == {"temperature": 0.0}
    changed = served.client.patch("/sessions/moved-2", json={"sampling": {"top_k": 5}})
    assert changed.json()["sampling"] == {"temperature": 0.0, "top_k": 5}  # what is left out stays
    assert served.client.patch("/sessions/moved-2", json={"system": "No."}).status_code == 400
    check_answer(served.post("/chat", session_id="moved-2", message="And?", max_len=3), "moved-2", 2)


def test_texts(served: Running) -> None:
    tokens = served.post("/tokenize", text="the whale")["tokens"]
    assert served.post("/detokenize", tokens=tokens) == {"text": "the whale", "content": "the whale"}
    assert served.post("/detokenize", 400, tokens=[10**9])["error"]["param"] == "tokens"
    served.post("/chat", session_id="counted", message="Hello.", max_len=5)
    count = served.post("/count", session_id="counted", message="How are you?")
    said = served.post("/chat", session_id="counted", message="How are you?", max_len=1)
    assert count["fits"] and count["prompt_tokens"] == said["usage"]["prompt_tokens"]
    long = served.post("/count", message="on and on " * 20_000)
    assert not long["fits"] and long["prompt_tokens"] > long["context"] and long["max_answer"] == 0
    over = served.post("/chat", 400, session_id="never", message="on and on " * 20_000)
    assert over["error"]["code"] == "context_length_exceeded" and over["error"]["n_tokens"] > over["error"]["context"]
    assert served.get("/sessions/never", 404)  # a session that could not begin is not there


def test_constraint(served: Running) -> None:
    found = served.post("/chat", message="A number.", constraint={"regex": "[0-9]{3}"})
    assert len(found["text"]) == 3 and found["text"].isdigit()
    wrong = served.post("/chat", 400, message="A number.", constraint={"regex": "("})
    assert "regex" in wrong["error"]["message"]


def test_what_is_wrong_is_said(served: Running) -> None:
    unknown = served.post("/chat", 400, message="Hello.", temprature=1)["error"]
    assert unknown["param"] == "temprature" and unknown["code"] == "unknown_field"
    outside = served.post("/chat", 400, message="Hello.", top_p=2)["error"]
    assert outside["param"] == "top_p" and "at most 1" in outside["message"]
    assert served.post("/chat", 404, message="Hello.", model="none")["error"]["code"] == "model_not_found"
    assert served.post("/nothing", 404)["error"]["code"] == "not_found"
    assert served.client.get("/chat").status_code == 405


def test_the_api_is_described(served: Running) -> None:
    schema = served.get("/openapi.json")
    assert {"/chat", "/rollback", "/delete_session", "/sessions/{id}/tree", "/streams/{id}"} <= set(schema["paths"])
    page = served.client.get("/docs")
    assert "POST</span>/chat" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text  # nothing comes from elsewhere


def test_stopping_keeps_everything(tiny_folder: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_folder) as running:
        running.post("/chat", session_id="kept", message="Hello.", max_len=5)
        assert running.stop(signal.SIGTERM) == 0
    with Running(tmp_path, tiny_folder) as running:
        found = running.post("/chat", session_id="kept", message="Again.", max_len=5)
        check_answer(found, "kept", 2)
        assert found["usage"]["recomputed_tokens"] == 0 or "KV" in found["why_recomputed"]


def test_replies_of_verbs_do_not_grow_with_the_path(served: Running) -> None:
    """Where the path is wanted, `?path=true` asks for it."""
    data = {"session_id": "grows", "text": "Once. "}
    short = len(json.dumps(served.post("/write", **data)))
    ids = [served.post("/write", **data)["head_id"] for _ in range(40)]
    here = {"session_id": "grows"}
    verbs: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/write", data),
        ("POST", "/rewrite", here | {"turn": ids[-4], "text": "Never."}),
        ("POST", "/rollback", here | {"turn": ids[-5]}),
        ("POST", "/redo", here),
        ("POST", "/rollback", here | {"turn": ids[-3], "prune": True}),
        ("PATCH", "/sessions/grows", {"title": "It grows"}),
    ]
    for method, path, body in verbs:
        for query in ("", "?path=false"):
            reply = served.client.request(method, path + query, json=body)
            if query and path == "/redo":
                continue
            assert reply.status_code == 200 and "path" not in reply.json(), (path, reply.text)
            assert len(reply.text) < short + 1000
    for method, path, body in verbs:
        if path == "/redo":
            served.post("/rollback", **here, turn=ids[-6])
        reply = served.client.request(method, path + "?path=true", json=body)
        assert reply.status_code == 200, reply.text
        turns = reply.json()["path"]
        assert [turn["number"] for turn in turns] == list(range(1, reply.json()["head"] + 1))
        assert len(turns) >= 36 and turns[-1]["id"] == reply.json()["head_id"]
    assert len(served.get("/sessions/grows")["path"]) >= 36  # reading a session is no verb
    assert "path" in served.client.post("/redo?path=perhaps", json=here).json()["error"]["param"]


def test_fields_with_two_names(served: Running) -> None:
    here = {"session_id": "names"}
    for text in ("one", "two", "three"):
        served.post("/write", **here, text=text)
    assert served.post("/rollback", **here, target_turn=2)["head"] == 2  # the older name
    assert served.post("/rollback", **here, turn=1)["head"] == 1
    assert served.post("/redo", **here)["head"] == 2
    assert served.post("/rollback", **here)["head"] == 1  # the default
    refused = served.post("/rollback", 400, **here, turn=1, target_turn=1)
    assert "turn and target_turn" in refused["error"]["message"]
    for name in ("turn", "target_turn"):
        assert served.post("/rollback", 400, **here, **{name: None})["error"]["param"].startswith(name)
    served.post("/story", **here, prompt=" four", max_len=2)
    for turns in (served.get("/sessions/names")["path"], served.get("/sessions/names/tree")["turns"]):
        assert turns[-1]["reused_tokens"] == turns[-1]["reused"]
        assert turns[-1]["recomputed_tokens"] == turns[-1]["recomputed"]
