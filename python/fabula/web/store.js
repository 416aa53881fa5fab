// What the page knows, in one place, and everything it can do. Views subscribe and draw what they find.
//
//   state.health            as GET /health, null before the first answer; state.online, whether the server answers
//   state.sessions          the list, newest first; state.search, the letters it is looked through for
//   state.session           settings of the open session, null for none or a new one
//   state.turns, state.path Map of every turn by id (as /tree gives it, with children[]), ids from the first to the head
//   state.headId            "" for the empty start
//   state.live              Map of answers in the making by stream id: {streamId, parentId, prompt, selects, answers[]},
//                           each answer {text, blocks, done, result}
//   state.lost              {prompt, text} of an answer that ended with its server before it was written down; null for none
//   state.draft             settings of a session that is not begun yet
//
// Subscribers hear which of these changed, by name; "session" is any change of the settings, "opened" that another session
// (or none) is shown now. Words that are being written are replaced on "opened" only; what happens elsewhere leaves them.
//
// Every verb that makes an answer asks for a stream that goes on in the background; the stream is read here, joined again
// when the connection breaks, and found again after a reload through the session's own events.

import * as api from "./api.js";
import { t } from "./i18n.js";
import { Renderer } from "./render.js";

const BEGIN_WITH = { sampling: {} }; // what new sessions of this page give: nothing, so that the model's own defaults count
const BALANCED = { temperature: 0.7, top_p: 0.9, top_k: 40 }; // or this, where the model recommends nothing

const state = {
  health: null, online: true, needsKey: false, sessions: [], search: "", session: null, turns: new Map(), path: [], headId: "",
  canRedo: false, live: new Map(), lost: null, draft: { ...BEGIN_WITH }, count: null,
};
const subscribers = new Set();
const changed = new Set();
let frame = 0, timer = 0, drawnAt = 0;
const LIVE_MS = 125;

/** Something changed. Words of an answer that grows are drawn eight times a second, anything else with the next frame. */
function touch(...keys) {
  keys.forEach((key) => changed.add(key));
  if (frame) return;
  const rest = LIVE_MS - (performance.now() - drawnAt);
  if (changed.size > 1 || !changed.has("live") || rest <= 0) frame = requestAnimationFrame(flush);
  else timer ||= setTimeout(() => { timer = 0; if (changed.size) frame ||= requestAnimationFrame(flush); }, rest);
}

function flush() {
  frame = 0;
  drawnAt = performance.now();
  const keys = new Set(changed);
  changed.clear();
  for (const subscriber of subscribers) subscriber(state, keys);
}

/** Calls fn(state, keys that changed), once a frame at most. Returns a function that ends it. */
function subscribe(fn) {
  subscribers.add(fn);
  return () => subscribers.delete(fn);
}

const renderer = new Renderer((texts) => api.post("/render", { texts }));
let onError = () => {};
let onNotice = () => {};

function fail(error) {
  if (error instanceof DOMException && error.name === "AbortError") return;
  if (error instanceof api.ApiError && error.status === 401) {
    state.needsKey = true;
    touch("key");
  } else onError(error instanceof api.ApiError ? error : new Error(t("offline")));
}

const guarded = (work) => async (...args) => {
  try {
    return await work(...args);
  } catch (error) {
    fail(error);
    return undefined;
  }
};

// ---- The server -----------------------------------------------------------------------------------------------------

async function watchHealth() {
  for (;;) {
    try {
      const before = JSON.stringify(state.health), was = state.online;
      state.health = await api.health();
      state.online = true;
      if (!was || before !== JSON.stringify(state.health)) touch("health");
      if (!was && state.session) await reload();
      if (!was) await list();
    } catch {
      if (state.online) { state.online = false; touch("health"); }
    }
    const quick = !state.online || !state.health.ready;
    await new Promise((resolve) => setTimeout(resolve, quick ? 700 : 15000));
  }
}

const list = guarded(async () => {
  state.sessions = (await api.get(`/sessions?limit=500&search=${encodeURIComponent(state.search)}`)).sessions;
  state.needsKey = false;
  touch("sessions", "key");
});

