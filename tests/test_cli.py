"""The command line as a person and as a script use it: in process where possible, in a terminal where it matters."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fabula import Model, SamplingParams, __version__
from fabula.cli.main import run
from fabula.cli.repl import Repl
from fabula.cli.session_source import SessionSource
from tiny import CHATML, random_tensors, write_model
from waiting import Hang, Patience, heard, python, run_program, stacks


@pytest.fixture(scope="module")
def folder_without_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that greedily generates 65,536 tokens: control tokens are never the likeliest."""
    tensors = random_tensors()
    tensors["lm_head.weight"][:4] = 0.0
    folder = tmp_path_factory.mktemp("models") / "endless"
    return write_model(folder, config={"max_position_embeddings": 65536}, tensors=tensors)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def fabula(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: object) -> Result:
        with pytest.raises(SystemExit) as end:
            run([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return call


def shell(*words: object, text: str = "", **more: Any) -> Result:
    """The command in a process of its own, fed from a pipe."""
    done = run_program([sys.executable, "-m", "fabula", *words], input=text, **more)
    return Result(done.returncode, done.stdout, done.stderr)


# ---- Help, version, errors ------------------------------------------------------------------------------------


def test_version_and_help(fabula: Any) -> None:
    assert fabula("--version").out == f"fabula, version {__version__}\n"
    shown = fabula("--help")
    assert shown.code == 0
    for command in ("bench", "chat", "inspect", "pull", "quantize", "run", "sessions", "story"):
        assert f"  {command} " in shown.out
        assert "Examples:" in fabula(command, "--help").out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nope"], 2, "No such command 'nope'"),
        (["story", "x", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["story", "x", "--max-tokens", "0"], 2, "max_tokens is 0"),
        (["story", "x", "--weights", "q9"], 2, "'q9' is not one of"),
        (["story", "x", "--model", "/no/such/model"], 1, "error: /no/such/model: no such file or folder"),
        (["inspect", "/no/such/model"], 1, "error: /no/such/model"),
        (["chat", "--prompt", ""], 2, "the message is empty"),
    ],
)
def test_errors_are_short_and_typed(fabula: Any, words: list[str], code: int, text: str) -> None:
    result = fabula(*words)
    assert (result.code, result.out) == (code, "")
    assert text in result.err and "Traceback" not in result.err
    assert "\x1b" not in result.err, "colours are for terminals"


def test_debug_shows_the_traceback() -> None:
    result = shell("--debug", "inspect", "/no/such/model")
    assert result.code == 1 and "Traceback" in result.err and "ModelNotFound" in result.err


def test_a_damaged_model_is_one_line(fabula: Any, tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    result = fabula("story", "x", "--model", broken)
    assert result.code == 1 and str(weights) in result.err and len(result.err.splitlines()) == 1


# ---- Story and chat -------------------------------------------------------------------------------------------


def test_story_as_json(fabula: Any, tiny_folder: Path) -> None:
    words = ("story", "the cat", "--model", tiny_folder, "--json", "--seed", 5, "--max-tokens", 12)
    first, second = (json.loads(fabula(*words).out) for _ in range(2))
    assert set(first) == {
        *("prompt", "text", "token_ids", "prompt_ids", "finish_reason", "seed", "model", "timings"),
    }
    assert first["token_ids"] == second["token_ids"] and first["text"] == second["text"]
    assert first["prompt"] == "the cat" and first["seed"] == 5
    assert first["timings"]["generated_tokens"] == len(first["token_ids"]) <= 12
    with Model.load(tiny_folder) as model:
        params = SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=12)
        assert model.generate("the cat", params).text() == first["text"]


def test_story_streams_prompt_and_text(fabula: Any, tiny_folder: Path) -> None:
    common = ("--model", tiny_folder, "--seed", 5, "--max-tokens", 12)
    text = json.loads(fabula("story", "the cat", "--json", *common).out)["text"]
    result = fabula("story", "the cat", *common)
    assert result.out == "the cat" + text + "\n" and result.err == ""


def test_story_from_a_pipe(tiny_folder: Path) -> None:
    result = shell("story", "--model", tiny_folder, "--max-tokens", "3", "--json", text="a beginning")
    assert result.code == 0 and json.loads(result.out)["prompt"] == "a beginning"


def test_a_prompt_beyond_the_context(fabula: Any, tiny_folder: Path) -> None:
    result = fabula("story", "word " * 300, "--model", tiny_folder, "--context", 50)
    assert result.code == 1 and "do not fit the context of 50" in result.err


def test_chat_answers_a_pipe(tiny_folder: Path) -> None:
    plain = shell("chat", "--model", tiny_folder, "--seed", 1, "-n", 8, text="hello\n")
    found = json.loads(shell("chat", "--model", tiny_folder, "--seed", 1, "-n", 8, "--json", text="hello\n").out)
    assert plain.code == 0 and plain.out == found["text"] + "\n"
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"]
    assert found["messages"][0]["content"] == "hello"


def test_a_reader_that_goes_away_causes_no_noise(tiny_folder: Path) -> None:
    words = f"story 'the cat sat' --model {tiny_folder} --max-tokens 400 --seed 5"
    command = f"{sys.executable} -m fabula {words} | head -c 5"
    done = run_program(["bash", "-c", command])
    assert done.stderr == "" and len(done.stdout) == 5


def test_run_without_a_terminal_tells_a_story(folder_without_end: Path) -> None:
    lengths = []
    for words in ((), ("--max-tokens", 10), ("--max-tokens", 300)):
        result = shell("run", "--model", folder_without_end, "--seed", 1, "--temperature", 0, *words)
        assert result.code == 0 and result.out.startswith("Once upon a time, in a lighthouse")
        lengths.append(len(result.out))
    assert lengths[1] < lengths[0] < lengths[2], "120 tokens unless a length is asked for"


class Lines:
    """Lines that a person types, and where the session stood before each."""

    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)
        self.talk: Repl | None = None
        self.heads: list[tuple[int, str]] = []

    def __call__(self) -> str:
        assert self.talk is not None
        head = self.talk.session.head
        self.heads.append((head.number, head.text))
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    def run(
        self, source: SessionSource, params: SamplingParams, *, kind: str = "chat", name: str | None = None
    ) -> Repl:
        session = source.blank(name or source.new_name(kind), params=params)
        self.talk = Repl(source, session, self, kind=kind)
        self.talk.run()
        return self.talk


