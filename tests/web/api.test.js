import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import "./browser.js";
import * as api from "../../python/fabula/web/api.js";

const { EventParser, parseEvent } = api;

let requests = [];

/** Lets the next requests be answered with this response. */
function answer(make) {
  globalThis.fetch = async (path, options = {}) => {
    requests.push({ path, ...options });
    return make();
  };
}

const json =
  (value, status = 200) =>
  () =>
    new Response(JSON.stringify(value), { status });

/** A body that comes in these pieces; an Error among them breaks the connection. */
const pieces = (parts) => () => {
  const left = [...parts];
  const pull = (controller) => {
    const next = left.shift();
    if (next === undefined) controller.close();
    else if (next instanceof Error) controller.error(next);
    else controller.enqueue(typeof next === "string" ? new TextEncoder().encode(next) : next);
  };
  return new Response(new ReadableStream({ pull }));
};

async function collect(events) {
  const found = [];
  for await (const event of events) found.push(event);
  return found;
}

beforeEach(() => {
  requests = [];
  localStorage.clear();
});

test("a body is sent as JSON and the reply is read as JSON", async () => {
  answer(json({ a: 1 }));
  assert.deepEqual(await api.post("/x", { b: "é" }), { a: 1 });
  const [{ method, path, headers, body }] = requests;
  assert.deepEqual([method, path, body], ["POST", "/x", '{"b":"é"}']);
  assert.deepEqual(headers, { "Content-Type": "application/json" });
});

test("GET sends no body", async () => {
  answer(json([]));
  await api.get("/x");
  assert.equal(requests[0].body, undefined);
  assert.deepEqual(requests[0].headers, {});
});

test("the key is sent with each request, until it is removed", async () => {
  answer(json({}));
  api.key.set("k");
  await api.patch("/x", {});
  api.key.set("");
  await api.get("/x");
  assert.deepEqual(
    requests.map(({ headers }) => headers.Authorization),
    ["Bearer k", undefined],
  );
});

test("what must arrive while the page closes is kept alive", async () => {
  answer(json({}));
  await api.postLast("/x", {});
  assert.equal(requests[0].keepalive, true);
});

test("an error of the server has its status, code and message", async () => {
  answer(json({ error: { message: "no such turn", code: "not_found" } }, 404));
  await assert.rejects(api.get("/x"), (error) => {
    assert.ok(error instanceof api.ApiError);
    assert.deepEqual([error.status, error.code, error.message], [404, "not_found", "no such turn"]);
    return true;
  });
});

for (const [what, make] of [
  ["is not JSON", () => new Response("<html>", { status: 502 })],
  ["is empty", () => new Response("", { status: 502 })],
  ["is JSON of another shape", json([], 502)],
  ["has an error without a message", json({ error: {} }, 502)],
  ["is null", json(null, 502)],
]) {
  test(`an error whose body ${what} is told by its status`, async () => {
    answer(make);
    const wanted = { name: "Error", message: "HTTP 502", status: 502, code: "" };
    await assert.rejects(api.get("/x"), wanted);
  });
}

test("a server that cannot be reached is not an ApiError", async () => {
  answer(() => Promise.reject(new TypeError("fetch failed")));
  await assert.rejects(api.get("/x"), (error) => !(error instanceof api.ApiError));
});

test("health is read from a server that is not ready", async () => {
  answer(json({ ready: false }, 503));
  assert.deepEqual(await api.health(), { ready: false });
});

// ---- Events ----

test("an event has its id, its name and its data", () => {
  const event = parseEvent('id: 7\nevent: token\ndata: {"text": "a\\nb"}');
  assert.deepEqual(event, { id: 7, event: "token", data: { text: "a\nb" } });
  assert.deepEqual(parseEvent("data: 1"), { id: -1, event: "message", data: 1 });
  assert.equal(parseEvent(": keep-alive"), null);
});

test("events are complete wherever the network cuts", () => {
  const text =
    'id: 0\nevent: a\ndata: {"x": "1\\n\\n2"}\n\n: alive\n\nid: 1\nevent: b\ndata: {}\n\n';
  const wanted = new EventParser().push(text);
  assert.deepEqual(
    wanted.map(({ event }) => event),
    ["a", "b"],
  );
  for (let cut = 0; cut <= text.length; cut++) {
    const parser = new EventParser();
    assert.deepEqual([...parser.push(text.slice(0, cut)), ...parser.push(text.slice(cut))], wanted);
  }
});

test("a stream is read to its end, letters of several bytes included", async () => {
  const bytes = new TextEncoder().encode('event: token\ndata: {"text": "鲸"}\n\n');
  const cut = bytes.length - 7; // inside the letter
  answer(pieces([bytes.slice(0, cut), bytes.slice(cut), "event: done\ndata: {}\n"]));
  const found = await collect(api.events("POST", "/chat", {}));
  assert.deepEqual(found, [{ id: -1, event: "token", data: { text: "鲸" } }]);
});

test("a connection that breaks throws after the events that came", async () => {
  answer(pieces(["event: a\ndata: 1\n\n", new TypeError("network")]));
  const found = [];
  await assert.rejects(async () => {
    for await (const { event } of api.events("GET", "/x")) found.push(event);
  }, TypeError);
  assert.deepEqual(found, ["a"]);
});

test("leaving a stream closes the connection", async () => {
  let isClosed = false;
  const cancel = () => void (isClosed = true);
  const start = (controller) => controller.enqueue(new TextEncoder().encode("data: 1\n\n"));
  answer(() => new Response(new ReadableStream({ start, cancel })));
  for await (const { data } of api.events("GET", "/x")) {
    assert.equal(data, 1);
    break;
  }
  await new Promise((resolve) => setTimeout(resolve, 0));
  assert.ok(isClosed);
});
