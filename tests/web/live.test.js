import assert from "node:assert/strict";
import { test } from "node:test";

import { applyEvent, hasLanded, isOver, liveOf, pathBefore } from "../../python/fabula/web/live.js";

const start = { session_id: "s", stream_id: "r", parent_id: "a", prompt: "hi", selects: true };
const begin = (more = {}, turns = new Map([["a", { id: "a", parent_id: "" }]])) =>
  liveOf({ ...start, ...more }, turns);
const token = (text, index) => ({ id: 0, event: "token", data: { text, index } });

test("tokens are appended to the reply they belong to", () => {
  const live = begin({ n: 2 });
  applyEvent(live, token("a"));
  applyEvent(live, token("b", 1));
  const changed = applyEvent(live, token("c", 1));
  assert.equal(changed, live.replies[1]);
  assert.deepEqual(
    live.replies.map(({ text, nTokens }) => [text, nTokens]),
    [
      ["a", 1],
      ["bc", 2],
    ],
  );
});

test("a continued reply begins with the text it continues, which is no token of it", () => {
  const live = begin({ begun_text: "Once" });
  applyEvent(live, token(" more"));
  assert.deepEqual([live.replies[0].text, live.replies[0].nTokens], ["Once more", 1]);
});

test("it is over when each reply has ended, well or not", () => {
  const live = begin({ n: 2 });
  applyEvent(live, { id: 1, event: "done", data: { turn_id: "t" } });
  assert.ok(!isOver(live));
  applyEvent(live, { id: 2, event: "error", data: { index: 1, error: { message: "no" } } });
  assert.ok(isOver(live));
  assert.deepEqual(
    live.replies.map(({ result }) => result),
    [{ turn_id: "t" }, null],
  );
});

test("it has landed when the tree has a new turn after its parent", () => {
  const live = begin();
  const turns = (...list) => new Map(list.map(([id, parent_id]) => [id, { id, parent_id }]));
  assert.ok(!hasLanded(live, turns(["a", ""])));
  assert.ok(!hasLanded(live, turns(["a", ""], ["b", ""])));
  assert.ok(hasLanded(live, turns(["a", ""], ["b", "a"])));
  const first = begin({ parent_id: "" }, new Map());
  assert.ok(hasLanded(first, turns(["a", ""])));
});

test("a reply that becomes the head hides the turns after its parent", () => {
  const path = ["a", "b", "c"];
  assert.deepEqual(pathBefore(path, undefined), path);
  assert.deepEqual(pathBefore(path, begin()), ["a"]);
  assert.deepEqual(pathBefore(path, begin({ parent_id: "c" })), path);
  assert.deepEqual(pathBefore(path, begin({ parent_id: "" })), []);
});
