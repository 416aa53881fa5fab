"""The tree of exceptions.

    EngineError
    ├── InvalidArgument      (ValueError)    a setting or value is out of range
    │   ├── ContextOverflow                  more tokens than the context length; carries both numbers
    │   ├── SessionNotFound  (LookupError)   no session has that name, or it was deleted
    │   └── SessionExists                    a session has that name already
    ├── OutOfMemory          (MemoryError)   the system refused memory
    │   └── DeviceOutOfMemory                a GPU is out of memory, or beyond its memory budget
    ├── DeviceError                          a GPU failed, or its driver is missing or too old
    ├── Unsupported                          valid, but not supported (family, tensor type, instruction set)
    ├── SessionBusy                          the session is generating another reply
    ├── EngineBusy                           the queue of requests is full; try again later
    ├── NonFinite            (ArithmeticError)  logits hold NaN or infinity: a damaged model
    ├── ModelNotFound        (LookupError)   no model of that name was found
    ├── ModelFileError       (OSError)       a model file is damaged, incomplete or hostile; names file and field
    │   ├── TokenizerError                   the vocabulary or merges cannot be used
    │   └── TemplateError                    the chat template fails; carries its line
    ├── DownloadError        (OSError)       the network or the server failed, or the checksum is wrong
    └── StoreError           (OSError)       saved data cannot be read or written; names place and cause
        ├── StoreFull                        the disk is full
        ├── StoreReadOnly                    the file or folder cannot be written
        ├── StoreCorrupt                     saved data is damaged
        ├── StoreTooNew                      written by a newer version of Fabula
        └── StoreLocked                      another process uses it

Each is also the builtin that a Python user would expect, so `except ValueError` works. `status` is the native library's
status code, None if the failure did not come from there.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base class of all errors that Fabula raises on purpose."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


class InvalidArgument(EngineError, ValueError):
    """A setting or value is out of range; the message names it and the range."""


class ContextOverflow(InvalidArgument):
    """More tokens were given than the context length.

    Attributes:
        n_tokens: tokens requested.
        context: the context length.
    """

    def __init__(self, message: str, *, n_tokens: int, context: int) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens
        self.context = context


class SessionNotFound(InvalidArgument, LookupError):
    """No session has that name, or it was deleted."""


class SessionExists(InvalidArgument):
    """A session has that name already; nothing was changed."""


class OutOfMemory(EngineError, MemoryError):
    """The system refused memory; nothing was changed."""


class DeviceOutOfMemory(OutOfMemory):
    """A GPU is out of memory, or beyond its memory budget; says how much is needed and free. Nothing was changed."""


class DeviceError(EngineError):
    """A GPU cannot be used: no driver, one that is too old, or the GPU failed. The message includes the driver's."""


class Unsupported(EngineError):
    """The request is valid, but this build, CPU or version does not support it."""


class NonFinite(EngineError, ArithmeticError):
    """Logits, or numbers to quantize, hold NaN or infinity: the model's weights or its input are damaged."""


class SessionBusy(EngineError):
    """A session generates one reply at a time, and another one is unfinished; cancel it or wait for its end."""


class EngineBusy(EngineError):
    """The queue of requests is full; the request was rejected.

    Attributes:
        n_waiting: requests in the queue.
    """

    def __init__(self, message: str, *, n_waiting: int) -> None:
        super().__init__(message)
        self.n_waiting = n_waiting


class ModelNotFound(EngineError, LookupError):
    """No model of that name was found in any path, cache, installed package or hub."""


class ModelFileError(EngineError, OSError):
    """A model file is damaged, incomplete or hostile.

    Attributes:
        path: the file, as text.
        field: the tensor, key or line at fault; "" for the whole file.
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
        line: line of the template, from 1; None if unknown.
    """

    def __init__(self, message: str, *, path: object = "", line: int | None = None) -> None:
        super().__init__(message, path=path, field="" if line is None else f"line {line}")
        self.line = line


class DownloadError(EngineError, OSError):
    """A download failed or its checksum is wrong; no file was installed."""


class StoreError(EngineError, OSError):
    """Saved data (sessions, spilled KV pages) cannot be read or written; data in memory is unchanged.

    Attributes:
        path: the file, folder or address, as text, without any password.
    """

    def __init__(self, message: str, *, path: object = "") -> None:
        super().__init__(message)
        self.path = str(path)


class StoreFull(StoreError):
    """The disk is full; free some space and try again."""


class StoreReadOnly(StoreError):
    """The file or folder cannot be written."""


class StoreCorrupt(StoreError):
    """Saved data is damaged: a checksum does not match, or a value is impossible."""


class StoreTooNew(StoreError):
    """The data was written by a newer version of Fabula."""


class StoreLocked(StoreError):
    """Another process uses the data; only one may at a time."""


def shown(name: object, limit: int = 80) -> str:
    """Untrusted text for a message: quoted, control characters escaped, truncated to `limit` characters."""
    text = str(name)
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


class ModelFileWarning(UserWarning):
    """A model's files hold something that is ignored, or contradict each other."""
