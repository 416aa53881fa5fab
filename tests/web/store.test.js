// The store against a server that is played by this file: what a reply, a lost connection or
// another page's change does to the state.

import assert from "node:assert/strict";
import { after, beforeEach, test } from "node:test";

import { until } from "./browser.js";
import { handlers } from "../../python/fabula/web/state.js";
import { checkHealth, store } from "../../python/fabula/web/store.js";

const { state } = store;

/** The server: a session with turns, and streams that are open. */
let server;
let errors;
let notices;

class FakeStream {
  constructor() {
    this.response = new Response(new ReadableStream({ start: (to) => void (this.to = to) }));
  }

  send(event, data, id = 0) {
    const text = `id: ${id}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n`;
    this.to.enqueue(new TextEncoder().encode(text));
  }

  end = () => this.to.close();
  break = () => this.to.error(new TypeError("network"));
}

const json = (value, status = 200) => new Response(JSON.stringify(value), { status });
const refusal = (status, code = "no") =>
  json({ error: { message: `refused: ${code}`, code } }, status);
const settings = (id) => ({ session_id: id, title: "T", tags: [], system: null, sampling: {} });

class FakeServer {
  requests = [];
  turns = [];
  head = "";
  streams = [];
  feeds = [];
  /** Replies in place of the usual ones, by "METHOD /path". */
  replies = {};

  fetch = async (path, { method = "GET", body, signal } = {}) => {
    const [route, query = ""] = path.split("?");
    this.requests.push({ route, query, method, body: body && JSON.parse(body) });
    const own = this.replies[`${method} ${route}`];
    if (own) return own(this.requests.at(-1));
    if (route === "/sessions") return json({ sessions: [{ ...settings("s"), n_turns: 1 }] });
    if (route.endsWith("/tree"))
      return json({ head_id: this.head, can_redo: false, turns: this.turns });
    if (route.endsWith("/events")) return this.#open(this.feeds, signal);
    if (/^\/sessions\/[^/]+$/.test(route)) return json(settings(route.split("/")[2]));
    if (route === "/render")
      return json({ rendered: body.texts?.map(() => ({ blocks: [], last_line: 0 })) });
    if (route === "/chat" || route.startsWith("/streams/")) return this.#open(this.streams, signal);
    return json({ head_id: this.head, session_id: "s" });
  };

  #open(list, signal) {
    const stream = new FakeStream();
    list.push(stream);
    signal?.addEventListener("abort", () => stream.to.error(signal.reason));
    return stream.response;
  }

  /** Adds a turn and makes it the head. */
  add(id, parent_id = this.head, more = {}) {
    this.turns.push({ id, parent_id, prompt: "p", text: "t", tags: [], ...more });
    this.head = id;
  }

  asked = (route) => this.requests.filter((one) => one.route === route);
}

const start = (more = {}) => ({
  ...{ session_id: "s", stream_id: "r", parent_id: server.head, prompt: "hi", selects: true },
  ...more,
});

/** Opens the session "s" and waits until the store follows it. */
async function open() {
  await store.open("s");
  await until(() => server.feeds.length === 1, "the feed");
  server.feeds[0].send("state", { head_id: server.head, streams: [] });
}

after(() => store.clear()); // it would follow the last session for ever

beforeEach(() => {
  store.clear();
  server = new FakeServer();
  globalThis.fetch = server.fetch;
  globalThis.location.hash = "#/";
  errors = [];
  notices = [];
  handlers.error = (error) => errors.push(error.message);
  handlers.notice = (text) => notices.push(text);
  Object.assign(state, { needsKey: false, online: true });
});

test("opening a session loads its tree and the path to its head", async () => {
  server.add("a");
  server.add("b");
  server.add("c", "a");
  await open();
  assert.deepEqual(state.path, ["a", "c"]);
  assert.deepEqual(state.turns.get("a").children, ["b", "c"]);
  assert.equal(state.session.session_id, "s");
});

