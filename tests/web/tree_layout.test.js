import assert from "node:assert/strict";
import { test } from "node:test";

import * as tree from "../../python/fabula/web/tree_layout.js";

const { HEIGHT, layout, STEP_X, STEP_Y, WIDTH } = tree;
const childrenIn = (table) => (id) => table[id] || [];

/** A tree that is the same each time: each node has up to three children. */
function drawn(n, seed) {
  const table = {};
  let state = seed;
  for (let i = 0; i < n; i++) {
    state = (state * 1103515245 + 12345) % 2147483648;
    const parent = i ? String(state % i) : "";
    (table[parent] ||= []).push(String(i));
  }
  return table;
}

test("the empty start alone", () => {
  assert.deepEqual([...layout(childrenIn({}))], [["", { x: 0, y: 0 }]]);
});

test("a chain goes straight down", () => {
  const positions = layout(childrenIn({ "": ["a"], a: ["b"] }));
  assert.deepEqual(positions.get("b"), { x: 0, y: 2 * STEP_Y });
});

test("children stand in their order, their parent in the middle", () => {
  const positions = layout(childrenIn({ "": ["a"], a: ["b", "c", "d"], b: ["e"] }));
  assert.deepEqual(
    ["b", "c", "d"].map((id) => positions.get(id).x),
    [0, STEP_X, 2 * STEP_X],
  );
  assert.equal(positions.get("a").x, STEP_X);
  assert.equal(positions.get("e").x, positions.get("b").x);
});

test("no two nodes overlap and every parent comes before its children", () => {
  for (let seed = 1; seed <= 20; seed++) {
    const table = drawn(60, seed);
    const positions = layout(childrenIn(table));
    assert.equal(positions.size, 61);
    const order = [...positions.keys()];
    for (const [parent, children] of Object.entries(table)) {
      for (const child of children) {
        assert.ok(order.indexOf(parent) < order.indexOf(child));
        assert.equal(positions.get(child).y, positions.get(parent).y + STEP_Y);
      }
    }
    const rows = new Map();
    for (const { x, y } of positions.values()) rows.set(y, [...(rows.get(y) || []), x]);
    for (const row of rows.values()) {
      const xs = row.sort((a, b) => a - b);
      for (let i = 1; i < xs.length; i++) assert.ok(xs[i] - xs[i - 1] >= WIDTH, `seed ${seed}`);
    }
  }
});

test("a chat of a hundred thousand turns is no problem of depth", () => {
  const positions = layout((id) => (Number(id) < 100_000 ? [String(Number(id) + 1)] : []));
  assert.equal(positions.get("100000").y, 100_000 * STEP_Y);
});

test("children are asked for once a node", () => {
  let n = 0;
  const table = drawn(100, 7);
  layout((id) => {
    n += 1;
    return table[id] || [];
  });
  assert.equal(n, 101);
});

// ---- The view ----

const onScreen = (view, { x, y }) => ({ x: x * view.scale + view.x, y: y * view.scale + view.y });

test("zooming keeps the point under the pointer", () => {
  const view = { x: 10, y: -20, scale: 0.5 };
  const point = { x: (300 - view.x) / view.scale, y: (200 - view.y) / view.scale };
  for (const factor of [1.25, 0.8, 100, 0.0001]) {
    const { x, y } = onScreen(tree.zoomed(view, factor, 300, 200), point);
    assert.ok(Math.abs(x - 300) < 1e-9 && Math.abs(y - 200) < 1e-9);
  }
});

test("zooming ends at a scale", () => {
  assert.equal(tree.zoomed({ x: 0, y: 0, scale: 1 }, 1e9, 0, 0).scale, 2);
  assert.equal(tree.zoomed({ x: 0, y: 0, scale: 1 }, 1e-9, 0, 0).scale, 0.06);
});

test("fitted shows every node, and blows up none", () => {
  const screen = { width: 800, height: 500 };
  for (const n of [1, 5, 200]) {
    const points = [...layout(childrenIn(drawn(n, 3))).values()];
    const view = tree.fitted(points, screen);
    assert.ok(view.scale > 0 && view.scale <= 1.1);
    for (const point of points) {
      const { x, y } = onScreen(view, point);
      const half = (WIDTH / 2) * view.scale;
      assert.ok(x - half >= 0 && x + half <= screen.width);
      assert.ok(y >= 0 && y + HEIGHT * view.scale <= screen.height);
    }
  }
});

test("fitted takes a hundred thousand nodes", () => {
  const points = Array.from({ length: 100_000 }, (_, i) => ({ x: i, y: 0 }));
  assert.ok(tree.fitted(points, { width: 800, height: 500 }).scale > 0);
});

test("revealed moves a node that is out of sight, and no other", () => {
  const screen = { width: 800, height: 500 };
  const view = { x: 400, y: 20, scale: 1 };
  assert.deepEqual(tree.revealed(view, { x: 0, y: 100 }, screen), view);
  for (const point of [
    { x: 5000, y: 100 },
    { x: -5000, y: 100 },
    { x: 0, y: 9000 },
    { x: 0, y: -50 },
  ]) {
    const { x, y } = onScreen(tree.revealed(view, point, screen), point);
    assert.ok(x >= 80 && x <= 720 && y >= 30 && y <= 410);
  }
});

test("a short text is one line", () => {
  assert.equal(tree.short("  a\n b\t", 5), "a b");
  assert.equal(tree.short("abcdef", 6), "abcdef");
  assert.equal(tree.short("abcdefg", 6), "abcde…");
});
