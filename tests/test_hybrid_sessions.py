"""Hybrids: going back costs nothing where a state was kept, and everything else is the same as for other models."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from drafting import cheap_rows
from fabula import InvalidArgument, Model, SamplingParams, Session, Turn, Workspace
from fabula.cli.main import cli
from fabula.engine.generation import Generation
from fabula.kv.states import MIN_SLOTS
from hybrids import make_hybrid
from test_openai_inside import Inside, inside
from waiting import wait_until

SHORT = SamplingParams(temperature=1.0, max_tokens=40, seed=11, ignore_eos=True)
LONG_TEXT = "in the west, the stone is on the hill and there we stand "


@pytest.fixture(autouse=True)
def _hybrids(monkeypatch: pytest.MonkeyPatch) -> None:
    make_hybrid(monkeypatch)


@contextmanager
def loaded(folder: Path, n_slots: int = 0, **options: Any) -> Iterator[Model]:
    if n_slots:
        with Model.load(folder, threads=1) as sized:
            options["state_memory"] = n_slots * sized.kv_usage.slot_bytes
    with Model.load(folder, threads=1, **options) as model:
        yield model


@pytest.fixture
def model(tiny_folder: Path) -> Iterator[Model]:
    with loaded(tiny_folder) as made:
        yield made


def alone(model: Model, turn: Turn) -> list[int]:
    """The answer of a turn from scratch: no session, nothing from before."""
    assert turn.params is not None
    n_prompt = turn.n_ids - len(turn.token_ids)
    model.clear_cache()
    begun = turn.token_ids[: turn.n_begun]
    generation = Generation(model._engine, turn.ids()[:n_prompt], turn.params, continues=not turn.chat, begun=begun)
    generation.text()
    return generation.token_ids


def talk(session: Session, *words: str, params: SamplingParams = SHORT) -> list[Turn]:
    for text in words:
        session.say(text, params).text()
    return session.path


def said(reply: Any) -> Turn:
    reply.text()
    turn: Turn = reply.turn
    return turn


# ---- Going back -----------------------------------------------------------------------------------------------------


GOING_BACK: dict[str, Callable[[Session], Turn]] = {
    "say": lambda session: said(session.say("and then?", SHORT)),
    "rollback": lambda session: (session.rollback(2), said(session.say("and then?", SHORT)))[1],
    "rollback and redo": lambda session: (session.rollback(2), session.redo(), said(session.say("so", SHORT)))[2],
    "regenerate": lambda session: said(session.regenerate(SHORT)),
    "regenerate an earlier one": lambda session: (session.rollback(2), said(session.regenerate(SHORT)))[1],
    "edit": lambda session: said(session.edit(2, "something else", SHORT)),
    "replay": lambda session: said(session.replay(2)),
    "fork": lambda session: said(session.fork(2).say("and then?", SHORT)),
    "continue": lambda session: said(session.continue_(5, params=SHORT)),
    "branch": lambda session: [said(reply) for reply in session.branch(3, "which?", SHORT)][2],
}


@pytest.mark.parametrize("name", GOING_BACK)
def test_going_back_recomputes_nothing(model: Model, name: str) -> None:
    session = model.session(system="be kind")
    talk(session, "hello there", "what is it?", "and that?")
    turn = GOING_BACK[name](session)
    assert turn.recomputed == 0 and turn.why_recomputed == ""
    assert turn.parent is not None and turn.reused >= turn.parent.n_ids - 1
    assert list(turn.token_ids) == alone(model, turn)


def test_a_prompt_is_computed_once(model: Model) -> None:
    session = model.session()
    (turn,) = talk(session, LONG_TEXT)
    again = said(session.regenerate(SHORT))
    n_prompt = turn.n_ids - len(turn.token_ids)
    assert again.reused == n_prompt - 1 and again.token_ids == turn.token_ids
    branches = [said(reply) for reply in session.branch(4, params=SHORT)]
    assert [branch.reused for branch in branches] == [n_prompt - 1] * 4


def test_branches_wait_for_the_prompt_that_they_share(model: Model) -> None:
    session = model.session()
    replies = session.branch(4, LONG_TEXT * 3, SHORT)
    turns = [said(reply) for reply in replies]
    n_prompt = turns[0].n_ids - len(turns[0].token_ids)
    assert sorted(turn.reused for turn in turns) == [0, *[n_prompt - 1] * 3]


@pytest.mark.parametrize("n_read", [1, 9, 30])
def test_a_canceled_answer_goes_on_close_by(model: Model, n_read: int) -> None:
    session = model.session()
    talk(session, "hello")
    with session.say("why?", SamplingParams(max_tokens=400, ignore_eos=True)) as reply:
        for _ in range(n_read):
            next(reply)
    turn = session.head
    assert turn.finish_reason == "cancelled" and len(turn.token_ids) == n_read
    following = said(session.say("go on", SHORT))
    assert following.recomputed <= 64, "not the whole answer"
    assert bool(following.why_recomputed) == (following.recomputed > 0)
    assert list(following.token_ids) == alone(model, following)


def test_a_stop_string_leaves_nothing_to_recompute(model: Model) -> None:
    session = model.session()
    first = said(session.say("hello", SHORT))
    stop = first.text[len(first.text) // 2 :][:3]
    session = model.session()
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=11, ignore_eos=True, stop=(stop,))
    turn = said(session.say("hello", params))
    assert turn.finish_reason == "stop" and stop not in turn.text
    following = said(session.say("go on", SHORT))
    assert following.recomputed == 0 and list(following.token_ids) == alone(model, following)


def test_the_middle_of_an_answer_is_near_a_fixed_state(model: Model) -> None:
    assert model._runner.pool.states is not None
    model._runner.pool.states.every = 64
    session = model.session()
    (turn,) = talk(session, "hello", params=SamplingParams(max_tokens=300, ignore_eos=True))
    session.configure(sampling=SHORT)
    other = said(session.fork_at(1, 250, int(turn.token_ids[0]) ^ 1, SHORT))
    n_known = other.n_ids - len(other.token_ids) + other.n_begun - 1
    assert n_known - 64 <= other.reused <= n_known and other.recomputed == n_known - other.reused
    assert list(other.token_ids) == alone(model, other)


# ---- The prefix cache -----------------------------------------------------------------------------------------------


def answer(model: Model, text: str, **params: Any) -> Generation:
    generation = model.generate(text, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, **params))
    generation.text()
    return generation


def test_a_client_without_sessions_goes_on_from_its_last_answer(model: Model) -> None:
    first = answer(model, LONG_TEXT * 2)
    ids = [*first.prompt_ids, *first.token_ids]
    second = model.generate([*ids, *model.tokenizer.encode(LONG_TEXT, add_bos=False)], SHORT)
    second.text()
    assert second.timings.reused_tokens == len(ids) - 1
    third = model.generate(ids[: len(first.prompt_ids)], SHORT)
    third.text()
    assert third.timings.reused_tokens == len(first.prompt_ids) - 1


def test_a_third_text_finds_the_state_where_two_branched_off(model: Model) -> None:
    start, ends = LONG_TEXT * 3, ["the sea", "a stone", "why <not>?"]
    n_start = len(model.tokenizer.encode(start))
    reused = [answer(model, start + end).timings.reused_tokens for end in ends]
    assert reused[:2] == [0, 0] and n_start - 33 <= reused[2] <= n_start


def test_other_owners_find_nothing(model: Model) -> None:
    for tenant in ("a", "b"):
        session = model.session(tenant=tenant)
        assert said(session.say(LONG_TEXT * 2, SHORT)).reused == 0


# ---- Budgets --------------------------------------------------------------------------------------------------------


def test_a_hundred_turns_under_a_small_budget(tiny_folder: Path) -> None:
    with loaded(tiny_folder, n_slots=12, context=600) as model:
        session = model.session(context_policy="drop_oldest_turns")
        params = SamplingParams(temperature=1.0, max_tokens=3, seed=3, ignore_eos=True)
        recomputed = []
        for i in range(100):
            if i % 20 == 19:
                session.rollback(i // 2 % 9 + 1)
            turn = said(session.say("a", params))
            recomputed.append(turn.recomputed)
            assert bool(turn.why_recomputed) == (turn.recomputed > 0)
            usage = model.kv_usage
            assert usage.n_slots_used <= usage.n_slots == 12
        assert usage.n_states_evicted > 20
        lost = [turn for turn in session.turns if turn.why_recomputed.startswith("the recurrent state")]
        assert lost and sum(recomputed) > 0, "far back, states were evicted, which the turn says"
        assert sum(n == 0 for n in recomputed) > 60, "near the head they were not"
        for turn in lost[:2]:
            assert list(turn.token_ids) == alone(model, turn)


def test_more_requests_than_slots(tiny_folder: Path) -> None:
    with loaded(tiny_folder, n_slots=MIN_SLOTS) as model:
        texts = [f"{i} {LONG_TEXT * (i % 3)}" for i in range(6)]
        expected = [answer(model, text).token_ids for text in texts]
        model.clear_cache()
        found: dict[str, list[int]] = {}

        def run(text: str) -> None:
            found[text] = answer(model, text).token_ids

        threads = [threading.Thread(target=run, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[text] for text in texts] == expected


def test_embeddings_of_more_texts_than_slots(tiny_folder: Path) -> None:
    with loaded(tiny_folder, n_slots=MIN_SLOTS) as model:
        texts = [f"text number {i}" for i in range(20)]
        together = model.embed(texts)
        for i in (0, 7, 19):
            assert (together.vectors[i] == model.embed([texts[i]]).vectors[0]).all()


def test_memory_is_told_and_given_back(tiny_folder: Path) -> None:
    with loaded(tiny_folder, n_slots=20) as model:
        session = model.session()
        talk(session, "hello", "there")
        usage = model.kv_usage
        assert usage.n_slots == 20 and 0 < usage.n_slots_used <= 20
        assert usage.state_bytes == usage.n_slots_used * usage.slot_bytes
        freed = session.delete()
        assert freed >= usage.state_bytes - model.kv_usage.state_bytes > 0
        model.clear_cache()
        assert model.kv_usage.n_slots_used == model.kv_usage.used_bytes == 0
    model.close()
    model.clear_cache()


def test_budget_out_of_range(tiny_folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="state_memory is 0, must be a whole number"):
        Model.load(tiny_folder, state_memory=0)


# ---- Disk -----------------------------------------------------------------------------------------------------------


def test_a_restart_recomputes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="m", threads=1)
        session = workspace.session("s", model="m")
        talk(session, LONG_TEXT, "and then?", "so?")
    with Workspace(tmp_path) as workspace:
        model = workspace.load(tiny_folder, name="m", threads=1)
        assert model.kv_usage.n_states_spilled > 0 and model.kv_usage.n_slots_used == 0
        session = workspace.open("s")
        following = said(session.say("go on", SHORT))
        assert following.recomputed == 0 and following.reused == following.parent.n_ids - 1  # type: ignore[union-attr]
        session.rollback(2)
        second = said(session.say("elsewhere", SHORT))
        assert second.recomputed == 0
        for turn in (following, second):
            assert list(turn.token_ids) == alone(model, turn)


def test_what_is_evicted_is_read_back(tiny_folder: Path, tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        with Model.load(tiny_folder, threads=1) as sized:
            n_bytes = 6 * sized.kv_usage.slot_bytes
        model = workspace.load(tiny_folder, name="m", threads=1, state_memory=n_bytes)
        session = workspace.session("s", model="m")
        talk(session, LONG_TEXT, *"abcdef")
        assert model.kv_usage.n_states_evicted > 3
        wait_until(lambda: model.kv_usage.n_states_spilled > 3, "evicted states are not written")
        session.rollback(1)
        turn = said(session.say("elsewhere", SHORT))
        assert turn.recomputed == 0 and list(turn.token_ids) == alone(model, turn)


def test_an_exported_session_brings_its_states(model: Model, tiny_folder: Path, tmp_path: Path) -> None:
    session = model.session("s")
    talk(session, LONG_TEXT, "and then?", "so?")
    data = session.export(kv=tmp_path / "kv.safetensors")
    with loaded(tiny_folder) as other:
        carried = other.import_(data, kv=tmp_path / "kv.safetensors")
        carried.rollback(2)
        turn = said(carried.say("go on", SHORT))
        assert turn.recomputed == 0 and list(turn.token_ids) == alone(other, turn)
    with loaded(tiny_folder) as other:
        carried = other.import_(data)
        turn = said(carried.say("go on", SHORT))
        assert turn.recomputed > 0 and turn.why_recomputed.startswith("the recurrent state where its past ends")


# ---- Speculation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.7, 5), (0.7, 6)])
def test_drafts_change_nothing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, seed: int
) -> None:
    """The draft model is a hybrid, too, and knows the likeliest token."""
    cheap_rows(monkeypatch, row=0.02)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=120, ignore_eos=True)
    with loaded(tiny_folder, draft_model=tiny_folder) as model, loaded(tiny_folder, speculation="off") as plain:
        session, expected = model.session(), plain.session()
        turns = [said(session.say(text, params)) for text in ("the sea", "and then?")]
        assert [turn.token_ids for turn in turns] == [
            said(expected.say(text, params)).token_ids for text in ("the sea", "and then?")
        ]
        timings = turns[0].timings
        assert timings is not None and timings.accepted > 10
        assert temperature == 0 or timings.drafted > timings.accepted
        assert turns[1].recomputed == 0


# ---- The server -----------------------------------------------------------------------------------------------------


def test_health_and_metrics_tell_of_states(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        await client.ask("POST", "/chat", message="hello", session_id="a", max_len=5)
        model = client.app.extensions["fabula"].models["tiny"].model
        (found,) = (await client.get("/health"))[1]["models"]
        assert found["state_limit_bytes"] <= 1 << 20 and found["state_bytes"] == model.kv_usage.state_bytes > 0
        reply = await client.app.test_client().get("/metrics", headers={"Host": "localhost"})
        lines = (await reply.get_data(as_text=True)).splitlines()
        told = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if "_state" in line and line[0] != "#"
        }
        assert told['fabula_states{kind="used",model="tiny"}'] == model.kv_usage.n_slots_used
        assert told['fabula_states{kind="all",model="tiny"}'] == model.kv_usage.n_slots
        assert told['fabula_state_bytes{model="tiny"}'] == model.kv_usage.slot_bytes
        assert told['fabula_evicted_states_total{model="tiny"}'] == 0

    inside(tmp_path, tiny_folder, work, state_memory=1 << 20)


def test_inspect_tells_the_size_of_a_state(tiny_folder: Path) -> None:
    with loaded(tiny_folder) as model:
        n_bytes = model.kv_usage.slot_bytes
    shell = CliRunner()
    facts = json.loads(shell.invoke(cli, ["inspect", str(tiny_folder), "--json"]).output)
    assert facts["state_bytes"] == n_bytes
    shown = shell.invoke(cli, ["inspect", str(tiny_folder)]).output
    assert "of recurrent layers, for each place that a text can go on from" in shown
