"""Verbs that merge settings: the source of the settings, and whether the seed is new.

    say, tell, write                session's settings; its seed, if it has one
    regenerate, edit                the turn's settings, a new seed
    branch                          session's settings; other answers to the head's message get new seeds
    continue, fork_at, replay       the turn's settings and its seed
    rewrite                         samples nothing; the turn keeps its settings for continuations
    PATCH                           what is given; null resets it
    /v1/responses                   nothing is inherited

A seed that is given always counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fabula import Model, SamplingParams
from test_openai_inside import Inside, inside

HOT = {"temperature": 1.5, "max_len": 12, "ignore_eos": True}


async def post(client: Inside, path: str, **body: Any) -> Any:
    status, answer = await client.ask("POST", path, **body)
    assert status == 200, answer
    return answer


def test_answers_made_again_get_new_seeds(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        first = await post(client, "/chat", message="hi", **HOT, seed=4)
        here = {"session_id": first["session_id"]}
        seeds = {first["seed"]}
        for body in ({}, {"temperature": 1.4}, {"max_len": 13}, {"top_k": 50, "seed": None}, {"n_logprobs": 1}):
            made = await post(client, "/regenerate", **here, **body)
            assert made["seed"] not in seeds, body
            seeds.add(made["seed"])
            if body == {"temperature": 1.4}:
                assert made["text"] != first["text"]
        assert (await post(client, "/regenerate", **here, seed=4, temperature=1.5, max_len=12, top_k=0))[
            "text"
        ] == first["text"]
        for body in ({}, {"top_p": 0.99}):
            made = await post(client, "/edit", **here, turn=first["turn_id"], message="hi", **body)
            assert made["seed"] not in seeds, body
            seeds.add(made["seed"])
            assert made["usage"]["generated_tokens"] == 12  # the turn's settings, not the session's
        made = await post(client, "/edit", **here, turn=first["turn_id"], message="hi", seed=4, max_len=12)
        assert made["text"] == first["text"]
        for body in ({}, {"max_len": 12}):
            branches = await post(client, "/branch", **here, n=2, **HOT | body)
            found = {one["seed"] for one in branches["replies"]}
            assert len(found) == 2 and not found & seeds
            seeds |= found
        branches = await post(client, "/branch", **here, n=2, **HOT, seed=70)
        assert [one["seed"] for one in branches["replies"]] == [70, 71]

    inside(tmp_path, tiny_folder, work)


def test_what_goes_on_inside_an_answer_keeps_its_seed(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        first = await post(client, "/chat", message="hi", **HOT | {"max_len": 20}, seed=9)
        cut = await post(client, "/chat", message="hi", **HOT | {"max_len": 8}, seed=9)
        here = {"session_id": cut["session_id"]}
        more = await post(client, "/continue", **here, max_len=12)
        assert more["seed"] == 9 and more["text"] == first["text"]  # what would have come next
        assert (await post(client, "/continue", **here, max_len=4, seed=10))["seed"] == 10
        tokens = await post(client, "/turn_tokens", **here, turn=cut["turn_id"])
        token = tokens["tokens"][3]["token_id"]
        place = {"turn": cut["turn_id"], "position": 3, "token_id": token}
        assert (await post(client, "/fork_at", **here, **place, max_len=4))["text"] == cut["text"]
        for body in ({}, {"max_len": 8}):
            again = await post(client, "/replay", **here, turn=cut["turn_id"], **body)
            assert again["seed"] == 9 and again["text"] == cut["text"]
        written = await post(client, "/rewrite?path=true", **here, turn=cut["turn_id"], text="well,")
        assert written["path"][-1]["seed"] == 9
        assert (await post(client, "/continue", **here, max_len=4))["seed"] == 9
        assert (await post(client, "/regenerate", **here, max_len=4))["seed"] != 9

    inside(tmp_path, tiny_folder, work)


def test_a_seed_of_the_session_counts_until_it_is_taken_back(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        for path, words in (("/chat", "message"), ("/story", "prompt")):
            first = await post(client, path, **{words: "hi"}, sampling={**HOT, "seed": 3})
            here = {"session_id": first["session_id"]}
            assert first["seed"] == 3
            assert (await post(client, path, **here, **{words: "a"}, max_len=3))["seed"] == 3
            assert (await post(client, path, **here, **{words: "a"}, seed=8))["seed"] == 8
            assert (await post(client, "/regenerate", **here, max_len=3))["seed"] not in (3, 8)
            await post(client, "/write", **here, text="b") if path == "/story" else None
            status, about = await client.ask("PATCH", f"/sessions/{first['session_id']}", sampling={"seed": None})
            assert status == 200 and "seed" not in about["sampling"] and about["sampling"]["temperature"] == 1.5
            assert (await post(client, path, **here, **{words: "a"}, max_len=3))["seed"] not in (3, 8)

    inside(tmp_path, tiny_folder, work)


def test_responses_take_nothing_over(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        first = await client.respond(input="hi", temperature=1.5, seed=3)
        second = await client.respond(input="hi", previous_response_id=first["id"], top_p=0.5)
        assert (first["temperature"], first["top_p"]) == (1.5, 1.0)
        assert (second["temperature"], second["top_p"]) == (1.0, 0.5)
        session = client.app.extensions["fabula"].workspace.sessions()[0]
        turns = client.app.extensions["fabula"].workspace.open(session.record.id, tenant=session.record.tenant).path
        assert turns[0].params.seed == 3 != turns[1].params.seed
        assert (await client.get("/v1/responses/" + second["id"]))[1]["top_p"] == 0.5

    inside(tmp_path, tiny_folder, work)


@pytest.mark.parametrize("seed", [None, 6])
def test_the_sdk_follows_the_same_rules(tiny_model: Model, seed: int | None) -> None:
    session = tiny_model.session(sampling=SamplingParams(temperature=1.5, max_tokens=8, seed=seed, ignore_eos=True))
    session.say("hi").text()
    first = session.head
    assert first.params is not None
    session.regenerate().text()
    assert session.head.params is not None and session.head.params.seed != first.params.seed
    session.edit(first, "hi").text()
    assert session.head.params.seed != first.params.seed
    session.replay(first).text()
    assert session.head.params.seed == first.params.seed and session.head.token_ids == first.token_ids
    session.rollback(first)
    for reply in session.branch(2):
        reply.text()
        assert reply.turn is not None and reply.turn.params is not None
        assert reply.turn.params.seed != first.params.seed
