"""A model's own sampling defaults: read from its files, taken wherever nothing is given, shown in one way."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import gguf_builder as g
import tiny
from fabula import InvalidArgument, Model, ModelFileError, SamplingParams, Workspace
from fabula.choices import DEFAULT_MODEL
from fabula.cli.main import cli
from fabula.engine.defaults import SamplingDefaults, SamplingDefaultWarning, read_defaults
from fabula.engine.sampling import MODEL_SETTINGS
from fabula.formats.download import KNOWN_MODELS
from fabula.sessions.persistence import params_json, params_of
from test_openai_inside import Inside, inside

WANTED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def of(params: SamplingParams | None) -> dict[str, Any]:
    return {name: getattr(params, name) for name in WANTED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that recommends something."""
    path = tiny.write_model(tmp_path_factory.mktemp("recommends") / "tiny")
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 1, **WANTED}))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Model.load(folder, threads=1) as model:
        yield model


def generation_config(tmp_path: Path, **values: Any) -> SamplingDefaults:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    checkpoint: Any = SimpleNamespace(path=tmp_path, format="safetensors", metadata={})
    return read_defaults(checkpoint)


# ---- What is given --------------------------------------------------------------------------------------------------


def test_settings_know_what_was_given() -> None:
    assert SamplingParams().given == frozenset() and SamplingParams() == SamplingParams(temperature=1.0, top_k=0)
    for name in MODEL_SETTINGS:
        neutral = getattr(SamplingParams(), name)
        given = SamplingParams(**{name: type(neutral).__base__(neutral)})
        assert given.given == {name}
        assert replace(given, seed=1).given == {name} and replace(SamplingParams(), seed=1).given == frozenset()
        assert params_of(params_json(given)).given == {name}  # kept with a session
        assert getattr(given.resolved({name: 0.5}), name) == neutral
    full = SamplingParams(top_p=0.9).resolved({"temperature": 0.25, "top_p": 0.5})
    assert full.given == set(MODEL_SETTINGS)
    assert (full.temperature, full.top_p, full.top_k) == (0.25, 0.9, 0)
    assert full.resolved({"temperature": 2.0}) == full


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 1}, {"temperature": 0}, {"top_k": 0}, {"repetition_penalty": 1.0}]
)
def test_what_is_not_given_is_the_models_own(model: Model, given: dict[str, Any]) -> None:
    wanted = {**WANTED, **given}
    params = SamplingParams(**given, max_tokens=3)
    with model.generate("the", params) as generation:
        assert of(generation.params) == wanted
    with model.chat([{"role": "user", "content": "hi"}], params) as generation:
        assert of(generation.params) == wanted
    session = model.session(sampling=params)
    session.say("hi").text()
    assert of(session.head.params) == wanted
    assert session.params.given == set(given)
    again = model.import_(session.export(), id=f"again-{len(given)}-{next(iter(given), '')}")
    assert of(again.path[-1].params) == wanted and again.params.given == set(given)


def test_the_defaults_draw_other_tokens(model: Model, tiny_model: Model) -> None:
    """Defaults are used, not only reported: the same weights, seed and prompt."""
    params = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    own, explicit = (list(model.generate("the", p)) for p in (params, replace(params, **WANTED)))
    assert [piece.token_id for piece in own] == [piece.token_id for piece in explicit]
    plain = [piece.token_id for piece in tiny_model.generate("the", params)]
    neutral = [piece.token_id for piece in model.generate("the", replace(params, **NEUTRAL))]
    assert plain == neutral != [piece.token_id for piece in own]


def test_turns_keep_what_was_used(folder: Path, tmp_path: Path) -> None:
    """A turn means the same when its model recommends something else by then, or when it was made before models
    recommended anything."""
    with Workspace(tmp_path / "kept") as workspace:
        workspace.load(folder, threads=1, name="tiny")
        session = workspace.session("kept", model="tiny", sampling=SamplingParams(max_tokens=5, temperature=1.0))
        session.say("hi", SamplingParams(max_tokens=5, seed=2)).text()
        first = session.head
        data = session.export()
    (turn,) = data["turns"]
    assert turn["params"]["sampling"].items() >= WANTED.items()
    other = tiny.write_model(tmp_path / "other")
    with Workspace(tmp_path / "kept") as workspace:
        workspace.load(other, threads=1, name="tiny")
        session = workspace.open("kept")
        assert of(session.head.params) == WANTED and session.params.given == {"temperature"}
        session.replay(session.head).text()
        assert session.head.token_ids == first.token_ids
        session.say("and?").text()
        assert of(session.head.params) == NEUTRAL
    for name in WANTED:
        del turn["params"]["sampling"][name]  # as before
    with Model.load(folder, threads=1) as model:
        old = model.import_(data, id="old")
        assert of(old.head.params) == NEUTRAL
        old.replay(old.head).text()
        assert of(old.head.params) == NEUTRAL


# ---- Where they come from -------------------------------------------------------------------------------------------