// ---- The open session -----------------------------------------------------------------------------------------------

let following = null; // AbortController of the open session's events
let visit = 0; // counts sessions that were opened; what was begun for an older one must not touch the page
let reading = new Set(); // streams that are read for this visit

function clear() {
  following?.abort();
  following = null;
  visit++;
  reading = new Set();
  Object.assign(state, { session: null, turns: new Map(), path: [], headId: "", canRedo: false, live: new Map(), lost: null, count: null });
  touch("session", "opened", "tree", "live");
}

const open = guarded(async (id) => {
  if (state.session?.session_id === id) return;
  clear();
  if (!id) return;
  const mine = visit, session = await api.get(`/sessions/${id}`);
  if (mine !== visit) return;
  state.session = session;
  touch("opened");
  await reload();
  if (mine !== visit) return;
  follow(id);
  if (!state.sessions.some((one) => one.session_id === id)) list();
});

async function reload() {
  const id = state.session?.session_id;
  if (!id) return;
  const [session, tree] = await Promise.all([api.get(`/sessions/${id}`), api.get(`/sessions/${id}/tree`)]);
  if (state.session?.session_id !== id) return;
  state.session = session;
  state.turns = new Map(tree.turns.map((turn) => [turn.id, { ...turn, children: [] }]));
  for (const turn of state.turns.values()) state.turns.get(turn.parent_id)?.children.push(turn.id);
  state.canRedo = tree.can_redo;
  setHead(tree.head_id);
  touch("session", "tree");
}

function setHead(id) {
  state.headId = id;
  state.path = [];
  for (let turn = state.turns.get(id); turn; turn = state.turns.get(turn.parent_id)) state.path.unshift(turn.id);
  touch("tree");
}

/** The turns that stand beside one: with the same parent. */
function siblings(turn) {
  const parent = state.turns.get(turn.parent_id);
  if (parent) return parent.children;
  return [...state.turns.values()].filter((other) => !state.turns.has(other.parent_id)).map((other) => other.id);
}

