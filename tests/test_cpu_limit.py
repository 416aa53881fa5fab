"""Limits of untrusted work count the CPU time of its thread: a machine that is busy with others refuses nothing."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import tiny
from fabula import Constraint, InvalidArgument, Model
from fabula.engine import cpu_limit
from fabula.engine import grammar as grammar_module
from fabula.engine.cpu_limit import LimitedThread, thread_clock
from fabula.engine.grammar import Guide, Vocabulary
from fabula.errors import TemplateError
from fabula.sessions import tool_forms
from fabula.text import limits, template
from fabula.text.template import ChatTemplate
from waiting import wait_until


class Clock:
    """Reads `now` and then adds `step` to it."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step, self.n_reads = 0.0, step, 0

    def __call__(self) -> float:
        self.n_reads += 1
        self.now += self.step
        return self.now


def test_work_that_waits_for_a_processor_is_not_refused() -> None:
    release, wall, cpu = threading.Event(), Clock(), Clock()

    def work() -> None:
        wait_until(lambda: cpu.n_reads > 5, "nobody reads the clock")
        wall.now = 99.0  # an hour or a minute: all the same below the limit of wall time
        wait_until(lambda: cpu.n_reads > 10, "nobody reads the clock")
        release.set()

    thread = LimitedThread(work, "t", cpu_clock=lambda: cpu, wall_clock=wall)
    thread.start()
    assert thread.wait(2.0, 100.0)
    assert release.is_set()


@pytest.mark.parametrize(("cpu_step", "wall_step"), [(0.5, 0.0), (0.0, 30.0)])
def test_either_limit_ends_the_wait(cpu_step: float, wall_step: float) -> None:
    release = threading.Event()
    thread = LimitedThread(release.wait, "t", cpu_clock=lambda: Clock(cpu_step), wall_clock=Clock(wall_step))
    thread.start()
    try:
        assert not thread.wait(2.0, 100.0)
    finally:
        release.set()
    assert thread.wait(1e9, 1e9)


def test_a_thread_s_clock_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def spent_by_others(read: Callable[[], float]) -> float:
        before, end = read(), time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
        return read() - before

    clocks: list[Callable[[], float]] = []
    release = threading.Event()
    thread = threading.Thread(target=lambda: (clocks.append(thread_clock()), release.wait()))
    thread.start()
    wait_until(lambda: clocks, "the thread does not run")
    own = hasattr(time, "pthread_getcpuclockid")
    assert (spent_by_others(clocks[0]) < 0.1) == own
    release.set()
    thread.join()
    assert spent_by_others(thread_clock()) >= 0.19
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    assert spent_by_others(thread_clock()) >= 0.19, "the stand-in never reads less than what was used"


def test_a_grammar_is_refused_for_cpu_time_alone(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiling thread sleeps for longer than COMPILE_SECONDS, like one that gets no CPU time."""
    wall, compile_ = Clock(1.0), Vocabulary._compile
    monkeypatch.setattr(cpu_limit, "POLL_S", 0.001)
    monkeypatch.setattr(
        grammar_module,
        "LimitedThread",
        lambda work, name: LimitedThread(work, name, cpu_clock=lambda: Clock(), wall_clock=wall),
    )

    def slow(vocabulary: Vocabulary, constraint: Constraint) -> object:
        wait_until(lambda: wall.now > 3 * grammar_module.COMPILE_SECONDS, "nobody waits")
        return compile_(vocabulary, constraint)

    monkeypatch.setattr(Vocabulary, "_compile", slow)
    assert Guide(tiny_model.tokenizer, tiny.VOCAB, Constraint.regex("starved")).allowed.any()
    release = threading.Event()
    monkeypatch.setattr(
        grammar_module,
        "LimitedThread",
        lambda work, name: LimitedThread(work, name, cpu_clock=lambda: Clock(0.5), wall_clock=Clock()),
    )
    monkeypatch.setattr(Vocabulary, "_compile", lambda *_: release.wait())
    try:
        with pytest.raises(InvalidArgument, match="takes more than 2 s to compile"):
            Guide(tiny_model.tokenizer, tiny.VOCAB, Constraint.regex("endless"))
    finally:
        release.set()


LOOP = "{% for i in range(600) %}{{ i }}{% endfor %}"
ASK = [{"role": "user", "content": "x"}]


def test_a_render_is_refused_for_cpu_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    leaps = itertools.count(0.0, 1000.0).__next__
    starved = SimpleNamespace(monotonic=leaps, perf_counter=leaps, time=leaps, thread_time=time.thread_time)
    for module in (limits, template):
        monkeypatch.setattr(module, "time", starved)
    assert ChatTemplate(LOOP).render(ASK).startswith("0123")
    starved.thread_time = lambda: time.thread_time() - 3.0  # the render began 3 s of CPU time ago
    with pytest.raises(TemplateError, match="takes too long"):
        ChatTemplate(LOOP).render(ASK)


def test_a_probe_of_a_template_ends_for_cpu_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    writes_calls = ChatTemplate(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    leaps = itertools.count(0.0, 1000.0).__next__
    monkeypatch.setattr(tool_forms, "time", SimpleNamespace(monotonic=leaps, thread_time=time.thread_time))
    assert tool_forms._probe(writes_calls).writes_calls
    monkeypatch.setattr(tool_forms, "time", SimpleNamespace(thread_time=leaps))
    assert not tool_forms._probe(writes_calls).writes_calls
