"""Compiled constraints, and the state of one answer in a constraint.

The `llguidance` library has an Earley parser over a lazily built lexer, which computes the mask of tokens that may come
next. It gets the bytes of our vocabulary, so every kind of tokenizer works the same way.

Grammars are untrusted user input. Limits that the library lacks are set here and in `engine/constraint.py`:

    stack       chains of rules are compiled recursively, 1,500 links overflow 8 MiB: the thread has a stack of 64 MiB
    time        2 s of CPU time, more for sources made of many schemas; then the caller gets an error, and the
                library's fuel ends the thread soon after that
    forcing     off: text with one possible continuation would be retokenized at every token, 50 ms for 48 KB
    memory      an LRU cache of compiled grammars, limited by number and by an estimate of their bytes
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fabula.engine.constraint import MAX_SOURCE_BYTES, Constraint
from fabula.engine.cpu_limit import LimitedThread
from fabula.engine.json_schema import MAX_MESSAGE, in_words
from fabula.errors import EngineBusy, InvalidArgument
from fabula.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_SECONDS = 2.0  # CPU time of the compiling thread
SECONDS_PER_MIB = 6.0  # added per MiB of source beyond MAX_SOURCE_BYTES: 128 tools of 500 KB take 1.5 s
WALL_FACTOR = 30  # wall time allowed per CPU time: a thread on a starved machine gets a few percent of a processor
QUEUE_FACTOR = 5  # wall time to wait for one of MAX_COMPILING slots, in COMPILE_SECONDS
MAX_COMPILING = 4  # at a time, including those that no caller waits for any more
STACK_BYTES = 64 << 20  # 3,000 links, more than 64 KiB of source can hold, need less than half of it; for each 64 KiB

MAX_CACHED = 128  # compiled grammars of one tokenizer
MAX_CACHED_BYTES = 64 << 20
MAX_GROWN_BYTES = 16 << 20  # a grammar whose lexer has grown by more is compiled again
SOURCE_FACTOR = 64  # bytes that a grammar holds for a byte of its source: 7 MiB for 125 KB, 35 MiB for 545 KB
# The library does not report its memory, which grows while it computes: 60 .. 130 MB per second of CPU time were
# measured for exploding lexers and large remainders. Ordinary masks take 15 us and allocate nothing.
BYTES_PER_SECOND = 128 << 20
FREE_SECONDS = 100e-6

MAX_FORCED_CHOICES = 64  # tokens that begin a text with one continuation, its first bytes, are fewer
FORCED_BYTES = 8  # of a forced token, about; more of the text is not tokenized
COPY_SECONDS = 200e-6  # of a copy of an answer's state, for drafts: usually 2 to 10 us; 10 ms behind 48 KB of text


class Grammar:
    """A compiled constraint; each answer uses a copy of it, and copies share the lexer.

    Attributes:
        n_bytes: estimate of its memory.
        n_compiled: the same after compiling, before the first answer.
        is_spent: its lexer exceeded a limit; it cannot be used any more.
    """

    def __init__(self, matcher: LLMatcher, n_bytes: int) -> None:
        self._matcher = matcher
        self.n_bytes = self.n_compiled = n_bytes
        self.is_spent = False

    def start(self) -> LLMatcher:
        return self._matcher.deep_copy()

    def worked(self, seconds: float) -> None:
        """Adds an estimate of how much the lexer grew in so much CPU time."""
        self.n_bytes += int(max(0.0, seconds - FREE_SECONDS) * BYTES_PER_SECOND)


class _Bytes:
    """A tokenizer with the interface of `TokenizerWrapper`. The library keeps it as long as the Vocabulary lives, so it
    has only a weak reference to the tokenizer. Since forcing is off, the library never tokenizes text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.eos_token_id = next(iter(tokenizer.eos_ids), None)  # None: the library appends one
        self.bos_token_id = tokenizer.bos_id
        self.tokens = _all_bytes(tokenizer)
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes) -> list[int]:
        tokenizer = self._tokenizer()
        return tokenizer.encode(text.decode("utf-8", "replace"), add_bos=False) if tokenizer is not None else []