test("the session that was asked for last is the one that is shown", async () => {
  let release;
  const gate = new Promise((resolve) => (release = resolve));
  server.replies["GET /sessions/slow"] = () => gate.then(() => json(settings("slow")));
  const slow = store.open("slow");
  await store.open("s");
  release();
  await slow;
  assert.equal(state.session.session_id, "s");
});

test("a first message creates a session and shows its reply as it grows", async () => {
  const sent = store.do.send("Hello there");
  await until(() => server.streams.length === 1, "the stream");
  const [{ body }] = server.asked("/chat");
  assert.equal(body.title, "Hello there");
  assert.deepEqual(body.sampling, {});
  assert.ok(body.stream && body.background && !("session_id" in body));
  const [stream] = server.streams;
  stream.send("start", start());
  stream.send("token", { text: "Hi" }, 1);
  stream.send("token", { text: "!" }, 2);
  await until(() => state.live.get("r")?.replies[0].text === "Hi!", "the text");
  assert.equal(location.hash, "#/chat/s");
  server.add("a");
  stream.send("done", { turn_id: "a", finish_reason: "stop" }, 3);
  stream.end();
  assert.equal(await sent, true);
  assert.equal(state.live.size, 0);
  assert.deepEqual(state.path, ["a"]);
});

test("a message that is refused is reported and resolves to undefined", async () => {
  server.replies["POST /chat"] = () => refusal(400, "too_long");
  assert.equal(await store.do.send("x"), undefined);
  assert.deepEqual(errors, ["refused: too_long"]);
});

test("a server that cannot be reached is reported in the page's words", async () => {
  server.replies["POST /chat"] = () => Promise.reject(new TypeError("fetch failed"));
  assert.equal(await store.do.send("x"), undefined);
  assert.match(errors[0], /does not answer/);
});

test("a reply that was stopped before its first token leaves nothing", async () => {
  server.add("a");
  await open();
  const sent = store.do.send("x");
  await until(() => server.streams.length === 1, "the stream");
  server.streams[0].send("start", start());
  server.streams[0].send("done", { turn_id: null, finish_reason: "cancelled" }, 1);
  server.streams[0].end();
  assert.equal(await sent, false);
  assert.deepEqual(state.path, ["a"]);
});

test("an error in a stream is reported", async () => {
  await open();
  const sent = store.do.send("x");
  await until(() => server.streams.length === 1, "the stream");
  server.streams[0].send("start", start());
  server.streams[0].send("error", { error: { message: "out of memory" } }, 1);
  server.streams[0].end();
  assert.equal(await sent, false);
  assert.deepEqual(errors, ["out of memory"]);
});

test("a connection that breaks is made again where it was, and says so only meanwhile", async () => {
  await open();
  const sent = store.do.send("x");
  await until(() => server.streams.length === 1, "the stream");
  server.streams[0].send("start", start());
  server.streams[0].send("token", { text: "a" }, 1);
  await until(() => state.live.get("r")?.replies[0].text === "a", "the text");
  server.streams[0].break();
  await until(() => state.live.get("r").broken, "the break");
  await until(() => server.streams.length === 2, "the second connection");
  assert.equal(server.asked("/streams/r")[0].query, "after=1");
  server.streams[1].send("token", { text: "b" }, 2);
  await until(() => state.live.get("r").replies[0].text === "ab", "the rest");
  assert.equal(state.live.get("r").broken, false);
  server.add("a");
  server.streams[1].send("done", { turn_id: "a" }, 3);
  server.streams[1].end();
  assert.equal(await sent, true);
});