def test_generation_config(tmp_path: Path) -> None:
    found = generation_config(tmp_path, **WANTED, typical_p=0.9, max_length=20, do_sample=True)
    assert found.values == {**WANTED, "typical_p": 0.9} and found.source == "generation_config.json"
    assert generation_config(tmp_path, temperature=0.7, do_sample=False).values == {"temperature": 0.0}
    assert generation_config(tmp_path, temperature=None, top_k=-1, top_p=1).values == {"top_k": 0, "top_p": 1.0}
    assert generation_config(tmp_path, top_k=40.0).values == {"top_k": 40}
    nothing = generation_config(tmp_path, eos_token_id=2)
    assert nothing == SamplingDefaults() and nothing.source == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "0.7"), ("temperature", -1), ("temperature", 1e300), ("temperature", True), ("top_p", 0),
        ("top_p", 1.5), ("top_p", [0.9]), ("top_k", 2**40), ("top_k", 1.5), ("top_k", "all"), ("min_p", -0.1),
        ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", {}), ("typical_p", "x" * 10_000),
        ("do_sample", "no"),
    ],
)  # fmt: skip
def test_a_hostile_value_is_named_and_passed_over(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.warns(SamplingDefaultWarning, match=key) as told:
        found = generation_config(
            tmp_path, **{"top_k": 7, key: value} if key != "top_k" else {"min_p": 0.1, key: value}
        )
    assert key not in found.values and found.values in ({"top_k": 7}, {"min_p": 0.1})
    assert len(told) == 1 and len(str(told[0].message)) < 400 and "generation_config.json" in str(told[0].message)


def test_a_generation_config_that_is_no_json(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "tiny")
    for text in ('{"temperature": NaN}', '{"top_p": Infinity}', "[]", "{"):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ModelFileError, match=r"generation_config\.json"):
            Model.load(folder, threads=1)


def gguf_defaults(tmp_path: Path, **keys: tuple[int, Any]) -> SamplingDefaults:
    from fabula.formats.gguf import GgufFile

    path = tmp_path / "model.gguf"
    path.write_bytes(g.build([g.key(f"general.sampling.{name}", *value) for name, value in keys.items()]))
    file = GgufFile(path)
    try:
        checkpoint: Any = SimpleNamespace(path=path, format="gguf", metadata=file.metadata)
        return read_defaults(checkpoint)
    finally:
        file.close()


def test_gguf_keys(tmp_path: Path) -> None:
    def f32(value: float) -> float:
        found: float = struct.unpack("<f", struct.pack("<f", value))[0]
        return found

    found = gguf_defaults(
        tmp_path, temp=(g.FLOAT32, 0.6), top_k=(g.INT32, 20), top_p=(g.FLOAT32, 0.95), min_p=(g.FLOAT32, 0.05),
        penalty_repeat=(g.FLOAT32, 1.1), penalty_last_n=(g.INT32, 64), xtc_probability=(g.FLOAT32, 0.5),
        xtc_threshold=(g.FLOAT32, 0.2), mirostat=(g.INT32, 0), mirostat_tau=(g.FLOAT32, 5.0),
    )  # fmt: skip
    assert found.source == "gguf"
    assert found.values == {
        "temperature": f32(0.6), "top_k": 20, "top_p": f32(0.95), "min_p": f32(0.05), "repetition_penalty": f32(1.1),
        "penalty_window": 64, "xtc_probability": 0.5, "xtc_threshold": f32(0.2),
    }  # fmt: skip
    assert gguf_defaults(tmp_path, top_k=(g.INT32, -1)).values == {"top_k": 0}
    assert gguf_defaults(tmp_path).source == ""
    for name, value in (
        ("temp", (g.FLOAT32, float("nan"))), ("temp", (g.STRING, "warm")), ("top_p", (g.FLOAT32, float("inf"))),
        ("mirostat", (g.INT32, 2)), ("sequence", (g.STRING, "kt")), ("penalty_last_n", (g.INT32, -5)),
    ):  # fmt: skip
        with pytest.warns(SamplingDefaultWarning, match=f"general.sampling.{name}"):
            assert gguf_defaults(tmp_path, **{name: value}).values == {}


def test_a_quantized_model_recommends_the_same(folder: Path, tmp_path: Path) -> None:
    from fabula.export.quantize import quantize_model

    quantize_model(folder, tmp_path / "one.gguf", "q8_0")
    quantize_model(tmp_path / "one.gguf", tmp_path / "two.gguf", "f16")
    for name in ("one.gguf", "two.gguf"):
        with Model.load(tmp_path / name, threads=1) as model:
            assert model.defaults.source == "gguf"
            assert model.defaults.values == pytest.approx(WANTED)
            assert type(model.defaults.values["top_k"]) is int


