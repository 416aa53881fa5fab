import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { until } from "./browser.js";
import { offsetOfLine, Renderer } from "../../python/fabula/web/renderer.js";

let batches;

/** A server that makes one block of each paragraph; `fails` says whether it is away. */
let fails;
async function send(texts) {
  batches.push(texts);
  if (fails) throw new Error("away");
  const rendered = texts.map((text) => {
    const lines = text.split("\n");
    return { blocks: text.split("\n\n"), last_line: lines.lastIndexOf("") + 1 };
  });
  return { rendered };
}

beforeEach(() => {
  batches = [];
  fails = false;
});

/** Blocks of a text, once they are there. */
const blocksOf = (renderer, text) =>
  new Promise((resolve) => {
    const look = () => {
      const found = renderer.blocks(text, look);
      if (found) resolve(found);
    };
    look();
  });

test("texts that are asked for together are sent together, each once", async () => {
  const renderer = new Renderer(send);
  const wanted = ["a", "b\n\nc", "a"].map((text) => blocksOf(renderer, text));
  assert.deepEqual(await Promise.all(wanted), [["a"], ["b", "c"], ["a"]]);
  assert.deepEqual(batches, [["a", "b\n\nc"]]);
  assert.deepEqual(renderer.blocks("a", assert.fail), ["a"]);
});

test("a request is bounded in texts and in characters", async () => {
  const renderer = new Renderer(send);
  const short = Array.from({ length: 100 }, (_, i) => `text ${i}`);
  const long = ["x", "y"].map((letter) => letter.repeat(200_000));
  await Promise.all([...short, ...long].map((text) => blocksOf(renderer, text)));
  assert.deepEqual(
    batches.map((texts) => texts.length),
    [64, 37, 1],
  );
});

test("a text longer than a request is sent alone", async () => {
  const renderer = new Renderer(send);
  await blocksOf(renderer, "x".repeat(400_000));
  assert.equal(batches.length, 1);
});

test("what is kept is bounded", async () => {
  const renderer = new Renderer(send);
  const texts = Array.from({ length: 401 }, (_, i) => `text ${i}`);
  await Promise.all(texts.map((text) => blocksOf(renderer, text)));
  assert.equal(
    renderer.blocks(texts[0], () => {}),
    null,
  );
  await blocksOf(renderer, texts[0]);
  assert.deepEqual(
    renderer.blocks(texts[400], () => {}),
    [texts[400]],
  );
});

test("a server that is away is asked again at the next look", async () => {
  const renderer = new Renderer(send);
  fails = true;
  assert.equal(renderer.blocks("a", assert.fail), null);
  await until(() => batches.length === 1);
  fails = false;
  assert.deepEqual(await blocksOf(renderer, "a"), ["a"]);
});

test("of a text that grows only what can still change is sent", async () => {
  const renderer = new Renderer(send);
  const growing = { text: "one\n\ntw", blocks: [] };
  let n = 0;
  renderer.follow(growing, () => n++);
  await until(() => n === 1);
  assert.deepEqual(growing.blocks, ["one", "tw"]);
  assert.equal(growing.shown, growing.text.length);
  growing.text += "o\n\nthree";
  renderer.follow(growing, () => n++);
  await until(() => n === 2);
  assert.deepEqual(growing.blocks, ["one", "two", "three"]);
  growing.text += "!";
  renderer.follow(growing, () => n++);
  await until(() => n === 3);
  assert.deepEqual(growing.blocks, ["one", "two", "three!"]);
  assert.equal(growing.shown, growing.text.length);
  assert.deepEqual(batches, [["one\n\ntw"], ["two\n\nthree"], ["three!"]]);
});

test("text that comes while the server renders is not forgotten", async () => {
  let release;
  const gate = new Promise((resolve) => (release = resolve));
  const renderer = new Renderer(async (texts) => {
    if (!batches.length) await gate.then(() => batches.push("first"));
    return send(texts);
  });
  const growing = { text: "a", blocks: [] };
  renderer.follow(growing, () => {});
  await new Promise((resolve) => setTimeout(resolve, 5));
  growing.text = "ab";
  renderer.follow(growing, () => {});
  growing.text = "abc";
  renderer.follow(growing, () => {});
  release();
  await until(() => growing.shown === 3, "the last text");
  assert.deepEqual(growing.blocks, ["abc"]);
});

test("offsets of lines", () => {
  assert.deepEqual(
    [0, 1, 2].map((line) => offsetOfLine("ab\n\ncd", line)),
    [0, 3, 4],
  );
});
