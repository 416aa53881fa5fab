import assert from "node:assert/strict";
import { test } from "node:test";

import "./browser.js";
import { partingTexts } from "../../python/fabula/web/compare.js";
import { common, wordsOf } from "../../python/fabula/web/diff.js";
import { turnsById } from "../../python/fabula/web/turns.js";

const kept = (list, marks) => list.filter((_, i) => marks[i]).join("");

/** Length of the longest common subsequence, by trying every subsequence of `a`. */
function longest(a, b) {
  let best = 0;
  for (let mask = 0; mask < 1 << a.length; mask++) {
    const chosen = a.filter((_, i) => mask & (1 << i));
    let at = 0;
    for (const one of b) if (one === chosen[at]) at++;
    if (at === chosen.length) best = Math.max(best, at);
  }
  return best;
}

test("what is common is the same on both sides, and as long as can be", () => {
  for (const [a, b] of [
    ["", ""],
    ["abc", ""],
    ["abc", "abc"],
    ["abcbdab", "bdcaba"],
    ["aaab", "baaa"],
  ]) {
    const [left, right] = [[...a], [...b]];
    const [inA, inB] = common(left, right);
    assert.equal(kept(left, inA), kept(right, inB));
    assert.equal(kept(left, inA).length, longest(left, right));
  }
});

test("words and spaces make up the text again", () => {
  for (const text of ["", " a  b\n\nc ", "鲸 ship", "one"])
    assert.equal(wordsOf(text).join(""), text);
  assert.deepEqual(wordsOf("a  b"), ["a", "  ", "b"]);
});

test("branches are compared from where they part", () => {
  const turns = turnsById(
    [
      ["a", "", "1"],
      ["b", "a", "2"],
      ["c", "a", "3"],
      ["d", "c", "4"],
    ].map(([id, parent_id, text]) => ({
      ...{ id, parent_id, text },
      prompt: id === "d" ? "Why?" : "",
    })),
  );
  assert.deepEqual(partingTexts(turns, "b", "d"), ["2", "3\n\nWhy?\n\n4"]);
  assert.deepEqual(partingTexts(turns, "a", "b"), ["", "2"]);
  assert.deepEqual(partingTexts(turns, "b", "b"), ["", ""]);
});
