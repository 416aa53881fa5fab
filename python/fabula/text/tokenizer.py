"""`Tokenizer`: one interface for tokenizer.json and GGUF vocabularies, on top of the `tokenizers` library.

Control tokens ("<|im_end|>") in user input are text: `encode` parses them only on request, and `encode_chat` only those
of the template itself (see `text/chat.py`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from fabula.errors import InvalidArgument, TokenizerError, Unsupported
from fabula.formats.readfile import parse_json_object
from fabula.text.stream import IncrementalDecoder, TokenBytes, byte_level_bytes, sentencepiece_bytes

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate

MAX_TOKENIZER_BYTES = 128 << 20  # the largest known one (256k tokens with merges) has 35 MB
MAX_TOKEN_BYTES = 1 << 16
MAX_VOCABULARY = 1 << 22


class TokenizerWarning(UserWarning):
    """A tokenizer's file lacks something or has an impossible value, and is read anyway."""


class Tokenizer:
    """Encodes and decodes text. Thread-safe.

    Args:
        backend: tokenizer of the library.
        vocabulary: token -> id, added tokens included; None: from the backend, which is slow.

    Attributes:
        path: of its file.
        kind: "byte-level" or "sentencepiece".
        vocab_size: largest id + 1, added tokens included.
        bos_id: start token; None if there is none.
        eos_ids: tokens that end a reply.
        prefix, suffix: ids that the post-processor adds around a text: usually the start token or nothing, and nothing
            or an end token.
        add_bos: whether `encode` adds the prefix by default.
        add_eos: whether there is a suffix.
        special_tokens: control tokens and their ids.
        chat_templates: sources of chat templates by name: "default", and "tool_use" for conversations with tools.
        chat_template: source of "default", or else of the first; None if there is none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        path: Path,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        prefix: Iterable[int] = (),
        suffix: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        named_special: Mapping[str, str] | None = None,
        vocabulary: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self._backend = backend
        self._lock = threading.Lock()
        added = backend.get_added_tokens_decoder()
        if vocabulary is None:
            vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._check_vocabulary(vocabulary)
        self._tokens = dict(zip(vocabulary.values(), vocabulary, strict=True))
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.added_tokens = {token.content: token for token in added.values()}
        self.kind, self._strip_space = self._decoder_kind()
        bytes_of = byte_level_bytes if self.kind == "byte-level" else sentencepiece_bytes
        known = {i: self._tokens[i].encode() for i in added}
        self._bytes = TokenBytes(self._tokens, bytes_of, known)
        self._visible = TokenBytes(self._tokens, bytes_of, known | dict.fromkeys(self.special_ids, b""))
        self.bos_id = self._check_id("bos", bos_id)
        self.eos_ids = tuple(dict.fromkeys(i for i in eos_ids if self._check_id("eos", i) is not None))
        self.prefix = tuple(i for i in prefix if self._check_id("prefix", i) is not None)
        self.suffix = tuple(i for i in suffix if self._check_id("suffix", i) is not None)
        self.add_bos, self.add_eos = bool(self.prefix), bool(self.suffix)
        self.chat_templates = dict(chat_templates or {})
        self.chat_template = self.template_for(tools=False)
        self.named_special = dict(named_special or {})

    # ---- Where it comes from ----------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and the files for it from a Hugging Face folder.

        Raises:
            TokenizerError: a file is missing or damaged.
            Unsupported: a decoder that is neither byte-level nor SentencePiece-like.
        """
        from fabula.text.folder import read_folder

        return read_folder(folder)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """Builds the tokenizer of a GGUF file.

        Raises:
            TokenizerError: a key is missing, of the wrong type, or contradicts another.
            Unsupported: an unknown kind of vocabulary or pre-tokenizer.
        """
        from fabula.text.gguf_tokenizer import read_gguf

        return read_gguf(metadata, path)

    def _check_vocabulary(self, vocabulary: Mapping[str, int]) -> None:
        if not vocabulary:
            raise TokenizerError(f"{self.path}: the vocabulary is empty", path=self.path, field="vocab")
        if self.vocab_size > MAX_VOCABULARY or min(vocabulary.values()) < 0:
            raise TokenizerError(
                f"{self.path}: token ids reach {self.vocab_size - 1}, at most {MAX_VOCABULARY - 1} is allowed",
                path=self.path,
                field="vocab",
            )
        longest = max(vocabulary, key=len)
        if len(longest) > MAX_TOKEN_BYTES:
            raise TokenizerError(
                f"{self.path}: token {vocabulary[longest]} has {len(longest)} characters, at most {MAX_TOKEN_BYTES}",
                path=self.path,
                field="vocab",
            )

    def _check_id(self, name: str, token_id: int | None) -> int | None:
        if token_id is not None and token_id not in self._tokens:
            raise TokenizerError(
                f"{self.path}: the {name} token has id {token_id}, which the vocabulary of {self.vocab_size} lacks",
                path=self.path,
                field=f"{name}_token_id",
            )
        return token_id

    def _decoder_kind(self) -> tuple[str, bool]:
        """("byte-level" or "sentencepiece", whether a leading space is dropped), from the decoder's description."""
        state = self._backend.decoder.__getstate__() if self._backend.decoder is not None else b"{}"
        decoder = json.loads(state)
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = [step.get("type") for step in steps]
        if "ByteLevel" in kinds:
            return "byte-level", False
        for step in steps:
            if step.get("type") == "Metaspace":
                return "sentencepiece", step.get("prepend_scheme", "always") != "never"
        if "Replace" in kinds or "ByteFallback" in kinds:
            strips = [step for step in steps if step.get("type") == "Strip" and step.get("start")]
            return "sentencepiece", bool(strips)
        raise Unsupported(f"{self.path}: the tokenizer's decoder {kinds} is neither byte-level nor SentencePiece-like")

    # ---- Encoding ---------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, *, add_bos: bool | None = None, special: bool = False, add_eos: bool | None = False
    ) -> list[int]:
        """Token ids of a text.

        The post-processor of tokenizer.json, or the flags of a GGUF file, may add tokens before and after a text. Those
        before belong to the start of every text. Those after end it, so the caller decides: an embedding is of a whole
        text, and models with an end token were trained to give their vector there; a text to be continued has no end.
        (transformers gives both the same ids; llama.cpp's completion tool refuses a model that asks for an end token.)

        Args:
            text: any text without lone surrogates.
            add_bos: whether to add the prefix, or else the start token. None: the model's default, but nothing if the
                text already begins with it as a control token.
            special: whether control tokens in the text are parsed; else they are plain text.
            add_eos: whether to add the suffix, or else the first end token; None: the model's default.

        Raises:
            InvalidArgument: the text cannot be encoded as UTF-8, or there is no start or end token to add.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"the text holds a lone surrogate at position {error.start}") from None
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        if self.add_bos if add_bos is None else add_bos:
            before = self.prefix or (() if self.bos_id is None else (self.bos_id,))
            if not before:
                raise InvalidArgument(f"{self.path}: the tokenizer has no start token")
        if self.add_eos if add_eos is None else add_eos:
            after = self.suffix or self.eos_ids[:1]
            if not after:
                raise InvalidArgument(f"{self.path}: the tokenizer has no end token")
        with self._lock:
            self._backend.encode_special_tokens = not special
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if add_bos is None and special and before and ids[:1] == [before[0]]:
            before = ()
        return [*before, *ids, *after]

    def encode_chat(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], /, **options: Any
    ) -> list[int]:
        """Token ids of a conversation rendered through a template; see `text/chat.py`."""
        from fabula.text.chat import encode_chat

        return encode_chat(self, template, messages, **options)

    def template_for(self, *, tools: bool, name: str | None = None) -> str | None:
        """Source of the chat template for a conversation.

        Args:
            tools: whether the conversation has tools, which selects "tool_use" if there is one.
            name: of the template; overrides `tools`.

        Raises:
            InvalidArgument: no template has that name.
        """
        return choose(self.chat_templates, tools=tools, name=name)

    def make_template(self, source: str | None = None) -> ChatTemplate:
        """Compiles a chat template with this tokenizer's control tokens as variables (bos_token, eos_token, ...).

        Args:
            source: Jinja text; None for the tokenizer's own templates.
        """
        names = dict(self.named_special)
        if self.bos_id is not None:
            names.setdefault("bos_token", self._tokens[self.bos_id])
        if self.eos_ids:
            names.setdefault("eos_token", self._tokens[self.eos_ids[0]])
        from fabula.text.template import ChatTemplate

        named = self.chat_templates if source is None else {}
        return ChatTemplate(source or self.chat_template or "", path=self.path, special_tokens=names, named=named)

    # ---- Decoding ---------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD.

        Raises:
            InvalidArgument: an id is outside the vocabulary.
        """
        decoder = self.stream_decoder(skip_special=skip_special)
        return "".join([decoder.push(self._known(i)) for i in ids]) + decoder.flush()

    def stream_decoder(
        self, *, skip_special: bool = True, continues: bool = False, shown: Collection[int] = ()
    ) -> IncrementalDecoder:
        """A decoder that takes one id at a time and returns only whole characters.

        Args:
            skip_special: whether to leave out control tokens.
            continues: whether the ids continue a text, so that a leading space is kept.
            shown: control tokens to keep in spite of `skip_special`.
        """
        bytes_of: Mapping[int, bytes] = self._visible if skip_special else self._bytes
        if skip_special and shown:
            bytes_of = ChainMap({i: self._bytes[i] for i in shown if i in self.special_ids}, self._visible)
        return IncrementalDecoder(bytes_of, self._strip_space and not continues)

    def token_text(self, token_id: int) -> str:
        """The token as written in the vocabulary ("Ġthe", "▁the", "<0xE2>")."""
        return self._tokens[self._known(token_id)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token stands for."""
        return self._bytes[self._known(token_id)]

    def id_of(self, token: str) -> int | None:
        """The id of a token as written in the vocabulary; None if there is none."""
        return self._backend.token_to_id(token)

    def description(self) -> Mapping[str, Any]:
        """The content of a tokenizer.json for this tokenizer."""
        found: Mapping[str, Any] = json.loads(self._backend.to_str())
        return found

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the mapping between text and ids depends on, 32 hexadecimal digits."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    def _known(self, token_id: int) -> int:
        if token_id not in self._tokens:
            raise InvalidArgument(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return token_id


def choose(templates: Mapping[str, str], *, tools: bool, name: str | None = None) -> str | None:
    """See `Tokenizer.template_for`."""
    if name is not None:
        if name not in templates:
            raise InvalidArgument(
                f"the model has no chat template named {name[:60]!r}; it has {', '.join(sorted(templates)) or 'none'}"
            )
        return templates[name]
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    return templates.get("default", next(iter(templates.values()), None))


def build_backend(description: str | bytes, path: Path) -> tokenizers.Tokenizer:
    """Builds the library's tokenizer from JSON; raises TokenizerError for every failure."""
    data = description if isinstance(description, bytes) else description.encode()
    if len(data) > MAX_TOKENIZER_BYTES:
        raise TokenizerError(f"{path}: the tokenizer has {len(data)} bytes, at most {MAX_TOKENIZER_BYTES}", path=path)
    parse_json_object(data, path=path)
    with building(path):
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_padding()  # some files have settings of their training, which would pad or truncate every text
        backend.no_truncation()
        return backend


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Converts every failure of the library to TokenizerError."""
    try:
        yield
    except BaseException as error:
        # A panic of the Rust library is not an Exception subclass, and must not end the process.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise TokenizerError(f"{path}: the tokenizer cannot be built: {str(error)[:200]}", path=path) from None
