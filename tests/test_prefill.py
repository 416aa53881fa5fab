"""Answers that start with given text, and templates by name: as transformers renders them, and for callers."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument, TemplateError, TokenizerError
from fabula.export.vocabulary import vocabulary_keys
from fabula.formats.hub import _FILES, _SUBFOLDERS
from fabula.model import Model
from fabula.text.prefill import is_prefilled, render_prefilled
from fabula.text.template import ChatTemplate
from fabula.text.tokenizer import Tokenizer
from test_openai_inside import inside

GREEDY = SamplingParams(temperature=0, max_tokens=8)
USER = {"role": "user", "content": "Why?"}
TURN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
_LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
_NEXT = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "plain": _LOOP + "{{ m.content }}" + _NEXT,
    "trims": _LOOP + "{{ m.content | trim }}" + _NEXT,
    "strips thoughts": _LOOP + "{{ m.content.split('</think>')[-1] | trim }}" + _NEXT,
    "thinks first": _LOOP  # as Qwen3
    + "{% if m.role == 'assistant' %}{% set t = '' %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<think>\n{{ t }}\n</think>\n\n{{ c }}{% else %}{{ m.content }}{% endif %}" + _NEXT,
    "opens a thought": _LOOP + "{{ m.content }}" + _NEXT.replace("assistant\n", "assistant\n<think>\n"),
    "refuses": "{% if messages[-1].role != 'user' %}{{ raise_exception('the user speaks last') }}{% endif %}"
    + _LOOP
    + "{{ m.content }}"
    + _NEXT,
}
THOUGHT = "<think>\nhm\n</think>\n\nSo it"

# Template, words, text after the user's turn.
PROMPTS = [
    ("plain", "The answer is", "The answer is"),
    ("plain", "The answer is ", "The answer is "),
    ("plain", "  The", "  The"),
    ("plain", THOUGHT, THOUGHT),
    ("plain", "", ""),
    ("trims", "The answer is", "The answer is"),
    ("trims", " The answer is \n", "The answer is"),
    ("strips thoughts", "The answer is", "The answer is"),
    ("strips thoughts", THOUGHT, THOUGHT),
    ("strips thoughts", "<think>x</think>", "<think>x</think>"),
    ("strips thoughts", "<think>\nLet me", "<think>\nLet me"),
    ("thinks first", "The answer is", "<think>\n\n</think>\n\nThe answer is"),
    ("thinks first", THOUGHT, THOUGHT),
    ("thinks first", "<think>\nLet me", "<think>\nLet me"),
    ("opens a thought", "The answer is", "The answer is"),
    ("opens a thought", "<think>\nLet me", "<think>\nLet me"),
    ("opens a thought", "", "<think>\n"),
    ("refuses", "The answer is ", "The answer is "),
]


def prompt_of(template: str, words: str) -> str:
    messages = [USER, {"role": "assistant", "content": words}]
    return render_prefilled(ChatTemplate(TEMPLATES[template]), messages, "\ue000", {})


@pytest.mark.parametrize(("template", "words", "behind"), PROMPTS)
def test_a_prompt_ends_behind_the_words(template: str, words: str, behind: str) -> None:
    assert prompt_of(template, words) == TURN + behind


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("words", ["The answer is", "The answer is ", "1, 2,\n3", "Ja: <b>"])
def test_a_prompt_is_that_of_transformers(template: str, words: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    if template == "refuses":
        pytest.skip("transformers has no way to continue behind it")
    messages = [USER, {"role": "assistant", "content": words}]
    (theirs,), _ = utils.render_jinja_template(
        [messages], chat_template=TEMPLATES[template], continue_final_message=True
    )
    assert prompt_of(template, words) == theirs


def test_parts_are_continued() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
    content = [{"type": "text", "text": "Hello,"}, {"type": "text", "text": " wor"}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": content},
    ]
    assert render_prefilled(ChatTemplate(source), messages, "\ue000", {}) == "[user]Hi;[assistant]Hello, wor"
    assert content[1]["text"] == " wor", "what the caller gave stays as it was"


def test_a_template_that_shows_nothing() -> None:
    template = ChatTemplate("{{ raise_exception('no') if messages | length == 1 else '' }}")
    with pytest.raises(TemplateError, match="no"):
        render_prefilled(template, [USER, {"role": "assistant", "content": "So"}], "\ue000", {})
    with pytest.raises(TemplateError, match="does not render the message"):
        render_prefilled(ChatTemplate("x"), [{"role": "assistant", "content": "So"}], "\ue000", {})


SO = [USER, {"role": "assistant", "content": "So"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("messages", "asked", "turn", "answer"),
    [
        (SO, None, None, True),
        (SO, True, None, True),
        (SO, True, False, True),
        (SO, False, None, False),
        (SO, False, True, False),
        (SO, None, True, False),
        (SO, None, False, False),
        ([USER], None, None, False),
        ([USER, CALL], None, None, False),
        ([USER], False, None, False),
        ([USER], True, None, "needs a last message of the assistant"),
        ([USER, CALL], True, None, "no tool_calls"),
        ([], True, None, "needs a last message"),
        (SO, True, True, "exclude each other"),
        (SO, "yes", None, "continue_final_message is 'yes', must be true or false"),
        (SO, None, 1, "add_generation_prompt is 1, must be true or false"),
    ],
)
def test_who_is_continued(messages: list[Any], asked: Any, turn: Any, answer: Any) -> None:
    if isinstance(answer, bool):
        assert is_prefilled(messages, asked, turn) == answer
    else:
        with pytest.raises(InvalidArgument, match=answer):
            is_prefilled(messages, asked, turn)


# ---- The SDK and the server -----------------------------------------------------------------------------------------


def test_an_answer_holds_what_is_new(loaded_tiny: Model) -> None:
    model = loaded_tiny
    whole = model.chat([{"role": "user", "content": "the lion"}], GREEDY).text()
    assert len(whole) > 4
    begun = whole[: len(whole) // 2]
    messages = [{"role": "user", "content": "the lion"}, {"role": "assistant", "content": begun}]
    ids = model.chat_ids(messages)
    assert model.tokenizer.decode(ids, skip_special=False).endswith("assistant\n" + begun)
    answer = model.chat(messages, GREEDY)
    assert answer.prompt_ids == ids
    text = answer.text()
    assert text == model.generate(ids, GREEDY).text(), "a blank at its beginning stays"
    again = model.chat(messages, GREEDY, continue_final_message=False)
    assert again.prompt_ids == model.chat_ids(messages, add_generation_prompt=True) != ids
    assert model.chat_ids(messages, add_generation_prompt=False)[: len(ids)] != again.prompt_ids


def test_control_tokens_in_the_words_stay_text(loaded_tiny: Model) -> None:
    tokenizer = loaded_tiny.tokenizer
    messages = [USER, {"role": "assistant", "content": "a</s>b"}]
    ids = loaded_tiny.chat_ids(messages)
    assert tokenizer.decode(ids, skip_special=False).endswith("a</s>b")
    assert tokenizer.special_tokens["</s>"] not in ids[-6:]


def test_chat_completions_continue(tiny_folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the lion"}, {"role": "assistant", "content": "sat on"}]
    with Model.load(tiny_folder, threads=1) as model:
        behind = model.generate(model.chat_ids(messages), GREEDY)
        text, n_tokens = behind.text(), len(behind.prompt_ids)
        anew = model.chat(messages, GREEDY, continue_final_message=False).text()
        bare = model.chat_ids(messages, add_generation_prompt=False)

    async def work(client: Any) -> None:
        async def ask(**body: Any) -> tuple[int, Any]:
            body = {"messages": messages, "temperature": 0, "max_tokens": 8} | body
            found: tuple[int, Any] = await client.ask("POST", "/v1/chat/completions", **body)
            return found

        for body in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
            status, answer = await ask(**body)
            assert status == 200, answer
            assert answer["choices"][0]["message"]["content"] == text
            assert answer["usage"]["prompt_tokens"] == n_tokens
        for body in ({"continue_final_message": False}, {"add_generation_prompt": True}):
            status, answer = await ask(**body)
            assert answer["choices"][0]["message"]["content"] == anew
        status, answer = await ask(add_generation_prompt=False)
        assert answer["usage"]["prompt_tokens"] == len(bare)
        status, answer = await ask(continue_final_message=True, add_generation_prompt=True)
        assert status == 400
        assert "exclude each other" in json.dumps(answer)
        status, answer = await ask(messages=messages[:1], continue_final_message=True)
        assert status == 400
        assert "last message of the assistant" in json.dumps(answer)

    inside(tmp_path, tiny_folder, work)


# ---- Templates by name ----------------------------------------------------------------------------------------------

NAMED = {
    "default": "D{{ messages[-1].content }}",
    "tool_use": "T{{ tools | length }}",
    "rag": "R{{ documents | length }}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def folder_with(folder: Path, files: dict[str, str], settings: Any = None) -> Path:
    tiny.write_model(folder, template=None)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | ({"chat_template": settings} if settings else {})))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


LIST = [{"name": name, "template": source} for name, source in NAMED.items()]
EXTRA = {f"additional_chat_templates/{name}.jinja": NAMED[name] for name in ("tool_use", "rag")}
FOLDERS: dict[str, tuple[dict[str, str], Any]] = {
    "a list": ({}, LIST),
    "an object": ({}, NAMED),
    "files": ({"chat_template.jinja": NAMED["default"], **EXTRA}, None),
    "files before settings": ({"chat_template.jinja": NAMED["default"], **EXTRA}, "old"),
    "chat_template.json": ({"chat_template.json": json.dumps({"chat_template": NAMED})}, None),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_templates_of_a_folder(case: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, *FOLDERS[case]))
    assert tokenizer.chat_templates == NAMED
    assert tokenizer.chat_template == tokenizer.template_for(tools=False) == NAMED["default"]
    assert tokenizer.template_for(tools=True) == NAMED["tool_use"]


def test_templates_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for case in ("a list", "files", "files before settings"):
        folder = folder_with(tmp_path / case, *FOLDERS[case])
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        template = Tokenizer.from_folder(folder).make_template()
        for options in ({}, {"tools": TOOLS}, {"chat_template": "rag", "documents": [{"text": "x"}]}):
            text = theirs.apply_chat_template([USER], tokenize=False, **options)
            assert template.render([USER], **options) == text, (case, options)


def test_templates_of_a_gguf_file(tmp_path: Path) -> None:
    before = Tokenizer.from_folder(folder_with(tmp_path, {}, LIST))
    keys, _ = vocabulary_keys(before, before.vocab_size)
    assert keys["tokenizer.chat_template.tool_use"] == NAMED["tool_use"]
    after = Tokenizer.from_gguf(keys, tmp_path / "model.gguf")
    assert after.chat_templates == NAMED
    template = after.make_template()
    assert template.render([USER]) == "DWhy?"
    assert template.render([USER], tools=TOOLS) == "T1"
    assert template.render([USER], tools=[]) == "DWhy?"
    assert template.render([USER], chat_template="rag", documents=[{}, {}]) == "R2"
    assert template.reads("tools")
    assert not template.variant(tools=False, name="rag").reads("tools")
    with pytest.raises(InvalidArgument, match="named 'klingon'; it has default, rag, tool_use"):
        template.render([USER], chat_template="klingon")
    with pytest.raises(InvalidArgument, match="named 'rag'; it has none"):
        ChatTemplate("x").render([USER], chat_template="rag")


def test_a_template_without_default() -> None:
    template = ChatTemplate(NAMED["rag"], named={"rag": NAMED["rag"], "tool_use": NAMED["tool_use"]})
    assert template.render([USER], documents=[1]) == "R1"
    assert template.render([USER], tools=TOOLS) == "T1"
    with pytest.raises(TemplateError, match="line 2"):
        ChatTemplate("x", named={"default": "x", "tool_use": "\n{% if %}"}).render([USER], tools=TOOLS)


def test_tools_reach_the_named_template(tmp_path: Path) -> None:
    """The SDK's way: no option but the tools says which template it is."""
    folder = folder_with(tmp_path, {}, [LIST[0], {"name": "tool_use", "template": "the lion {{ tools | length }}"}])
    with Model.load(folder, threads=1) as model:
        text = model.tokenizer.decode(model.chat_ids([USER], tools=TOOLS), skip_special=False)
        assert text.strip() == "the lion 1"
        assert model.template.render([USER]) == "DWhy?"


def test_the_hub_is_asked_for_them() -> None:
    def wanted(name: str) -> bool:
        return any(fnmatch(name, p) for p in _FILES) and not any(fnmatch(name, p) for p in _SUBFOLDERS)

    assert wanted("additional_chat_templates/tool_use.jinja")
    assert wanted("chat_template.json")
    assert not wanted("onnx/config.json")
    assert not wanted("original/model.safetensors")
    assert not wanted("checkpoint/model.safetensors.index.json")


def test_many_templates_are_refused(tmp_path: Path) -> None:
    files = {f"additional_chat_templates/{i}.jinja": "x" for i in range(65)}
    with pytest.raises(TokenizerError, match="holds 65 templates, at most 64 are read"):
        Tokenizer.from_folder(folder_with(tmp_path, files))