/** Follows what happens to the session, also on other pages, for as long as it is open. */
async function follow(id) {
  const control = new AbortController();
  following = control;
  let again = false;
  for (let wait = 300; !control.signal.aborted; wait = Math.min(wait * 2, 5000)) {
    try {
      for await (const { event, data } of api.events("GET", `/sessions/${id}/events`, undefined, control.signal)) {
        wait = 300;
        if (state.session?.session_id !== id) return;
        if (event === "state") {
          data.streams.forEach((start) => join(start, -1));
          if (again || data.head_id !== state.headId) await reload();
          again = true;
        } else if (event === "begun") join(data, -1);
        else if (event === "ended") { if (!state.live.has(data.stream_id)) await reload(); }
        else if (event === "deleted") { onNotice(t("deletedElsewhere")); location.hash = "#/"; return; }
        else if (event === "head" && state.turns.has(data.head_id)) setHead(data.head_id);
        else await reload();
      }
    } catch (error) {
      if (control.signal.aborted || (error instanceof api.ApiError && error.status === 404)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

// ---- Answers --------------------------------------------------------------------------------------------------------

function liveOf(start) {
  const n = start.n || 1;
  const answers = Array.from({ length: n }, () => ({ text: start.begun_text || "", blocks: [], done: false, result: null, begunAt: performance.now(), nTokens: 0 }));
  return { streamId: start.stream_id, parentId: start.parent_id, prompt: start.prompt, selects: start.selects, answers, last: -1, broken: false, before: new Set(state.turns.keys()) };
}

/** Reads an answer that somebody began, from an event on; one that is not there any more is in the tree by now. */
function join(start, after) {
  if (reading.has(start.stream_id)) return;
  read(() => api.events("GET", `/streams/${start.stream_id}?after=${after}`), start.stream_id)
    .catch((error) => { if (error.status !== 404) fail(error); });
}

/**
 * Reads an answer until it ends or another session is opened; a connection that breaks is made again.
 * Resolves to whether the tree has what was asked for; true also when nobody is here any more to see it.
 */
async function read(connect, streamId = null) {
  let live = null, wait = 300, gone = false, landed = false;
  const mine = visit, begunHere = reading, isHere = () => mine === visit;
  if (streamId) begunHere.add(streamId);
  const take = ({ id, event, data }) => {
    if (event === "start") {
      if (!live) {
        live = liveOf(data);
        begunHere.add(live.streamId);
        state.live.set(live.streamId, live);
      }
    } else if (live) {
      const answer = live.answers[data.index || 0];
      if (event === "token") {
        answer.text += data.text;
        answer.nTokens++;
        renderer.follow(answer, () => touch("live"));
      } else {
        answer.done = true;
        answer.result = data;
        if (event === "error") onError(new Error(data.error.message));
      }
    }
    if (live) live.last = id;
    touch("live");
  };
  try {
    for (;;) {
      try {
        for await (const found of connect()) {
          if (!isHere()) return true;
          take(found);
          wait = 300;
          if (found.event === "start" && !state.session) await begun(found.data.session_id);
        }
        if (!isHere() || !live || live.answers.every((answer) => answer.done)) break;
      } catch (error) {
        if (error instanceof api.ApiError) {
          if (live && error.status === 404) { gone = true; onNotice(t("interrupted")); }
          else if (error.status !== 503 || !live) throw error;
          if (error.status === 404) break;
        } else if (!live) throw error;
      }
      live.broken = true;
      touch("live");
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(wait * 2, 4000);
      if (!isHere()) return true;
      connect = () => api.events("GET", `/streams/${live.streamId}?after=${live.last}`);
    }
  } finally {
    begunHere.delete(streamId);
    if (live && isHere()) {
      await reload().catch(() => {});
      landed = [...state.turns.values()].some((turn) => !live.before.has(turn.id) && turn.parent_id === (live.parentId || ""));
      if (gone && !landed && isHere()) state.lost = { prompt: live.prompt, text: live.answers[0].text };
      state.live.delete(live.streamId);
      begunHere.delete(live.streamId);
      touch("live");
    }
    if (live) list();
  }
  return landed || gone || !isHere();
}

/** A session that was just made by the first message. */
async function begun(id) {
  const mine = visit, session = await api.get(`/sessions/${id}`);
  if (mine !== visit) return;
  state.session = session;
  state.draft = { ...BEGIN_WITH };
  touch("session");
  history.replaceState(null, "", location.hash.startsWith("#/story") ? `#/story/${id}` : `#/chat/${id}`);
  follow(id);
}

const answer = guarded((path, body) => read(() => api.events("POST", path, { ...body, stream: true, background: true })));

/** Sampling settings of a session that is begun here: what was chosen, in place of what it would begin with. */
export function samplingToBegin() {
  const recommended = state.health?.models?.[0]?.sampling_defaults;
  return { ...(recommended?.source === "" ? BALANCED : {}), ...state.draft.sampling };
}

const here = () => ({ session_id: state.session.session_id });
const opening = (text) => (state.session ? here() : { title: titleOf(text), ...state.draft, sampling: samplingToBegin() });
/** A story that outgrows the context goes on without its oldest pieces, unless it was set to stop. */
const telling = (text) => {
  if (!state.session) return { context_policy: "drop_oldest_turns", ...opening(text) };
  return text && !state.session.title ? { ...here(), title: titleOf(text) } : here(); // its notes came before its words
};

/** What a session is called until somebody calls it otherwise: how its first words begin. */
function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 60).replace(/\s+\S*$/, "")}…` : line;
}

// ---- What the page can do -------------------------------------------------------------------------------------------

const verbs = {
  send: (message) => { state.lost = null; return answer("/chat", { ...opening(message), message }); },
  tell: (prompt, sampling = {}) => answer("/story", { ...telling(prompt || ""), ...sampling, ...(prompt ? { prompt } : {}) }),
  /** Puts words into the story, or a note for the model, without an answer. Resolves to whether they are there. */
  write: guarded(async (text, frozen = false) => {
    const mine = visit, isNew = !state.session, { system: _, ...body } = telling(frozen ? "" : text);
    const told = await api.post("/write", { ...body, text, frozen });
    if (mine !== visit) return false;
    if (isNew) await begun(told.session_id);
    await reload();
    if (isNew) list();
    return true;
  }),
  rewrite: guarded(async (turnId, text) => {
    await api.post("/rewrite", { ...here(), turn: turnId, text });
    await reload();
  }),
  regenerate: () => answer("/regenerate", here()),
  continueReply: () => answer("/continue", here()),
  edit: (turnId, message) => answer("/edit", { ...here(), turn: turnId, message }),
  branch: (n, message = null, sampling = {}) => answer("/branch", { ...here(), n, ...sampling, ...(message === null ? {} : { message }) }),
  forkAt: (turnId, position, tokenId) => answer("/fork_at", { ...here(), turn: turnId, position, token_id: tokenId }),
  stop: guarded(() => api.post("/stop", here())),
  rollback: guarded(async (turn) => {
    const told = await api.post("/rollback", { ...here(), target_turn: turn || 0 });
    state.canRedo = true;
    setHead(told.head_id);
  }),
  redo: guarded(async () => {
    const told = await api.post("/redo", here());
    setHead(told.head_id);
    await reload();
  }),
  fork: guarded(async (turnId) => {
    const told = await api.post("/fork", { ...here(), ...(turnId ? { turn: turnId } : {}) });
    await list();
    return told.session_id;
  }),
  tag: guarded(async (turnId, tag, remove = false) => {
    await api.post("/tags", { ...here(), turn: turnId, tag, remove });
    await reload();
  }),
  prune: guarded(async (turnId) => {
    await api.postLast("/rollback", { ...here(), target_turn: turnId || 0, prune: true });
    await reload();
  }),
  alternatives: guarded(async (turnId, position) => (await api.post("/alternatives", { ...here(), turn: turnId, position, n: 8 })).alternatives),
  turnTokens: guarded(async (turnId) => (await api.post("/turn_tokens", { ...here(), turn: turnId })).tokens),
  configure: guarded(async (settings) => {
    if (!state.session) {
      const { sampling = {}, ...rest } = settings;
      const drawn = Object.entries({ ...state.draft.sampling, ...sampling }).filter(([, value]) => value !== null);
      state.draft = { ...state.draft, ...rest, sampling: Object.fromEntries(drawn) };
      touch("session");
      return;
    }
    state.session = await api.patch(`/sessions/${state.session.session_id}`, settings);
    touch("session");
    list();
  }),
  rename: guarded(async (id, title) => {
    await api.patch(`/sessions/${id}`, { title });
    if (state.session?.session_id === id) await reload();
    await list();
  }),
  setTags: guarded(async (id, tags) => {
    await api.patch(`/sessions/${id}`, { tags });
    await list();
  }),
  remove: (id) => api.postLast("/delete_session", { session_id: id }).catch(fail),
  exportSession: guarded((id) => api.get(`/sessions/${id}/export`)),
  importSession: guarded(async (data) => {
    const take = (id) => api.post(`/sessions/import?id=${encodeURIComponent(id)}`, data);
    const told = await take(data.id).catch((error) => { // the server knows which ids are free; the list may be short or old
      if (error.code !== "session_exists") throw error;
      return take(`${data.id.slice(0, 100)}-${Math.random().toString(36).slice(2, 8)}`);
    });
    await list();
    return told.session_id;
  }),
  count: guarded(async (message) => {
    const where = state.session ? here() : {};
    state.count = await api.post("/count", { ...where, message });
    touch("count");
  }),
  search: (text) => { state.search = text; return list(); },
  setKey: (value) => { api.key.set(value); state.needsKey = false; return list(); },
};

export const store = {
  state, subscribe, touch, open, list, clear, siblings, renderer,
  do: verbs,
  start(handlers) {
    onError = handlers.error;
    onNotice = handlers.notice;
    watchHealth();
    return list();
  },
};