class Vocabulary:
    """A tokenizer's vocabulary for the library, and an LRU cache of grammars compiled for it. Thread-safe.

    Args:
        tokenizer: of a model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        self.n_tokens = tokenizer.vocab_size
        self._tokenizer = weakref.ref(tokenizer)
        ends = list(tokenizer.eos_ids) or None
        self._tokens: LLTokenizer = LLTokenizer(TokenizerWrapper(_Bytes(tokenizer)), eos_token=ends)
        # 64 KiB of words compile with 100,000 of initial fuel, common schemas are followed with 20,000 a step, and a
        # state takes about 1 KiB. Text that is read character by character, among 152,000 tokens, takes 20,000 to
        # 100,000 items a mask, 20 ms.
        self._limits: LLParserLimits = LLParserLimits(
            initial_lexer_fuel=250_000,
            step_lexer_fuel=100_000,
            step_max_items=100_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        self._lock = threading.Lock()
        self._grammars: OrderedDict[Constraint, Grammar] = OrderedDict()

    def grammar(self, constraint: Constraint) -> Grammar:
        """Compiles a constraint, or takes it from the cache.

        Raises:
            InvalidArgument: it cannot be compiled, takes too much CPU time, or no text satisfies it; says why.
            EngineBusy: too many are being compiled.
        """
        with self._lock:
            found = self._grammars.get(constraint)
            if found is not None and not found.is_spent and found.n_bytes - found.n_compiled <= MAX_GROWN_BYTES:
                self._grammars.move_to_end(constraint)
                self._evict()
                return found
        done: list[Grammar | Exception] = []
        _run_beside(lambda: done.append(self._compiled(constraint)), constraint)
        compiled = done[0]
        if isinstance(compiled, Exception):
            raise compiled
        with self._lock:
            self._grammars[constraint] = compiled
            self._grammars.move_to_end(constraint)
            self._evict()
        return compiled

    def _evict(self) -> None:
        while len(self._grammars) > MAX_CACHED or self.n_cached_bytes > MAX_CACHED_BYTES:
            self._grammars.popitem(last=False)

    @property
    def n_cached(self) -> int:
        """Grammars in the cache."""
        return len(self._grammars)

    @property
    def n_cached_bytes(self) -> int:
        """Estimate of their memory."""
        return sum(grammar.n_bytes for grammar in self._grammars.values())

    def _compiled(self, constraint: Constraint) -> Grammar | Exception:
        try:
            return self._compile(constraint)
        except Exception as error:
            return error

    def _token_id(self, text: str) -> int | None:
        """The id of a token given by its text or its decimal id; None if there is no such token."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return None
        if text.isdecimal():
            return int(text) if int(text) < self.n_tokens else None
        found = tokenizer.id_of(text)
        if found is not None:
            return found
        ids = tokenizer.encode(text, add_bos=False, special=True)
        return ids[0] if len(ids) == 1 else None

    def _compile(self, constraint: Constraint) -> Grammar:
        from llguidance import LLMatcher

        lark = constraint.to_lark(self._token_id)
        start = time.thread_time()
        # After the source, so that messages have the source's line numbers; options only add up.
        source = json.dumps({"grammars": [{"lark_grammar": lark + '\n%llguidance {"no_forcing": true}\n'}]})
        matcher = LLMatcher(self._tokens, source, log_level=0, limits=self._limits)
        trial = matcher.deep_copy()
        if not matcher.is_error():
            trial.compute_bitmask()
        if trial.is_error():
            raise InvalidArgument(f"{constraint.kind}: {explained(constraint, trial.get_error())}")
        seconds = time.thread_time() - start
        return Grammar(matcher, (1 << 16) + max(SOURCE_FACTOR * len(lark), int(seconds * BYTES_PER_SECOND)))


