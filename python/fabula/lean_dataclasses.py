"""`dataclass`, `field` and `replace` as in the standard library, at a tenth of the cost at import.

The library's decorator writes and compiles six methods for each class, about half a millisecond, and imports `inspect`;
that was a tenth of the time to the first token. Here the methods are closures over the names of the fields. What only
introspection needs (`dataclasses.fields`, `asdict`, `replace`, `inspect.signature`) is made when it is asked for, so
those functions take these classes, too. To type checkers they are the library's.

Left out because nothing here uses it: `order`, `unsafe_hash`, `InitVar`, `init=False` for a class, and inheritance from
the library's dataclasses. Modules that are not imported before the first token use the library's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass, field, replace

__all__ = ["dataclass", "field", "replace"]

if not TYPE_CHECKING:
    _FIELDS = "_lean_fields"  # name -> _Field, of the class and its bases
    _MISSING = object()

    class _Factory:
        """Stands for the default of a parameter that a factory makes."""

        def __repr__(self):
            return "<factory>"

    _FACTORY = _Factory()

    class _Field:
        """What `field` was called with, and later its name and annotation."""

        __slots__ = (
            *("annotation", "compare", "default", "factory", "hash", "init", "kw_only", "metadata", "name", "repr"),
        )

        def __init__(self, default, factory, init, repr, compare, hash, kw_only, metadata):
            self.name = self.annotation = ""
            self.default, self.factory, self.init = default, factory, init
            self.repr, self.compare, self.hash = repr, compare, hash
            self.kw_only, self.metadata = kw_only, metadata

    def field(
        *,
        default=_MISSING,
        default_factory=_MISSING,
        init=True,
        repr=True,
        compare=True,
        hash=None,
        kw_only=None,
        metadata=None,
    ):
        """As `dataclasses.field`."""
        if default is not _MISSING and default_factory is not _MISSING:
            raise ValueError("cannot specify both default and default_factory")
        return _Field(default, default_factory, init, repr, compare, hash, kw_only, metadata)

    def replace(obj, /, **changes):
        """As `dataclasses.replace`."""
        fields = getattr(type(obj), _FIELDS, None)
        if fields is None:
            import dataclasses

            return dataclasses.replace(obj, **changes)
        for name, entry in fields.items():
            if entry.init:
                if name not in changes:
                    changes[name] = getattr(obj, name)
            elif name in changes:
                raise ValueError(f"field {name} is declared with init=False, it cannot be specified with replace()")
        return type(obj)(**changes)

    def dataclass(cls=None, /, *, frozen=False, slots=False, eq=True, kw_only=False, weakref_slot=False):
        """As `dataclasses.dataclass`."""

        def decorate(cls):
            return _made(cls, frozen, slots, eq, kw_only, weakref_slot)

        return decorate if cls is None else decorate(cls)

    def _made(cls, frozen, slots, eq, kw_only, weakref_slot):
        fields = {}
        for base in cls.__mro__[:0:-1]:
            fields.update(base.__dict__.get(_FIELDS, {}))
        own = _own_fields(cls, kw_only)
        fields.update(own)
        namespace = dict(cls.__dict__) if slots else {}
        for name, entry in own.items():
            if slots:
                namespace.pop(name, None)
            elif entry.default is not _MISSING:
                setattr(cls, name, entry.default)
            elif name in cls.__dict__:  # a field() without a default
                delattr(cls, name)
        namespace |= {
            _FIELDS: fields,
            "__init__": _init(fields, cls.__name__, hasattr(cls, "__post_init__")),
            "__match_args__": tuple(name for name, entry in fields.items() if entry.init and not entry.kw_only),
            "__dataclass_fields__": _OnRequest(_library_fields),
            "__dataclass_params__": _OnRequest(lambda owner: _library_params(owner, frozen, eq)),
            "__signature__": _OnRequest(_signature),
        }
        if "__repr__" not in cls.__dict__:
            namespace["__repr__"] = _repr(fields)
        if eq and "__eq__" not in cls.__dict__:
            namespace["__eq__"] = _eq(fields)
        is_hash_of_eq = "__eq__" in cls.__dict__ and cls.__dict__.get("__hash__") is None  # Python set it to None
        if eq and ("__hash__" not in cls.__dict__ or is_hash_of_eq):
            namespace["__hash__"] = _hash(fields) if frozen else None
        if slots:
            inherited = {name for base in cls.__mro__[1:] for name in base.__dict__.get(_FIELDS, {})}
            namespace["__slots__"] = (*(name for name in own if name not in inherited), *["__weakref__"] * weakref_slot)
            namespace.pop("__dict__", None)
            namespace.pop("__weakref__", None)
            if frozen:
                namespace |= {"__getstate__": _getstate, "__setstate__": _setstate}
            made = type(cls)(cls.__name__, cls.__bases__, namespace)
            made.__qualname__ = cls.__qualname__
        else:
            made = cls
            for name, value in namespace.items():
                setattr(made, name, value)
        if frozen:
            _freeze(made, frozenset(fields))
        return made

    def _own_fields(cls, kw_only):
        found = {}
        for name, annotation in cls.__annotations__.items():
            if str(annotation).startswith(("ClassVar", "typing.ClassVar")):
                continue
            value = cls.__dict__.get(name, _MISSING)
            entry = value if isinstance(value, _Field) else field(default=value)
            if type(entry.default) in (list, dict, set):
                raise ValueError(f"mutable default {type(entry.default)} for field {name}: use default_factory")
            entry.name, entry.annotation = name, annotation
            entry.kw_only = kw_only if entry.kw_only is None else entry.kw_only
            found[name] = entry
        return found

    def _init(fields, title, has_post_init):
        positional = tuple(name for name, entry in fields.items() if entry.init and not entry.kw_only)
        names = frozenset(name for name, entry in fields.items() if entry.init)
        required = tuple(
            name
            for name, entry in fields.items()
            if entry.init and entry.default is _MISSING and entry.factory is _MISSING
        )
        defaults = {
            name: entry.default
            for name, entry in fields.items()
            if entry.default is not _MISSING and entry.factory is _MISSING
        }
        factories = tuple((name, entry.factory) for name, entry in fields.items() if entry.factory is not _MISSING)
        for i, name in enumerate(positional[1:], 1):
            if name in required and positional[i - 1] not in required:
                raise TypeError(f"non-default argument {name!r} follows default argument")
        assign = object.__setattr__

        def initialize(self, *args, **given):
            if len(args) > len(positional):
                raise TypeError(f"{title}() takes {len(positional)} positional arguments but {len(args)} were given")
            values = {**defaults, **dict(zip(positional, args, strict=False)), **given}
            if given and not (given.keys() <= names and given.keys().isdisjoint(positional[: len(args)])):
                wrong = next(name for name in given if name not in names or name in positional[: len(args)])
                problem = "multiple values for" if wrong in names else "an unexpected keyword"
                raise TypeError(f"{title}() got {problem} argument {wrong!r}")
            for name, factory in factories:
                if name not in values:
                    values[name] = factory()
            for name in required:
                if name not in values:
                    raise TypeError(f"{title}() missing required argument: {name!r}")
            for name in values:
                assign(self, name, values[name])
            if has_post_init:
                self.__post_init__()

        return initialize

    def _repr(fields):
        from reprlib import recursive_repr

        names = tuple(name for name, entry in fields.items() if entry.repr)

        @recursive_repr()
        def represent(self):
            return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

        return represent

    def _eq(fields):
        names = tuple(name for name, entry in fields.items() if entry.compare)

        def equals(self, other):
            if other.__class__ is not self.__class__:
                return NotImplemented
            return tuple(getattr(self, name) for name in names) == tuple(getattr(other, name) for name in names)

        return equals

    def _hash(fields):
        names = tuple(name for name, e in fields.items() if (e.compare if e.hash is None else e.hash))

        def hash_of(self):
            return hash(tuple(getattr(self, name) for name in names))

        return hash_of

    def _freeze(cls, names):
        def refuse(self, name, verb):
            if type(self) is cls or name in names:
                from dataclasses import FrozenInstanceError

                raise FrozenInstanceError(f"cannot {verb} field {name!r}")

        def set_attribute(self, name, value):
            refuse(self, name, "assign to")
            super(cls, self).__setattr__(name, value)

        def delete_attribute(self, name):
            refuse(self, name, "delete")
            super(cls, self).__delattr__(name)

        cls.__setattr__, cls.__delattr__ = set_attribute, delete_attribute

    def _getstate(self):
        return [getattr(self, name) for name in getattr(type(self), _FIELDS)]

    def _setstate(self, state):
        for name, value in zip(getattr(type(self), _FIELDS), state, strict=True):
            object.__setattr__(self, name, value)

    class _OnRequest:
        """A class attribute that is computed for each class when it is first read."""

        __slots__ = ("_compute", "_made")

        def __init__(self, compute):
            self._compute, self._made = compute, {}

        def __get__(self, _instance, owner):
            if owner not in self._made:
                self._made[owner] = self._compute(owner)
            return self._made[owner]

    def _library_fields(owner):
        import dataclasses

        found = {}
        for name, entry in getattr(owner, _FIELDS).items():
            made = dataclasses.field(
                default=dataclasses.MISSING if entry.default is _MISSING else entry.default,
                default_factory=dataclasses.MISSING if entry.factory is _MISSING else entry.factory,
                init=entry.init,
                repr=entry.repr,
                hash=entry.hash,
                compare=entry.compare,
                metadata=entry.metadata,
                kw_only=entry.kw_only,
            )
            made.name = name
            made.type = entry.annotation
            made._field_type = dataclasses._FIELD
            found[name] = made
        return found

    def _library_params(_owner, frozen, eq):
        import dataclasses

        made = dataclasses.dataclass(type("_", (), {}), frozen=frozen, eq=eq)
        return made.__dataclass_params__

    def _signature(owner):
        import inspect

        parameters = []
        fields = [entry for entry in getattr(owner, _FIELDS).values() if entry.init]
        for entry in sorted(fields, key=lambda entry: entry.kw_only):
            default = entry.default
            if default is _MISSING:
                default = inspect.Parameter.empty if entry.factory is _MISSING else _FACTORY
            kind = inspect.Parameter.KEYWORD_ONLY if entry.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(inspect.Parameter(entry.name, kind, default=default, annotation=entry.annotation))
        return inspect.Signature(parameters)