def test_the_built_in_model_has_what_its_card_recommends(smollm2_gguf: Path) -> None:
    from fabula.formats.open import open_checkpoint

    checkpoint = open_checkpoint(smollm2_gguf)
    checkpoint.close()
    found = read_defaults(checkpoint)
    assert found.values == {"temperature": 0.2, "top_p": 0.9} and found.source == "model card"
    assert KNOWN_MODELS[DEFAULT_MODEL].sampling == found.values


# ---- Where they are shown and taken ---------------------------------------------------------------------------------


def test_the_server_takes_and_shows_them(folder: Path, tmp_path: Path) -> None:
    async def post(client: Inside, path: str, **body: Any) -> Any:
        status, answer = await client.ask("POST", path, **body)
        assert status == 200, answer
        return answer

    async def work(client: Inside) -> None:
        told = (await client.get("/health"))[1]["models"][0]["sampling_defaults"]
        assert told.items() >= WANTED.items() and told["source"] == "generation_config.json"
        page = await (await client.app.test_client().get("/docs", headers={"Host": "localhost"})).get_data()
        assert b"Sampling defaults" in page and b"<td>0.6</td>" in page and b"generation_config.json" in page

        workspace = client.app.extensions["fabula"].workspace
        for path, words in (("/chat", {"message": "hi"}), ("/story", {"prompt": "hi"})):
            for given in ({}, {"temperature": 1}, {"temperature": 0.0, "top_k": 0}, {"temperature": None}):
                made = await post(client, path, **words, **given, max_len=2)
                turn = workspace.open(made["session_id"]).head
                wanted = WANTED | {name: value for name, value in given.items() if value is not None}
                assert of(turn.params) == wanted, given
        made = await post(client, "/chat", message="hi", sampling={"temperature": 1, "max_len": 2})
        about = (await client.get("/sessions/" + made["session_id"]))[1]
        assert about["sampling"] == {"temperature": 1.0, "max_tokens": 2} and about["sampling_defaults"] == told
        path = "/sessions/" + made["session_id"]
        _, about = await client.ask("PATCH", path, sampling={"temperature": None, "top_k": 0})
        assert about["sampling"] == {"top_k": 0, "max_tokens": 2}
        await post(client, "/chat", session_id=made["session_id"], message="hi")
        assert of(workspace.open(made["session_id"]).head.params) == WANTED | {"top_k": 0}

        # OpenAI's API: the same tokens as with the values written out.
        body = {"max_tokens": 20, "seed": 1, "ignore_eos": True}
        explicit = dict(WANTED)
        for path, more in (
            ("/v1/completions", {"prompt": "the"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            texts = [
                json.dumps([{**c, "index": 0} for c in (await post(client, path, **more, **body, **given))["choices"]])
                for given in ({}, explicit, {"temperature": None, "top_p": None}, {"temperature": 1, **_rest(NEUTRAL)})
            ]
            assert texts[0] == texts[1] == texts[2] != texts[3], path
        first = await client.respond(input="hi")
        assert (first["temperature"], first["top_p"]) == (0.6, 0.95)
        first = await client.respond(input="hi", temperature=1)
        assert (first["temperature"], first["top_p"]) == (1.0, 0.95)

    inside(tmp_path, folder, work)


def _rest(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "temperature"}


def test_the_command_line_takes_and_shows_them(folder: Path, tiny_folder: Path) -> None:
    shell = CliRunner()

    def out(*words: object) -> str:
        result = shell.invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    told = json.loads(out("inspect", folder, "--json"))["sampling_defaults"]
    assert told.items() >= WANTED.items() and told["source"] == "generation_config.json"
    line = "temperature 0.6, top_k 20, top_p 0.95, min_p 0.05, repetition_penalty 1.1 (generation_config.json)"
    assert line in out("inspect", folder)
    assert "temperature 1" in out("inspect", tiny_folder)

    common = ("--seed", 1, "-n", 20, "-t", 1, "--json")
    explicit = [word for name, value in WANTED.items() for word in (f"--{name.replace('_', '-')}", value)]

    def ids(*words: object) -> list[int]:
        found: list[int] = json.loads(out(*words, *common))["token_ids"]
        return found

    own = ids("story", "the", "-m", folder)
    assert own == ids("story", "the", "-m", folder, *explicit)
    assert own != ids("story", "the", "-m", folder, "--temperature", 1, "--top-k", 0)
    asked = ("chat", "--prompt", "hi")
    assert ids(*asked, "-m", folder) == ids(*asked, "-m", folder, *explicit)
    # A model that recommends nothing has what the terminal always had.
    assert ids("story", "the", "-m", tiny_folder) == ids(
        "story", "the", "-m", tiny_folder, "--temperature", 0.8, "--top-p", 0.95
    )
    assert ids(*asked, "-m", tiny_folder) == ids(*asked, "-m", tiny_folder, "--temperature", 0.7, "--top-p", 0.9)


def test_a_value_that_cannot_be_is_still_refused() -> None:
    with pytest.raises(InvalidArgument, match="temperature"):
        SamplingParams(temperature=None)  # type: ignore[arg-type]
