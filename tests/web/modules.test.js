// The modules as a graph: no circle, nothing unused, and everything the page needs first is
// preloaded.

import assert from "node:assert/strict";
import { test } from "node:test";

import "./browser.js";
import { importsOf, MODULES, source, staticImportsOf, WEB } from "./sources.js";

/** Everything that is reached from a module. */
function reached(start, next) {
  const found = new Set([start]);
  for (const name of found) next(name).forEach((one) => found.add(one));
  return [...found];
}

/** A path from a module back to itself; null if there is none. */
function circle(start) {
  const stack = importsOf(start).map((name) => [start, name]);
  const seen = new Set();
  for (let path = stack.pop(); path; path = stack.pop()) {
    const last = path.at(-1);
    if (last === start) return path;
    if (seen.has(last)) continue;
    seen.add(last);
    for (const name of importsOf(last)) stack.push([...path, name]);
  }
  return null;
}

test("no module imports itself by way of others, not even for a type", () => {
  const circles = MODULES.map(circle).filter(Boolean);
  assert.deepEqual(circles, []);
});

test("imports are found", () => {
  assert.ok(importsOf("app.js").includes("tree.js"));
  assert.ok(!staticImportsOf("app.js").includes("tree.js"));
  assert.deepEqual(staticImportsOf("i18n.js"), ["words_en.js", "words_zh.js"]);
});

test("no module imports app.js", () => {
  const importers = MODULES.filter((name) => importsOf(name).includes("app.js"));
  assert.deepEqual(importers, []);
});

test("every module is reached from app.js", () => {
  assert.deepEqual(reached("app.js", importsOf).sort(), [...MODULES].sort());
});

test("the page preloads what app.js loads at once, and no more", () => {
  const html = source("index.html");
  const preloaded = [...html.matchAll(/rel="modulepreload" href="\/static\/([^"]+)"/g)];
  const wanted = reached("app.js", staticImportsOf);
  assert.deepEqual(preloaded.map((match) => match[1]).sort(), wanted.sort());
});

test("every module but app.js can be imported without a document", async () => {
  for (const name of MODULES.filter((name) => name !== "app.js")) {
    await import(new URL(name, WEB).href);
  }
});

test("every module says what it is for", () => {
  for (const name of MODULES) assert.match(source(name), /^\/\/ \S/, name);
});