test("a reply that the server lost is kept, with its message", async () => {
  server.add("a");
  await open();
  const sent = store.do.send("x");
  await until(() => server.streams.length === 1, "the stream");
  server.streams[0].send("start", start());
  server.streams[0].send("token", { text: "half" }, 1);
  await until(() => state.live.get("r")?.replies[0].text === "half", "the text");
  server.replies["GET /streams/r"] = () => refusal(404);
  server.streams[0].break();
  assert.equal(await sent, true, "the message is not lost: it need not go back to the composer");
  assert.deepEqual(state.lost, { prompt: "hi", text: "half" });
  assert.equal(notices.length, 1);
});

test("a reply goes on when another session is opened, and changes nothing there", async () => {
  await open();
  const sent = store.do.send("x");
  await until(() => server.streams.length === 1, "the stream");
  server.streams[0].send("start", start());
  await until(() => state.live.size === 1, "the reply");
  store.clear();
  server.streams[0].send("token", { text: "late" }, 1);
  assert.equal(await sent, true);
  assert.equal(state.live.size, 0);
  assert.equal(state.session, null);
});

test("401 asks for a key, and a key that is accepted ends that", async () => {
  server.replies["GET /sessions"] = () => refusal(401);
  await store.list();
  assert.equal(state.needsKey, true);
  assert.deepEqual(errors, []);
  delete server.replies["GET /sessions"];
  await store.do.setKey("k");
  assert.equal(state.needsKey, false);
  assert.equal(state.sessions.length, 1);
});

test("a server that is back has its session and its list loaded again", async () => {
  await open();
  server.replies["GET /health"] = () => Promise.reject(new TypeError("fetch failed"));
  await checkHealth();
  assert.equal(state.online, false);
  server.add("a"); // meanwhile
  const health = { ready: true, version: "1", models: [] };
  server.replies["GET /health"] = () => json(health);
  await checkHealth();
  assert.deepEqual([state.online, state.health, state.headId], [true, health, "a"]);
  const n = server.requests.length;
  await checkHealth();
  assert.equal(server.requests.length, n + 1, "nothing is loaded again while it stays");
});

// ---- What happens on other pages ----

test("a head that moved elsewhere moves here, without loading the tree again", async () => {
  server.add("a");
  server.add("b");
  await open();
  const n = server.asked("/sessions/s/tree").length;
  server.feeds[0].send("head", { head_id: "a", can_redo: true });
  await until(() => state.headId === "a", "the head");
  assert.deepEqual(state.path, ["a"]);
  assert.equal(state.canRedo, true);
  assert.equal(server.asked("/sessions/s/tree").length, n);
});

test("a tree from before a move is asked for again", async () => {
  server.add("a");
  server.add("b");
  await open();
  const turns = server.turns;
  const replies = [
    { head_id: "b", can_redo: false, turns },
    { head_id: "a", can_redo: true, turns },
  ];
  let release;
  const held = new Promise((resolve) => (release = resolve));
  server.replies["GET /sessions/s/tree"] = async () => {
    const reply = replies.shift();
    if (reply.head_id === "b") await held;
    return json(reply);
  };
  server.feeds[0].send("tags", { head_id: "b", can_redo: false });
  await until(() => replies.length === 1, "the first tree");
  server.head = "a";
  await store.do.rollback("a");
  release();
  await until(() => replies.length === 0, "the second tree");
  await until(() => state.canRedo && state.headId === "a", "the head where it was moved to");
});

test("a reply that began elsewhere is read here", async () => {
  server.add("a");
  await open();
  server.feeds[0].send("begun", start({ stream_id: "other" }));
  await until(() => server.streams.length === 1, "the stream");
  assert.equal(server.asked("/streams/other")[0].query, "after=-1");
  server.streams[0].send("start", start({ stream_id: "other" }));
  await until(() => state.live.has("other"), "the reply");
  server.feeds[0].send("begun", start({ stream_id: "other" }));
  server.add("b");
  server.streams[0].send("done", { turn_id: "b" }, 1);
  server.streams[0].end();
  await until(() => state.path.join() === "a,b", "the turn");
  assert.equal(server.streams.length, 1, "it is read once");
});

