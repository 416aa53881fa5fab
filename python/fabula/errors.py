"""What can go wrong, as one tree of exceptions.

    EngineError
    ├── InvalidArgument      (ValueError)    a setting or value out of its range
    │   ├── ContextOverflow                  more tokens than the context holds; carries both numbers
    │   ├── SessionNotFound  (LookupError)   there is no session of that name, or it was deleted
    │   └── SessionExists                    there is one of that name already
    ├── OutOfMemory          (MemoryError)   the system refused memory
    │   └── DeviceOutOfMemory                a GPU has not the memory, or its budget is used up
    ├── DeviceError                          a GPU failed, or its driver is missing or too old
    ├── Unsupported                          well-formed, but not offered here (family, tensor type, instruction set)
    ├── SessionBusy                          another reply of the session is being made
    ├── EngineBusy                           too many requests wait already; come again later
    ├── NonFinite            (ArithmeticError)  logits hold NaN or infinity: a damaged model
    ├── ModelNotFound        (LookupError)   no place knows a model of that name
    ├── ModelFileError       (OSError)       a model file is damaged, incomplete or hostile; names file and field
    │   ├── TokenizerError                   its vocabulary or merges cannot be used
    │   └── TemplateError                    its chat template fails; carries the template's line
    ├── DownloadError        (OSError)       the network or the server failed, or the bytes are not those expected
    └── StoreError           (OSError)       what is kept on disk cannot be read or written; names place and cause
        ├── StoreFull                        no room is left on the disk
        ├── StoreReadOnly                    the place cannot be written
        ├── StoreCorrupt                     bytes are not those that were written
        ├── StoreTooNew                      written by a newer version of Fabula
        └── StoreLocked                      another process uses it

Each is also the builtin a Python user would expect, so `except ValueError` keeps working. `status` is the native
library's code where the failure came from there, else None.
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of everything Fabula raises on purpose."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


class InvalidArgument(EngineError, ValueError):
    """A setting or value is out of its range; the message names it and the range."""


class ContextOverflow(InvalidArgument):
    """More tokens were given than the context holds.

    Attributes:
        n_tokens: tokens that were asked for.
        context: tokens that fit.
    """

    def __init__(self, message: str, *, n_tokens: int, context: int) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens
        self.context = context


class SessionNotFound(InvalidArgument, LookupError):
    """There is no session of that name, or it was deleted."""


class SessionExists(InvalidArgument):
    """There is a session of that name already; nothing was changed."""


class OutOfMemory(EngineError, MemoryError):
    """The system refused memory; nothing was changed."""


class DeviceOutOfMemory(OutOfMemory):
    """A GPU has not the memory, or its budget is used up; says how much is needed and free. Nothing was changed."""


class DeviceError(EngineError):
    """A GPU cannot be used: no driver, one that is too old, or the GPU failed. The message holds the driver's words."""


class Unsupported(EngineError):
    """The request is well-formed, but this build, CPU or version does not offer it."""


class NonFinite(EngineError, ArithmeticError):
    """Logits, or numbers to quantise, hold NaN or infinity: the model's weights or its input are damaged."""


class SessionBusy(EngineError):
    """A session makes one reply at a time, and another one is not finished; cancel it or wait for its end."""


class EngineBusy(EngineError):
    """As many requests wait as may; nothing was begun.

    Attributes:
        n_waiting: requests in the queue.
    """

    def __init__(self, message: str, *, n_waiting: int) -> None:
        super().__init__(message)
        self.n_waiting = n_waiting


class ModelNotFound(EngineError, LookupError):
    """No path, cache, installed package or hub knows a model of that name."""


class ModelFileError(EngineError, OSError):
    """A model file is damaged, incomplete or hostile.

    Attributes:
        path: the file, as text.
        field: the tensor, key or line at fault, "" when the whole file is meant.
    """

    def __init__(self, message: str, *, path: object = "", field: str = "") -> None:
        super().__init__(message)
        self.path = str(path)
        self.field = field


class TokenizerError(ModelFileError):
    """The vocabulary, merges or pre-tokenizer cannot be used."""


class TemplateError(ModelFileError):
    """The model's chat template cannot be used or refused the messages.

    Attributes:
        line: 1-based line of the template, None when unknown.
    """

    def __init__(self, message: str, *, path: object = "", line: int | None = None) -> None:
        super().__init__(message, path=path, field="" if line is None else f"line {line}")
        self.line = line


class DownloadError(EngineError, OSError):
    """A download failed or its bytes are not those expected; nothing is left in place of the file."""


class StoreError(EngineError, OSError):
    """What is kept on disk (sessions, spilled pages) cannot be read or written; what is in memory is untouched.

    Attributes:
        path: the file, folder or address, as text, without any password.
    """

    def __init__(self, message: str, *, path: object = "") -> None:
        super().__init__(message)
        self.path = str(path)


class StoreFull(StoreError):
    """No room is left on the disk; free some and try again."""


class StoreReadOnly(StoreError):
    """The file or folder cannot be written."""


class StoreCorrupt(StoreError):
    """Bytes are not those that were written, or what they say cannot be."""


class StoreTooNew(StoreError):
    """Written by a newer version of Fabula, which this one cannot read."""


class StoreLocked(StoreError):
    """Another process uses it; only one may write at a time."""


def shown(name: object, limit: int = 80) -> str:
    """Untrusted text for a message: quoted, control characters escaped, truncated to `limit` characters."""
    text = str(name)
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


class ModelFileWarning(UserWarning):
    """A model's files hold something that is passed over, or say two things of which one holds."""
