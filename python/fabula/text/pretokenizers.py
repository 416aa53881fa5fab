r"""Pre-tokenizers of GGUF files: how byte-level BPE splits a text before merging, by `tokenizer.ggml.pre`.

A GGUF file only names its rule. The names, and which of them share a rule, are those of llama.cpp (src/llama-vocab.cpp
of the source in llama-cpp-python 0.3.36). The rules are the regular expressions of the models' own tokenizer.json, as
llama.cpp applies them.

Where the two differ, a GGUF file follows llama.cpp, so that both give the same ids; a Hugging Face folder follows its
tokenizer.json. llama.cpp differs in:

    letters     Lu, Ll, Lt, Lm and Lo are one class. tekken and gpt-4o distinguish case among ASCII letters only; youtu,
                tiny_aya and kimi-k2 not at all, and in kimi-k2 marks are not letters
    's, 't ...  match in any case, but not with U+017F (long s), which case-insensitive matching takes for an s
    whitespace  beyond ASCII is not in the character ranges of deepseek-llm and deepseek-coder
    digits      afmoe and tiny_aya split runs of digits in threes from the end, and join the first group to the text
                before it until the next expression splits there
    NFC         no normalization, where the tokenizer.json of Qwen2 and similar models asks for NFC

Each rule is a list of expressions. The first splits the text, each further one the pieces of the one before. Matches
and the text between them are pieces. The syntax is that of Oniguruma, the engine of the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fabula.lean_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A rule for splitting texts.

    Attributes:
        expressions: split the text, one after the other.
        whole_words: whether a piece that is a token is used without merging (`ignore_merges`).
        add_bos: default for a file that does not say whether to add the start token.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps of a Sequence in a tokenizer.json."""
        *first, last = self.expressions
        steps = [_step(expression) for expression in first]
        # ByteLevel comes last, since it maps bytes to other characters. It can do GPT-2's split itself.
        if last != _GPT2:
            steps.append(_step(last))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last == _GPT2}
        return [*steps, byte_level]


def _step(expression: str) -> dict[str, Any]:
    if expression == _DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


# ---- Expressions ----------------------------------------------------------------------------------------------------

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"  # whitespace
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_REST}"
_QWEN2 = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_REST}"
_QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
_CASCADE = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
_JAIS2 = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|{_CASCADE}"
_NO_SPACE = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"  # bloom; in brackets "(" and "|" are literal
_LINES = r"[^\n]+|\n+"

# Cased letters, from the tokenizer.json of deepseek-llm.
_CASED = (
    "A-Za-z"
    "\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&[^\\s]]+"
_CJK_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _REST
)
_SPARK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
_YOUTU_EAST = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_AFMOE_EAST = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_HAN = (  # kimi-k2
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f"
)
# Splits runs of digits in threes from their end; the first group keeps the text before it.
_THREES = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{N}]+"


def _cased_words(letters: str, contractions: str, digits: str) -> str:
    """Words with uppercase before lowercase only, among ASCII letters."""
    upper, lower = rf"[{letters}&&[^a-z]]", rf"[{letters}&&[^A-Z]]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{contractions}|{lead}{upper}+{lower}*{contractions}"
    return rf"{words}|{digits}|{_PATHS}|{_REST}"


def _one_case(digits: str) -> str:
    """Words of any case, with marks, followed by contractions."""
    return rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{CONTRACTIONS}?|{digits}|{_PATHS}|{_REST}"


_TEKKEN = _cased_words(r"\p{L}", "", r"\p{N}")
_GPT4O = _cased_words(r"\p{L}", f"{CONTRACTIONS}?", r"\p{N}{1,3}")
_GRANITE_EMBEDDING = _cased_words(r"\p{L}\p{M}", f"{CONTRACTIONS}?", r"\p{N}{1,3}")
_KIMI = rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SYMBOLS}|{_REST}"
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|"
    rf"{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}"
_EXAONE_MOE = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

# ---- Rules ----------------------------------------------------------------------------------------------------------

_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
    r"\s+\z",
    _CJK,
    r"\p{N}+",
)
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)

_RULES: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (PreTokenizer((_GPT2,)), (
        "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
        "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "trillion",
        "granite-docling", "exaone4",
    )),
    (PreTokenizer((_DIGIT, _GPT2)), (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    )),
    (PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True), (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    )),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe", "chatglm-bpe")),
    (PreTokenizer((_LLAMA3,), whole_words=True), ("glm4", "glm5")),
    (PreTokenizer((_QWEN2,)), (
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2",
    )),
    (PreTokenizer((_QWEN35,)), ("qwen35",)),
    (PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True), ("tekken",)),
    (PreTokenizer((_GPT4O,)), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    (PreTokenizer((_GRANITE_EMBEDDING,), whole_words=True), ("granite-embed-multi-97m",)),
    (PreTokenizer(_DEEPSEEK_LLM), ("deepseek-llm",)),
    (PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")), ("deepseek-coder",)),
    (PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _DEEPSEEK3)), ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    (PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _SPARK, r"\p{N}")), ("spark2_5",)),
    (PreTokenizer((_YOUTU_EAST, _one_case(r"\p{N}")), whole_words=True), ("youtu",)),
    (PreTokenizer((_THREES, _one_case(r"\p{N}{1,3}"))), ("tiny_aya", "cohere2moe")),
    (PreTokenizer((_THREES, _AFMOE_EAST, _DEEPSEEK3)), ("afmoe",)),
    (PreTokenizer((_KIMI,)), ("kimi-k2",)),
    (PreTokenizer((r"\p{N}+", "(?=(?:[0-9]{3})+(?![0-9]))")), ("superbpe",)),
    (PreTokenizer((_BAILING,)), ("bailingmoe", "bailingmoe2", "llada-moe")),
    (PreTokenizer((_SEED,)), ("seed-coder",)),
    (PreTokenizer((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_REST}",)), ("ufakzeka",)),
    (PreTokenizer((_LINES, _QWEN2)), ("laguna",)),
    (PreTokenizer((_EXAONE_MOE,)), ("exaone-moe",)),
    (PreTokenizer((r"\p{N}{1,3}", rf"{CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_REST}"), whole_words=True), (
        "minicpm5",
    )),
    (PreTokenizer((_JAIS2,)), ("jais-2",)),
    (PreTokenizer((_NO_SPACE,)), ("poro-chat", "bloom", "gpt3-finnish")),
    (PreTokenizer((_NO_SPACE, r"\p{N}")), ("viking",)),
    (PreTokenizer(_CHAMELEON, add_bos=True), ("chameleon",)),
    (PreTokenizer(_FALCON), ("falcon",)),
    (PreTokenizer(_DEFAULT), ("default",)),
)  # fmt: skip

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType({name: rule for rule, names in _RULES for name in names})

DEFAULT = "default"  # llama.cpp's rule if the key is missing

# Names in llama.cpp that mean BPE over characters instead of bytes, for unsupported families.
REFUSED = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