test("a session that was deleted elsewhere is left", async () => {
  await open();
  location.hash = "#/chat/s";
  server.feeds[0].send("deleted", {});
  await until(() => location.hash === "#/", "the address");
  assert.equal(notices.length, 1);
});

test("after a feed that broke the tree is loaded again", async () => {
  await open();
  server.feeds[0].break();
  await until(() => server.feeds.length === 2, "the second feed");
  server.add("a"); // meanwhile
  server.feeds[1].send("state", { head_id: "a", streams: [] });
  await until(() => state.headId === "a", "the tree");
});

// ---- Verbs ----

test("stop stops the session, and a first reply before its session is loaded", async () => {
  server.replies["GET /sessions/s"] = () => new Promise(() => {});
  store.do.send("x");
  await until(() => server.streams.length === 1, "the stream");
  server.streams[0].send("start", start());
  await until(() => state.live.size === 1, "the reply");
  await store.do.stop();
  assert.deepEqual(server.asked("/stop")[0].body, { stream_id: "r" });
  store.clear();
  delete server.replies["GET /sessions/s"];
  await open();
  await store.do.stop();
  assert.deepEqual(server.asked("/stop")[1].body, { session_id: "s" });
  assert.deepEqual(errors, []);
});

test("rolling back moves the head and can be redone", async () => {
  server.add("a");
  server.add("b");
  await open();
  server.head = "a";
  await store.do.rollback("a");
  assert.deepEqual([state.path, state.canRedo], [["a"], true]);
  server.head = "";
  await store.do.rollback("");
  assert.deepEqual(server.asked("/rollback").at(-1).body, { session_id: "s", target_turn: 0 });
});

test("an imported session gets another id if its own is taken", async () => {
  const replies = [refusal(409, "session_exists"), json({ session_id: "a-1" }, 201)];
  server.replies["POST /sessions/import"] = () => replies.shift();
  assert.equal(await store.do.importSession({ id: "a", turns: [] }), "a-1");
  const ids = server.asked("/sessions/import").map(({ query }) => query);
  assert.equal(ids[0], "id=a");
  assert.match(ids[1], /^id=a-[a-z0-9]+$/);
});

test("an import that is refused for another reason is not tried again", async () => {
  server.replies["POST /sessions/import"] = () => refusal(400, "bad");
  assert.equal(await store.do.importSession({ id: "a", turns: [] }), undefined);
  assert.equal(server.asked("/sessions/import").length, 1);
  assert.deepEqual(errors, ["refused: bad"]);
});

test("text that begins a story has no system prompt and drops its oldest pieces", async () => {
  await store.do.configure({ system: "You are a pirate." });
  assert.equal(await store.do.write("Once.", false), true);
  const { body } = server.asked("/write")[0];
  assert.equal(body.system, undefined);
  assert.deepEqual([body.title, body.context_policy], ["Once.", "drop_oldest_turns"]);
});

// ---- Subscribers ----

test("subscribers are notified once a frame, with everything that changed", async () => {
  await new Promise((resolve) => setTimeout(resolve, 150)); // what earlier tests changed
  const seen = [];
  const unsubscribe = store.subscribe((_, changed) => seen.push([...changed].sort().join()));
  store.touch("tree");
  store.touch("session", "tree");
  await until(() => seen.length === 1, "the frame");
  unsubscribe();
  store.touch("tree");
  await new Promise((resolve) => setTimeout(resolve, 150));
  assert.deepEqual(seen, ["session,tree"]);
});

test("text that grows is drawn eight times a second at most", async () => {
  await new Promise((resolve) => setTimeout(resolve, 150));
  let n = 0;
  const unsubscribe = store.subscribe(() => n++);
  const end = performance.now() + 300;
  while (performance.now() < end) {
    store.touch("live");
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  unsubscribe();
  assert.ok(n >= 1 && n <= 4, `${n} times`);
});