def _all_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every id; b"" for unused ids, which the library never allows."""
    tokens = []
    for i in range(tokenizer.vocab_size):
        try:
            tokens.append(tokenizer.token_bytes(i))
        except InvalidArgument:
            tokens.append(b"")
    return tokens


_compiling = threading.BoundedSemaphore(MAX_COMPILING)
_stack_lock = threading.Lock()


def _run_beside(work: Callable[[], object], constraint: Constraint) -> None:
    """Runs work in a thread with a large stack and a limit of CPU time.

    Raises:
        InvalidArgument: the limit was reached; the thread ends by itself.
        EngineBusy: no slot became free.
    """
    if not _compiling.acquire(timeout=QUEUE_FACTOR * COMPILE_SECONDS):
        raise EngineBusy(f"{MAX_COMPILING} grammars are being compiled; try again later", n_waiting=MAX_COMPILING)

    def run() -> None:
        try:
            work()
        finally:
            _compiling.release()

    thread = LimitedThread(run, "fabula-grammar")
    n_bytes = len(constraint.source)
    # The stack size is the process's: a thread started elsewhere meanwhile gets more address space, no more memory.
    with _stack_lock:
        before = threading.stack_size(STACK_BYTES * (1 + n_bytes // MAX_SOURCE_BYTES))
        try:
            thread.start()
        except BaseException:
            _compiling.release()
            raise
        finally:
            threading.stack_size(before)
    seconds = COMPILE_SECONDS + SECONDS_PER_MIB * max(0, n_bytes - MAX_SOURCE_BYTES) / (1 << 20)
    if not thread.wait(seconds, WALL_FACTOR * seconds):
        raise InvalidArgument(f"{constraint.kind}: it takes more than {seconds:.3g} s to compile; make it simpler")


def explained(constraint: Constraint, message: str) -> str:
    """The library's message in terms of the user's source: with line and column for Lark, without for other kinds,
    which the library gets in translation."""
    if message.startswith("NoExtensionBias"):
        return "no text satisfies it"
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", message)
    message = message[place.end() :] if place else message
    message = re.sub("^failed to compile JSON schema: ", "", message)
    found = re.search("^error: (.*)", message, re.MULTILINE)  # of a regular expression, after its excerpt
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d+ \||\^|<non-verbose/>)", line)]
    text = found[1] if found else (" ".join(" ".join(lines).split()) or message)
    if constraint.kind != "lark":
        if constraint.kind == "gbnf":
            text = in_words(re.sub(r"at \d+\(\d+\): ", "", text))
            return f"the grammar is too large or too complex: {text[:MAX_MESSAGE]}"
        return in_words(text)[:MAX_MESSAGE]
    if place is None:
        return text[:MAX_MESSAGE]
    lines = constraint.source.splitlines() or [""]
    # Our own options follow the source.
    is_end = (int(place[1]), int(place[2])) > (len(lines), len(lines[-1]))
    where = "at the end" if is_end else f"line {place[1]}, column {place[2]}"
    return f"{where}: {text.partition(', found')[0] if is_end else text}"[:MAX_MESSAGE]


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()
_vocabularies_lock = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The Vocabulary of a tokenizer, made on first use (0.1 s for 49,000 tokens)."""
    with _vocabularies_lock:
        found = _vocabularies.get(tokenizer)
        if found is None:
            found = _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return found


# ---- Masks ----------------------------------------------------------------------------------------------------------


