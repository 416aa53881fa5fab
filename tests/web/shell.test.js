// What is around the views: addresses, keyboard shortcuts, the status line, and actions that can be
// taken back.

import assert from "node:assert/strict";
import { test } from "node:test";

import "./browser.js";
import { actionOf } from "../../python/fabula/web/keys.js";
import { parseAddress, Pending, statusText } from "../../python/fabula/web/page.js";
import { parseSessionFile, parseTags } from "../../python/fabula/web/sidebar.js";
import { detailsText, speedText } from "../../python/fabula/web/turn.js";
import { changedDraft } from "../../python/fabula/web/verbs.js";

test("addresses", () => {
  const cases = {
    "": ["chat", ""],
    "#/": ["chat", ""],
    "#/chat/a.b-c_1": ["chat", "a.b-c_1"],
    "#/tree/a": ["tree", "a"],
    "#/story": ["story", ""],
    "#/story/a?b": ["story", "a"],
    "#nothing": ["chat", ""],
  };
  for (const [hash, [view, id]] of Object.entries(cases)) {
    assert.deepEqual(parseAddress(hash), { view, id }, hash);
  }
});

// ---- Keyboard shortcuts ----

const NOW = { hasSession: true, hasTurn: true, canRedo: true, isAnswering: false };
const plain = { ctrlKey: false, metaKey: false, altKey: false, shiftKey: false };
const press = (key, { now = {}, isWriting = false, ...keys } = {}) =>
  actionOf({ ...plain, key, ...keys }, isWriting, { ...NOW, ...now });

test("each key of the list does something", () => {
  const keys = ["?", "n", "/", "i", "t", "u", "r"];
  const wanted = ["help", "new", "search", "focus", "tree", "undo", "redo"];
  assert.deepEqual(
    keys.map((key) => press(key)),
    wanted,
  );
  assert.equal(press("x"), null);
});

test("Escape stops a reply, also while the user writes", () => {
  assert.equal(press("Escape"), null);
  assert.equal(press("Escape", { now: { isAnswering: true }, isWriting: true }), "stop");
});

test("a letter that is written is no shortcut", () => {
  for (const key of ["?", "n", "/", "i", "t", "u", "r"]) {
    assert.equal(press(key, { isWriting: true }), null, key);
  }
  assert.equal(press("z", { isWriting: true, ctrlKey: true }), null, "undo of the text itself");
  assert.equal(press("n", { isWriting: true, ctrlKey: true, altKey: true }), "new");
});

test("undo and redo have the usual keys too", () => {
  assert.equal(press("z", { ctrlKey: true }), "undo");
  assert.equal(press("z", { metaKey: true }), "undo");
  assert.equal(press("Z", { ctrlKey: true, shiftKey: true }), "redo");
  assert.equal(press("y", { ctrlKey: true }), "redo");
  assert.equal(press("z"), null);
});

test("what cannot be done is no action", () => {
  assert.equal(press("u", { now: { hasTurn: false } }), null);
  assert.equal(press("r", { now: { canRedo: false } }), null);
  for (const key of ["u", "r", "t"]) assert.equal(press(key, { now: { hasSession: false } }), null);
});

// ---- The status line ----

const health = (...models) => ({ online: true, health: { ready: false, version: "1", models } });

test("nothing is said when all is well, or nothing is known yet", () => {
  assert.equal(statusText(health({ name: "m", state: "ready" })), "");
  assert.equal(statusText({ online: true, health: null }), "");
});

test("a server that is away, loads, downloads or failed", () => {
  assert.match(statusText({ online: false, health: null }), /does not answer/);
  assert.equal(statusText(health({ name: "m", state: "loading" })), "Loading m…");
  const fetching = { name: "m", state: "fetching", progress: 0.256 };
  assert.equal(statusText(health(fetching)), "Downloading m… 26 %");
  const failed = { name: "m", state: "failed", error: "no such file" };
  assert.equal(statusText(health(failed)), "m could not be loaded: no such file");
  assert.equal(statusText(health(failed, { ...fetching, progress: null })).split("…").length, 2);
});

// ---- Actions that can be taken back ----

test("an action runs after its time, once", (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const pending = new Pending();
  let n = 0;
  const takeBack = pending.add(() => n++, 8000);
  context.mock.timers.tick(7999);
  assert.equal(n, 0);
  context.mock.timers.tick(1);
  assert.equal(n, 1);
  assert.equal(takeBack(), false);
  pending.runAll();
  assert.equal(n, 1);
});

test("an action that is taken back never runs", (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const pending = new Pending();
  const takeBack = pending.add(() => assert.fail(), 8000);
  assert.equal(takeBack(), true);
  assert.equal(takeBack(), false);
  context.mock.timers.tick(9000);
  pending.runAll();
});

test("closing the page runs what waits", (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const pending = new Pending();
  const ran = [];
  pending.add(() => ran.push("a"), 1000);
  pending.add(() => ran.push("b"), 2000);
  pending.runAll();
  assert.deepEqual(ran, ["a", "b"]);
  context.mock.timers.tick(3000);
  assert.equal(ran.length, 2);
});

// ---- Small ones ----

test("a file that is no exported conversation is refused", () => {
  assert.deepEqual(parseSessionFile('{"id": "a", "turns": []}'), { id: "a", turns: [] });
  for (const text of [
    "",
    "[1]",
    "null",
    "{}",
    '{"id": 1, "turns": []}',
    '{"id": "a", "turns": {}}',
  ]) {
    assert.equal(parseSessionFile(text), null, text);
  }
});

test("tags are separated by commas of both kinds", () => {
  assert.deepEqual(parseTags(" ships, 鲸，, a b ,"), ["ships", "鲸", "a b"]);
  assert.equal(parseTags("x".repeat(100))[0].length, 60);
});

test("settings of a new session are merged; null is the default", () => {
  const draft = { sampling: { temperature: 1, seed: 5 }, system: "a" };
  const changed = changedDraft(draft, { sampling: { seed: null, top_p: 0.5 }, system: "b" });
  assert.deepEqual(changed, { sampling: { temperature: 1, top_p: 0.5 }, system: "b" });
  assert.deepEqual(changedDraft(draft, { context_policy: "slide" }), {
    ...draft,
    context_policy: "slide",
  });
});

test("details leave out what is not known", () => {
  const turn = { generated: 5, tokens_per_s: 0, first_token_ms: 0, prompt_tokens: 9, reused: 4 };
  const rest = { recomputed: 0, finish_reason: null, seed: null };
  assert.equal(
    detailsText({ ...turn, ...rest }),
    "5 tokens · 9 prompt tokens · 4 reused · finished",
  );
  const all = {
    tokens_per_s: 12.34,
    first_token_ms: 5.6,
    recomputed: 2,
    finish_reason: "length",
    seed: 0,
  };
  assert.equal(
    detailsText({ ...turn, ...all }),
    "5 tokens · 12.3 tokens/s · first token after 6 ms · 9 prompt tokens · 4 reused · 2 recomputed · " +
      "stopped at the length limit · seed 0",
  );
});

test("the speed of a reply counts from its first token", () => {
  const reply = { nTokens: 0, done: false };
  assert.equal(speedText(reply, 500), "");
  reply.nTokens = 1;
  assert.equal(speedText(reply, 1000), "");
  reply.nTokens = 21;
  assert.equal(speedText(reply, 1000), "", "no time has passed");
  assert.equal(speedText(reply, 3000), "10 tokens/s");
});
