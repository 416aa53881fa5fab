"""Prompts that fill a gap between a prefix and a suffix ("fill in the middle"), by the vocabulary's own marks."""

from __future__ import annotations

from collections.abc import Sequence

from fabula.lean_dataclasses import dataclass
from fabula.text.tokenizer import Tokenizer

# Marks before the prefix, the suffix and the middle. Sources: the model cards of Qwen2.5-Coder and CodeGemma, StarCoder
# and Granite, Refact, DeepSeek-Coder, GLM-4, Code Llama, Codestral; and llama.cpp's table of them.
MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("[PREFIX]", "[SUFFIX]", ""),  # the suffix comes first, and the middle follows the prefix
)
REPOSITORIES = ("<|repo_name|>", "<|fim_repo|>", "<reponame>")
SEPARATORS = ("<|file_sep|>", "<file_sep>")
PADS = ("<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<EOT>", "▁<EOT>")


@dataclass(frozen=True, slots=True)
class Gap:
    """A prompt for the text in a gap.

    Attributes:
        ids: token ids.
        ends: ids that end the answer, besides the model's end tokens: what starts another file.
    """

    ids: list[int]
    ends: tuple[int, ...]


def gap_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, extra: Sequence[tuple[str, str]] = (), begun: str = ""
) -> Gap | None:
    """The prompt for a gap; None if the vocabulary has no marks for it. Texts are plain text.

    Args:
        tokenizer: of the model.
        prefix, suffix: before and after the gap.
        extra: other files, by name and text, that come first.
        begun: text that the answer continues.
    """

    def ids_of(names: Sequence[str]) -> list[int]:
        return [found for name in names if (found := tokenizer.id_of(name)) is not None]

    found = next((ids for marks in MARKS if len(ids := ids_of([m for m in marks if m])) == sum(map(bool, marks))), None)
    if found is None:
        return None

    def text(value: str) -> list[int]:
        return tokenizer.encode(value, add_bos=False) if value else []

    separators, repositories = ids_of(SEPARATORS)[:1], ids_of(REPOSITORIES)[:1]
    before: list[int] = []
    for name, content in extra:
        before += [*separators, *text(f"{name}\n{content}\n")]
    if extra and separators and repositories:
        before = [*repositories, *text("repository\n"), *before, *separators, *text("filename\n")]
    start = list(tokenizer.prefix) if tokenizer.add_bos else []
    if len(found) == 2:
        ids = [*start, *before, found[1], *text(suffix), found[0], *text(prefix), *text(begun)]
    else:
        ids = [*start, *before, found[0], *text(prefix), found[1], *text(suffix), found[2], *text(begun)]
    return Gap(ids, tuple(dict.fromkeys([*separators, *repositories, *ids_of(PADS), *found])))
