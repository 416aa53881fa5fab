// The page's words: both languages have the same, and the page uses all of them.

import assert from "node:assert/strict";
import { test } from "node:test";

import { en } from "../../python/fabula/web/words_en.js";
import { zh } from "../../python/fabula/web/words_zh.js";
import { MODULES, source } from "./sources.js";

const placeholders = (text) => (text.match(/\{\w+\}/g) || []).sort();

test("both languages have the same keys, in the same order", () => {
  assert.deepEqual(Object.keys(zh), Object.keys(en));
});

test("both languages fill in the same values", () => {
  for (const key of Object.keys(en)) {
    assert.deepEqual(placeholders(zh[key]), placeholders(en[key]), key);
  }
});

test("no word is empty", () => {
  for (const [key, text] of [...Object.entries(en), ...Object.entries(zh)]) {
    assert.ok(text.trim(), key);
  }
});

for (const name of ["words_en.js", "words_zh.js"]) {
  test(`${name} has one word a line`, () => {
    const lines = source(name).split("\n");
    const first = lines.findIndex((line) => line.startsWith("export const"));
    const rest = lines.slice(first + 1, lines.indexOf("};"));
    const words = rest.filter((line) => line && !/^ {2}\/\/ /.test(line));
    for (const line of words) assert.match(line, /^ {2}\w+: ("[^"]*"|'[^']*'),$/);
    assert.equal(words.length, Object.keys(en).length);
  });
}

test("every word is used", () => {
  const others = MODULES.filter((name) => !name.startsWith("words_")).map(source);
  const literals = new Set(others.flatMap((text) => text.match(/"\w+"|^ {2}\w+(?=: \{)/gm) || []));
  const isUsed = (key) =>
    literals.has(`"${key}"`) ||
    (key.endsWith("Help") && literals.has(`"${key.slice(0, -4)}"`)) || // t(`${name}Help`)
    (key.startsWith("policy_") && literals.has(`"${key.slice(7)}"`)) || // t(`policy_${name}`)
    literals.has(`  ${key}`); // a preset
  assert.deepEqual(
    Object.keys(en).filter((key) => !isUsed(key)),
    [],
  );
});

test("the page says Continue and current turn", () => {
  assert.equal(en.continueStory, "Continue");
  assert.equal(en.continueReply, "Continue");
  assert.equal(en.currentTurn, "Current turn");
  for (const text of Object.values(en)) assert.doesNotMatch(text, /write on|\bthe head\b/i);
});
