"""Tokens that end a reply in addition to those in a model's files, known by name.

Source: special_eog_ids in src/llama-vocab.cpp of the llama.cpp in llama-cpp-python 0.3.36, exceptions included.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

END_TOKENS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",  # gpt-oss
    "<|call|>",  # gpt-oss
    "<|flush|>",  # Solar Open
    "<|calls|>",  # Solar Open
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",  # Kimi K2
    "[EOS]",  # Kimi K2
    "<|end_of_text|>",
    "<end_of_utterance>",  # SmolDocling
    "<eos>",  # Gemma 4
    "<turn|>",  # Gemma 4
    "<|tool_response>",  # Gemma 4
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "[e~[",  # MiniMax M2
)

# End tokens of fill-in-the-middle training, by the GGUF key for them: after one of these the gap is filled, and padding
# or another file follows. The key has priority over the names, and an earlier name over later ones.
GAP_ENDS: Mapping[str, tuple[str, ...]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def end_ids(
    ids: Mapping[str, int],
    named: Iterable[int],
    gap_ends: Mapping[str, int | None],
) -> list[int]:
    """All tokens that end a reply.

    Args:
        ids: of a vocabulary's tokens.
        named: end tokens from the model's files, most important first.
        gap_ends: those from the files, by the keys of `GAP_ENDS`.

    Returns:
        `named`, then the others in the order of `END_TOKENS` and `GAP_ENDS`.
    """
    found = dict.fromkeys(named)
    texts = {token: ids[token] for token in END_TOKENS if token in ids}
    for token in _not_ends(texts, writes_plamo=ids.get("<|plamo:eos|>") in found):
        texts.pop(token, None)
    found |= dict.fromkeys(texts.values())
    for key, names in GAP_ENDS.items():
        named_id = gap_ends.get(key)
        if named_id is None:
            named_id = next((ids[name] for name in names if name in ids), None)
        if named_id is not None:
            found[named_id] = None
    return list(found)


def _not_ends(texts: Container[str], *, writes_plamo: bool) -> list[str]:
    """Tokens that do not end a reply in some vocabularies: gpt-oss and Solar Open continue with another message after
    <|end|>, and for Gemma 4 and PLaMo </s> is ordinary text."""
    none = []
    calls = "<|call|>" in texts or "<|calls|>" in texts
    if calls and ("<|return|>" in texts or "<|flush|>" in texts):
        none.append("<|end|>")
    if "<|tool_response>" in texts or writes_plamo:
        none.append("</s>")
    return none