class Guide:
    """The state of one answer in a grammar: which tokens may come next. For one thread at a time.

    Args:
        tokenizer: of the model.
        vocab_size: length of the logits.
        constraint: on the answer.
        prefix_ids: ids the answer starts with.

    Attributes:
        allowed: bool [vocab_size], the tokens that may come next; end tokens where the answer may end.
        is_complete: only an end token may follow.
        may_end: the answer so far satisfies the constraint.

    Raises:
        InvalidArgument: the constraint cannot be compiled, or forbids an id of `prefix_ids`.
        EngineBusy: too many are being compiled.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, constraint: Constraint, prefix_ids: Sequence[int] = ()
    ) -> None:
        vocabulary = vocabulary_of(tokenizer)
        self._tokenizer = weakref.ref(tokenizer)
        self._forced_text = b""  # that must come next; b"" where it is not known
        self._n_slow, self._is_small = 0, True  # copies of the state
        self._kind = constraint.kind
        self._n_tokens = min(vocab_size, vocabulary.n_tokens)
        self._ends = np.asarray([i for i in tokenizer.eos_ids if i < vocab_size], np.int64)
        self._grammar = vocabulary.grammar(constraint)
        self._matcher = self._grammar.start()
        self.allowed = np.zeros(vocab_size, np.bool_)
        n_valid = self._matcher.try_consume_tokens([int(i) for i in prefix_ids]) if len(prefix_ids) else 0
        if n_valid < len(prefix_ids):
            raise InvalidArgument(
                f"{self._kind}: the constraint forbids the start of the answer, at token {n_valid} "
                f"({tokenizer.decode([prefix_ids[n_valid]], skip_special=False)!r:.60})"
            )
        self._look()
        if not self.allowed.any():
            raise InvalidArgument(f"{self._kind}: the answer is complete already, and the model has no end token")

    def advance(self, token: int) -> None:
        """Appends a token that `allowed` allows.

        Raises:
            InvalidArgument: the grammar is too complex to continue.
        """
        if not self._matcher.consume_token(token):
            self._fail()
        if self._forced_text:
            self._follow(token)
        self._look()

    # ---- For drafts -------------------------------------------------------------------------------------------------

    def forced(self, most: int) -> list[int]:
        """Tokens of the text that must come next, at most so many; empty where there is a choice."""
        if not self._forced_text and np.count_nonzero(self.allowed) <= MAX_FORCED_CHOICES:
            copy = self._copy()
            self._forced_text = b"" if copy is None else copy.compute_ff_bytes()
        text, tokenizer, n_bytes = self._forced_text, self._tokenizer(), most * FORCED_BYTES
        if not text or tokenizer is None:
            return []
        ids = tokenizer.encode(text[:n_bytes].decode("utf-8", "ignore"), add_bos=False)
        return ids[:most] if len(text) <= n_bytes else ids[:-1][:most]  # the last one may be half a word

    def n_allowed(self, tokens: Sequence[int]) -> int:
        """How many leading ones of `tokens` may come next, one after the other; all of them if that takes long."""
        copy = self._copy()
        return len(tokens) if copy is None else min(copy.validate_tokens(list(tokens)), len(tokens))

    def _follow(self, token: int) -> None:
        """Removes a token from the front of the forced text."""
        tokenizer = self._tokenizer()
        text = b"" if tokenizer is None else tokenizer.token_bytes(token)
        self._forced_text = self._forced_text[len(text) :] if self._forced_text.startswith(text) else b""

    def _copy(self) -> LLMatcher | None:
        """A copy of the state: what exceeds a limit in it changes nothing for the answer. None if copies are slow."""
        if not self._is_small:
            return None
        start = time.thread_time()
        copy = self._matcher.deep_copy()
        seconds = time.thread_time() - start
        self._n_slow += seconds > COPY_SECONDS  # the first one may be: it fills caches
        self._is_small = self._n_slow < 3
        self._grammar.worked(seconds)
        return copy

    def _look(self) -> None:
        matcher, start = self._matcher, time.thread_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        self._grammar.worked(time.thread_time() - start)
        if matcher.is_error():
            self._fail()
        self.allowed[: self._n_tokens] = np.unpackbits(mask, bitorder="little", count=self._n_tokens).view(np.bool_)
        self.may_end = matcher.is_accepting() or matcher.is_stopped()
        self.is_complete = matcher.is_stopped() or (
            self.may_end and bool(np.count_nonzero(self.allowed) <= np.count_nonzero(self.allowed[self._ends]))
        )

    def _fail(self) -> None:
        message = self._matcher.get_error()
        if message.startswith("NoExtensionBias"):
            raise InvalidArgument(
                f"{self._kind}: the grammar has a dead end: nothing may follow here, not even the end"
            )
        self._grammar.is_spent = True
        raise InvalidArgument(f"{self._kind}: the grammar is too complex: {in_words(message)}")