def test_slash_commands(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(
        *("/help", "hello", "/regen", "more", "/undo", "/undo", "/undo", "/redo", "/goto 1", "/goto 9", "/edit bye"),
        *("/tree", "/goto 0", "/redo", "/nonsense", "/system Be kind.", "hi", "/reset"),
    )
    with Model.load(tiny_folder, threads=1) as model:
        talk = lines.run(SessionSource(model), SamplingParams(max_tokens=6, seed=3))
    numbers = [number for number, _ in lines.heads]
    assert numbers == [0, 0, 1, 1, 2, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0]
    texts = [text for _, text in lines.heads]
    assert texts[2] != texts[3], "another answer, not the same one again"
    assert texts[9] == texts[2], "turn 1 of the tree is the first answer"
    said = capsys.readouterr().err
    for part in (
        "/regen ",
        "there is no turn yet",
        "0 .. 3, or a tag; /tree",
        "bye →",
        "← here",
        "there is no command",
        "at the start",
    ):
        assert part in said, part
    assert talk.session.turns == []


def test_a_message_too_long_is_taken_back(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Model.load(tiny_folder, threads=1, context=80) as model:
        talk = Lines("hi", "long " * 200).run(SessionSource(model), SamplingParams(max_tokens=4, seed=3))
        assert [turn.prompt for turn in talk.session.path] == ["hi"]
    assert "/undo goes back" in capsys.readouterr().err


# ---- Inspect and pull -----------------------------------------------------------------------------------------


def test_inspect(fabula: Any, tiny_folder: Path) -> None:
    found = json.loads(fabula("inspect", tiny_folder, "--json", "--tensors").out)
    assert (found["family"], found["n_layers"], found["head_dim"]) == ("Llama", 2, 6)
    assert len(found["tensors"]) == 21 and found["tensors"][0]["dtype"] == "F32"
    n_numbers = sum(info["n_bytes"] for info in found["tensors"]) // 4
    assert found["n_parameters"] == n_numbers and found["bytes_on_disk"] == {"F32": 4 * n_numbers}
    assert found["kv_bytes_per_token"] == {"f32": 2 * 2 * 2 * 6 * 4, "f16": 2 * 2 * 2 * 6 * 2}
    assert found["tokenizer"]["special_tokens"]["<|im_end|>"] == 3
    assert fabula("inspect", tiny_folder, "--template").out.strip() == CHATML.strip()
    shown = fabula("inspect", tiny_folder, "--tensors").out
    assert "Llama" in shown and "model.layers.1.mlp.up_proj.weight" in shown


def test_inspect_reads_no_weights(fabula: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fabula.formats.safetensors import SafetensorsCheckpoint

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(SafetensorsCheckpoint, "read", refuse)
    assert fabula("inspect", tiny_folder).code == 0


def test_pull_lists_and_refuses(fabula: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_CACHE", str(tmp_path))
    rows = json.loads(fabula("pull", "--list", "--json").out)
    assert [(row["name"], row["cached"]) for row in rows] == [("smollm2-135m-instruct", False)]
    assert "not downloaded" in fabula("pull", "--list").out
    result = fabula("pull", "no-such-model")
    assert result.code == 1 and "no-such-model" in result.err


def test_the_real_model_knows_its_capitals(fabula: Any, smollm2_gguf: Path) -> None:
    # At four bits and with inputs of eight, as in the file, the model does not know it, on other engines neither.
    words = ("--model", smollm2_gguf, "--weights", "f16", "--temperature", 0)
    assert "Paris" in fabula("chat", *words, "--prompt", "What is the capital of France?").out


def test_names_of_precisions_are_those_of_the_models() -> None:
    from fabula._parallel import MOST_DEVICES
    from fabula.choices import FILE_TYPES, KV_NAMES, MAX_DEVICES, WEIGHTS_ALIASES
    from fabula.kv.format import kv_dtypes
    from fabula.models.recipe import KINDS

    assert tuple(KINDS) == FILE_TYPES and set(WEIGHTS_ALIASES.values()) <= set(KINDS)
    assert len({kv_dtypes(name) for name in KV_NAMES}) == len(KV_NAMES) and MAX_DEVICES == MOST_DEVICES


# ---- In a terminal --------------------------------------------------------------------------------------------


class Terminal:
    """A program on a pseudo-terminal, with a folder for its data."""

    def __init__(self, data: Path, *words: object) -> None:
        self._fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x28\x00\x78\x00\x00\x00\x00\x00")  # 40 rows of 120
        self.process = subprocess.Popen(
            python("fabula", *words),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "FABULA_DATA": str(data)},
        )
        os.close(slave)
        self.text = ""
        heard[self.process.pid] = self._rest

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """Reads until `text` has come after the text that was read before, and returns what it read."""
        return self._read_until(lambda came: text in came, repr(text))

    def wait_for_more(self, n: int) -> str:
        """Reads on until n more characters have come."""
        return self._read_until(lambda came: len(came) >= n, f"{n} characters")

    def type_until(self, typed: str, text: str) -> None:
        """Types the same keys repeatedly until `text` comes: for keys that only count once the program reads them."""
        for _ in range(50):
            self.type(typed)
            try:
                self._read_until(lambda came: text in came, repr(text), seconds=0.5)
            except Hang:  # it waits for keys
                continue
            return
        raise AssertionError(f"{text!r} did not come; there was {self.text[-500:]!r}")

    def _read_until(self, enough: Callable[[str], bool], what: str, *, seconds: float | None = None) -> str:
        """What comes until it is enough.

        Raises:
            Hang: nothing comes, and the program does nothing for so many seconds.
        """
        start, patience = len(self.text), Patience(lambda: len(self.text), seconds=seconds)
        while not enough(self.text[start:]):
            if not select.select([self._fd], [], [], 0.05)[0]:
                if patience.is_out:
                    raise Hang(f"{what} did not come; there was {self.text[start:]!r}{'' if seconds else stacks()}")
                continue
            try:
                self.text += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the program ended; there was {self.text[start:]!r}") from None
        return self.text[start:]

    def _rest(self) -> str:
        """What comes at once."""
        came = ""
        while select.select([self._fd], [], [], 0)[0]:
            came += os.read(self._fd, 4096).decode(errors="replace")
        return came

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        heard.pop(self.process.pid, None)
        os.close(self._fd)


def test_ctrl_c_stops_the_answer_not_the_program(terminal: Any, folder_without_end: Path) -> None:
    """An answer that would take minutes is stopped in the middle; then the next one, then the end."""
    chat = terminal("chat", "--model", folder_without_end, "--max-tokens", 60000, "--temperature", 0)
    chat.wait_for("> ")
    chat.type("hello\r")
    chat.wait_for("hello")
    chat.wait_for_more(3000)  # of the answer
    chat.type("\x03")
    assert "stopped" in chat.wait_for("tokens/s")
    chat.type("\x03" * 3)  # at no particular moment
    chat.type("/undo\r")
    chat.wait_for("at the start")
    chat.type_until("\x03", "Ctrl-D exits")
    chat.type("/exit\r")
    assert chat.process.wait() == 0


def test_colours_only_on_a_terminal(terminal: Any) -> None:
    shown = terminal("inspect", "/no/such/model")
    assert "\x1b[" in shown.wait_for("no such file or folder")


def test_a_model_cannot_steer_the_terminal() -> None:
    from fabula.cli.console import _CONTROLS

    text = "a\x1b]0;title\x07b\x9b2Jc\r\x7f\nd\té"
    assert text.translate(_CONTROLS) == "a\ufffd]0;title\ufffdb\ufffd2Jc\ufffd\ufffd\nd\té"
