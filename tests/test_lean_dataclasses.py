"""Our `dataclass` beside the standard library's: the same behavior of the same class bodies."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from fabula import lean_dataclasses as lean
from waiting import run_program

Make = Callable[..., Any]


def classes(library: Any) -> dict[str, Any]:
    """The same classes by either library."""

    @library.dataclass(frozen=True, slots=True)
    class Frozen:
        a: int
        b: str = "x"
        c: dict[str, int] = library.field(default_factory=dict)
        d: int = library.field(default=4, compare=False)
        e: frozenset[str] = library.field(init=False, repr=False, compare=False)
        SHARED: ClassVar[int] = 5

        def __post_init__(self) -> None:
            if self.a < 0:
                raise ValueError("a is negative")
            object.__setattr__(self, "e", frozenset(self.b))

        @property
        def double(self) -> int:
            return 2 * self.a

    @library.dataclass(frozen=True, slots=True, kw_only=True)
    class Named:
        first: int
        second: int = 2

    @library.dataclass(slots=True)
    class Loose:
        items: list[int]
        n: int = 0

    @library.dataclass
    class Plain:
        x: int = 1
        y: list[int] = library.field(default_factory=list)

    @library.dataclass(frozen=True)
    class Open:
        x: int
        y: int = 2

    @library.dataclass(frozen=True, slots=True, eq=False)
    class Itself:
        x: int

    @library.dataclass(frozen=True, slots=True)
    class OwnEquality:
        x: int

        def __eq__(self, other: object) -> bool:
            return True

        def __repr__(self) -> str:
            return "mine"

    @library.dataclass(frozen=True, slots=True)
    class OwnHash:
        x: int

        def __hash__(self) -> int:
            return 7

    @library.dataclass(frozen=True, slots=True)
    class Base:
        a: int
        b: int = 2

    @library.dataclass(frozen=True, slots=True)
    class Derived(Base):
        c: int = 3

    @library.dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
    class Weak:
        a: int = 1

    found = [Frozen, Named, Loose, Plain, Open, Itself, OwnEquality, OwnHash, Base, Derived, Weak]
    return {cls.__name__: cls for cls in found}


LIBRARY, LEAN = classes(dataclasses), classes(lean)

CALLS: list[tuple[str, Make]] = [
    ("Frozen", lambda c: c(1)),
    ("Frozen", lambda c: c(1, "yes", {"k": 2}, 9)),
    ("Frozen", lambda c: c(b="z", a=3)),
    ("Frozen", lambda c: c()),
    ("Frozen", lambda c: c(1, "x", {}, 4, 5)),
    ("Frozen", lambda c: c(1, a=2)),
    ("Frozen", lambda c: c(1, nope=2)),
    ("Frozen", lambda c: c(1, e=frozenset())),
    ("Frozen", lambda c: c(-1)),
    ("Frozen", lambda c: setattr(c(1), "a", 2)),
    ("Frozen", lambda c: delattr(c(1), "a")),
    ("Frozen", lambda c: c(1).double + c.SHARED),
    ("Frozen", lambda c: c(1).c is c(1).c),
    ("Frozen", lambda c: hash(c(1))),
    ("Named", lambda c: c(first=1)),
    ("Named", lambda c: c(1)),
    ("Named", lambda c: hash(c(first=1)) == hash(c(first=1, second=2))),
    ("Loose", lambda c: c([1])),
    ("Loose", lambda c: hash(c([1]))),
    ("Loose", lambda c: setattr(c([1]), "n", 3)),
    ("Loose", lambda c: setattr(c([1]), "other", 3)),
    ("Loose", lambda c: c([1]) == c([1])),
    ("Loose", lambda c: c([1]) == ([1], 0)),
    ("Plain", lambda c: (c(), c().y is c().y, c.x, hasattr(c, "y"))),
    ("Plain", lambda c: vars(c(2))),
    ("Open", lambda c: (c(1), c.y, hash(c(1)) == hash(c(1, 2)))),
    ("Open", lambda c: setattr(c(1), "x", 1)),
    ("Itself", lambda c: c(1) == c(1)),
    ("Itself", lambda c: repr(c(1))),
    ("OwnEquality", lambda c: (c(1) == 3, repr(c(2)), hash(c(1)) == hash(c(1)))),
    ("OwnHash", lambda c: hash(c(1))),
    ("Derived", lambda c: (c(1), c(1, 5, 6), c(1) == c(1, 2, 3), c.__slots__)),
    ("Weak", lambda c: (repr(c(a=3)), c.__slots__)),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_same_results_and_errors(name: str, call: Make) -> None:
    outcomes = []
    for classes in (LIBRARY, LEAN):
        try:
            outcomes.append(repr(call(classes[name])))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", list(LEAN))
def test_same_description(name: str) -> None:
    ours, theirs = LEAN[name], LIBRARY[name]
    assert dataclasses.is_dataclass(ours)
    assert ours.__match_args__ == theirs.__match_args__
    assert str(inspect.signature(ours)).removesuffix(" -> None") == str(inspect.signature(theirs)).removesuffix(
        " -> None"
    )
    assert repr(ours.__dataclass_params__) == repr(theirs.__dataclass_params__)
    for one, other in zip(dataclasses.fields(ours), dataclasses.fields(theirs), strict=True):
        for attribute in ("name", "type", "default", "default_factory", "init", "repr", "compare", "hash", "kw_only"):
            assert getattr(one, attribute) == getattr(other, attribute)


@pytest.mark.parametrize("replace", [dataclasses.replace, lean.replace])
def test_replace(replace: Make) -> None:
    for classes in (LIBRARY, LEAN):
        frozen = classes["Frozen"](1, "abc")
        changed = replace(frozen, a=2)
        assert (changed.a, changed.b, changed.e) == (2, "abc", frozenset("abc")) and frozen.a == 1
        with pytest.raises(ValueError):
            replace(frozen, e=frozenset())
        with pytest.raises(TypeError):
            replace(frozen, nope=1)
    assert dataclasses.asdict(LEAN["Loose"]([1], 2)) == {"items": [1], "n": 2}


@lean.dataclass(frozen=True, slots=True)
class Kept:
    """At module level, so that it can be pickled."""

    a: int
    b: tuple[int, ...] = ()


def test_copies() -> None:
    kept = Kept(1, (2, 3))
    assert pickle.loads(pickle.dumps(kept)) == copy.copy(kept) == copy.deepcopy(kept) == kept
    match kept:
        case Kept(1, (2, last)):
            assert last == 3
        case _:
            pytest.fail("does not match")


def test_wrong_classes() -> None:
    with pytest.raises(ValueError, match="default_factory"):

        @lean.dataclass
        class Mutable:
            x: list[int] = []  # noqa: RUF012

    with pytest.raises(TypeError, match="non-default"):

        @lean.dataclass
        class Order:
            x: int = 1
            y: int

    with pytest.raises(ValueError, match="both"):
        lean.field(default=1, default_factory=int)


def test_the_library_is_not_imported() -> None:
    code = (
        "import sys; from fabula.lean_dataclasses import dataclass, field, replace\n"
        "A = dataclass(frozen=True, slots=True)(type('A', (), {'__annotations__': {'x': 'int'}}))\n"
        "assert replace(A(1), x=2) == A(2); print([m for m in ('dataclasses', 'inspect') if m in sys.modules])"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
