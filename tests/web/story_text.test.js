import assert from "node:assert/strict";
import { test } from "node:test";

import * as story from "../../python/fabula/web/story_text.js";
import { turnsById } from "../../python/fabula/web/turns.js";

/** A path of pieces: [prompt, text], and a note where there is a third. */
function pathOf(...pieces) {
  const list = pieces.map(([prompt, text, frozen = false], i) => ({
    id: `t${i}`,
    parent_id: i ? `t${i - 1}` : "",
    prompt,
    text,
    frozen,
  }));
  return { turns: turnsById(list), path: list.map(({ id }) => id) };
}

const PATH = pathOf(["NOTE", "", true], ["Once ", "there was"], [" a whale", "."]);

test("the story is what its turns say, without notes", () => {
  assert.equal(story.textOf(PATH), "Once there was a whale.");
  assert.equal(story.textOf(pathOf()), "");
});

test("text at the end is added to the head", () => {
  const found = story.difference(PATH, "Once there was a whale. It sang.");
  assert.deepEqual(found, { turn: "t2", rest: " It sang." });
});

test("the same text needs nothing", () => {
  assert.deepEqual(story.difference(PATH, "Once there was a whale."), { turn: "t2", rest: "" });
});

test("a change goes back to the turn before it", () => {
  const found = story.difference(PATH, "Once there was a ship.");
  assert.deepEqual(found, { turn: "t1", rest: " a ship." });
  assert.deepEqual(story.difference(PATH, "Twice"), { turn: "t0", rest: "Twice" });
  assert.deepEqual(story.difference(pathOf(), "Twice"), { turn: "", rest: "Twice" });
});

test("going back and adding the rest says the text, wherever it was changed", () => {
  const text = story.textOf(PATH);
  for (let at = 0; at <= text.length; at++) {
    for (const changed of [text.slice(0, at), `${text.slice(0, at)}X${text.slice(at + 1)}`]) {
      const { turn, rest } = story.difference(PATH, changed);
      const path = PATH.path.slice(0, PATH.path.indexOf(turn) + 1);
      assert.equal(story.textOf({ ...PATH, path }) + rest, changed);
    }
  }
});

test("continuing at the end keeps nothing after it", () => {
  const paper = "Once there was a whale. It sang.";
  const found = story.continuation(PATH, paper, paper.length);
  assert.deepEqual(found, { text: paper, after: "", turn: "t2", rest: " It sang." });
});

test("spaces at the end are left to the model, line breaks are not", () => {
  const last = (paper) => story.continuation(pathOf(), paper, paper.length).text;
  assert.equal(last("Once  "), "Once");
  assert.equal(last("Once \n"), "Once \n");
});

test("text after the cursor is dropped if the tree has it", () => {
  const found = story.continuation(PATH, "Once there was a whale.", "Once there was".length);
  assert.deepEqual(found, { text: "Once there was", after: "", turn: "t1", rest: "" });
});

test("text after the cursor is kept if no turn has it", () => {
  const paper = "Once there was a whale. It sang. It slept.";
  const found = story.continuation(PATH, paper, paper.indexOf(" It slept."));
  assert.equal(found.after, " It slept.");
  assert.deepEqual([found.turn, found.rest], ["t2", " It sang."]);
});

test("pieces of the story become one, notes stay on their own", () => {
  const { turns } = pathOf(["a", "b"], ["c", "d"], ["n", "", true], ["e", ""]);
  const pieces = story.piecesOf([...turns.values()], "first");
  assert.deepEqual(pieces, [
    { frozen: true, text: "first" },
    { frozen: false, text: "abcd" },
    { frozen: true, text: "n" },
    { frozen: false, text: "e" },
  ]);
  assert.deepEqual(story.piecesOf([]), []);
});

test("a note ends with a line break", () => {
  assert.equal(story.endedNote("The sea is warm. "), "The sea is warm.\n\n");
  assert.equal(story.endedNote("The sea is warm.\n"), "The sea is warm.\n");
});

test("tokens that the text does not show are left out", () => {
  const tokens = ["Once", "", " upon", "<end>"].map((text, token_id) => ({ token_id, text }));
  const shown = (text) => story.visibleTokens(tokens, text).map((one) => [one.position, one.text]);
  assert.deepEqual(shown("Once upon"), [
    [0, "Once"],
    [2, " upon"],
  ]);
  assert.deepEqual(shown("Once up"), [
    [0, "Once"],
    [2, " up"],
  ]);
  assert.deepEqual(shown(""), []);
});
