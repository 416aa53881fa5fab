import assert from "node:assert/strict";
import { test } from "node:test";

import * as turns from "../../python/fabula/web/turns.js";

/** a - (b - (d, e), c), and another first turn f. */
const tree = () =>
  turns.turnsById(
    [
      ["a", ""],
      ["b", "a"],
      ["c", "a"],
      ["d", "b"],
      ["e", "b"],
      ["f", ""],
    ].map(([id, parent_id]) => ({
      id,
      parent_id,
    })),
  );
const ids = (list) => list.map((turn) => turn.id).join("");

test("children are in the order they came in", () => {
  assert.deepEqual(tree().get("b").children, ["d", "e"]);
  assert.deepEqual(tree().get("f").children, []);
});

test("a path goes from the first turn to the one that is asked for", () => {
  assert.equal(ids(turns.pathTo(tree(), "e")), "abe");
  assert.equal(ids(turns.pathTo(tree(), "")), "");
  assert.equal(ids(turns.pathTo(tree(), "gone")), "");
});

test("a path of ten thousand turns", () => {
  const list = Array.from({ length: 10_000 }, (_, i) => ({
    id: `${i + 1}`,
    parent_id: i ? `${i}` : "",
  }));
  assert.equal(turns.pathTo(turns.turnsById(list), "10000").length, 10_000);
});

test("the children of the empty start are the first turns", () => {
  assert.deepEqual(turns.childrenOf(tree(), ""), ["a", "f"]);
  assert.deepEqual(turns.childrenOf(tree(), "a"), ["b", "c"]);
  assert.deepEqual(turns.childrenOf(new Map(), ""), []);
});

test("a turn is among its siblings", () => {
  const all = tree();
  assert.deepEqual(turns.siblingsOf(all, all.get("c")), ["b", "c"]);
  assert.deepEqual(turns.siblingsOf(all, all.get("a")), ["a", "f"]);
});

test("a turn whose parent is gone counts as a first turn", () => {
  const all = turns.turnsById([{ id: "x", parent_id: "gone" }]);
  assert.deepEqual(turns.childrenOf(all, ""), ["x"]);
  assert.equal(ids(turns.pathTo(all, "x")), "x");
});

test("the newest leaf is the last child of the last child", () => {
  assert.equal(turns.newestLeaf(tree(), "a"), "c");
  assert.equal(turns.newestLeaf(tree(), "b"), "e");
  assert.equal(turns.newestLeaf(tree(), "e"), "e");
});

test("everything below a turn is counted", () => {
  const all = tree();
  const counts = [...all.values()].map((turn) => turns.countBelow(all, turn));
  assert.deepEqual(counts, [4, 2, 0, 0, 0, 0]);
});

test("a turn that must be there", () => {
  assert.equal(turns.turnOf(tree(), "a").id, "a");
  assert.throws(() => turns.turnOf(tree(), "z"), RangeError);
});

test("a title is the first line, cut between words", () => {
  assert.equal(turns.titleOf("  Hello there\nand more"), "Hello there");
  assert.equal(turns.titleOf("a".repeat(60)), "a".repeat(60));
  assert.equal(turns.titleOf("word ".repeat(20)), `${"word ".repeat(11)}word…`);
  assert.equal(turns.titleOf("a".repeat(61)), `${"a".repeat(60)}…`);
  assert.equal(turns.titleOf(""), "");
});
