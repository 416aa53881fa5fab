// The open session: loads it, follows its events, and reads the streams of replies into the state.
//
// A reply is generated in the background on the server. Its stream is read here, joined again when
// the connection breaks, and found again after a reload through the session's own events.

import * as api from "./api.js";
import { t } from "./i18n.js";
import { applyEvent, hasLanded, isOver, liveOf } from "./live.js";
import { Renderer } from "./renderer.js";
import { fail, forgetSession, guarded, handlers, newDraft, state, touch } from "./state.js";
import { pathTo, turnsById } from "./turns.js";

/**
 * @import { Live, Rendered, Session, SessionEvent, SessionSummary, StreamEvent, StreamStart, TreeReply } from "./types.js"
 */

/** @param {number} ms */
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export const renderer = new Renderer(
  (texts) => /** @type {Promise<{rendered: Rendered[]}>} */ (api.post("/render", { texts })),
);

/** @type {AbortController | null} */
let following = null; // ends the connection for the open session's events
let visit = 0; // counts opened sessions
/** @type {Set<string>} */
let reading = new Set(); // ids of the streams that are read in this visit

/** Returns a function that tells whether the session that is open now is still open. */
export function visitor() {
  const mine = visit;
  return () => mine === visit;
}

export const list = guarded(async () => {
  const path = `/sessions?limit=500&search=${encodeURIComponent(state.search)}`;
  /** @type {{sessions: SessionSummary[]}} */
  const reply = await api.get(path);
  state.sessions = reply.sessions;
  state.needsKey = false;
  touch("sessions", "key");
});

/** Closes the open session: the page shows a new one. */
export function clear() {
  following?.abort();
  following = null;
  visit++;
  reading = new Set();
  forgetSession();
  touch("session", "opened", "tree", "live");
}

/** Opens a session; "" closes the open one. */
export const open = guarded(async (/** @type {string} */ id) => {
  if (state.session?.session_id === id) return;
  clear();
  if (!id) return;
  const isHere = visitor();
  /** @type {Session} */
  const session = await api.get(`/sessions/${id}`);
  if (!isHere()) return;
  state.session = session;
  touch("opened");
  await reload();
  if (!isHere()) return;
  follow(id);
  if (!state.sessions.some((one) => one.session_id === id)) list();
});

/** How often the head was moved. What was asked for before a move is out of date after it. */
let nMoves = 0;

/** Loads the settings and the tree of the open session again. */
export async function reload() {
  const id = state.session?.session_id;
  if (!id) return;
  for (;;) {
    const asked = nMoves;
    const [session, tree] = await Promise.all([
      /** @type {Promise<Session>} */ (api.get(`/sessions/${id}`)),
      /** @type {Promise<TreeReply>} */ (api.get(`/sessions/${id}/tree`)),
    ]);
    if (state.session?.session_id !== id) return;
    if (asked !== nMoves) continue;
    state.session = session;
    state.turns = turnsById(tree.turns);
    state.canRedo = tree.can_redo;
    showHead(tree.head_id);
    touch("session", "tree");
    return;
  }
}

/**
 * The head was moved: here, or on another page.
 * @param {string} id
 */
export function setHead(id) {
  nMoves++;
  showHead(id);
}

/** @param {string} id */
function showHead(id) {
  state.headId = id;
  state.path = pathTo(state.turns, id).map((turn) => turn.id);
  touch("tree");
}

/**
 * Shows a session that the first message just created.
 * @param {string} id
 */
export async function showCreated(id) {
  const isHere = visitor();
  /** @type {Session} */
  const session = await api.get(`/sessions/${id}`);
  if (!isHere()) return;
  state.session = session;
  state.draft = newDraft();
  touch("session");
  const view = location.hash.startsWith("#/story") ? "story" : "chat";
  history.replaceState(null, "", `#/${view}/${id}`);
  follow(id);
}

// ---- Events of the session ----------------------------------------------------------------------

/**
 * Follows what happens to the session, on other pages too, for as long as it is open.
 * @param {string} id
 */
async function follow(id) {
  const control = new AbortController();
  following = control;
  let isAgain = false;
  for (let wait = 300; !control.signal.aborted; wait = Math.min(wait * 2, 5000)) {
    try {
      /** @type {AsyncGenerator<SessionEvent>} */
      const events = api.events("GET", `/sessions/${id}/events`, undefined, control.signal);
      for await (const event of events) {
        wait = 300;
        if (state.session?.session_id !== id) return;
        if (event.event === "deleted") {
          handlers.notice(t("deletedElsewhere"));
          location.hash = "#/";
          return;
        }
        await onSessionEvent(event, isAgain);
        isAgain = true;
      }
    } catch (error) {
      if (control.signal.aborted || (error instanceof api.ApiError && error.status === 404)) return;
    }
    await pause(wait);
  }
}

/**
 * @param {SessionEvent} event
 * @param {boolean} isAgain Whether the connection was made again: events in between are missing.
 */
async function onSessionEvent({ event, data }, isAgain) {
  if (event === "state") {
    data.streams.forEach(join);
    if (isAgain || data.head_id !== state.headId) await reload();
  } else if (event === "begun") join(data);
  else if (event === "ended") {
    if (!state.live.has(data.stream_id)) await reload();
  } else if (event === "head" && state.turns.has(data.head_id)) {
    state.canRedo = data.can_redo;
    setHead(data.head_id);
  } else await reload();
}

// ---- Streams of replies -------------------------------------------------------------------------

/**
 * Reads a reply that another page began. A stream that is gone by now has its turn in the tree.
 * @param {StreamStart} start
 */
function join(start) {
  if (reading.has(start.stream_id)) return;
  read(() => api.events("GET", `/streams/${start.stream_id}?after=-1`), start.stream_id).catch(
    (error) => {
      if (error.status !== 404) fail(error);
    },
  );
}

/**
 * Reads a stream until it ends or another session is opened; a connection that breaks is made
 * again.
 * @param {() => AsyncGenerator<StreamEvent>} connect
 * @param {string | null} [streamId] Its id if it is known before its first event.
 * @returns {Promise<boolean>} Whether the tree has what was asked for; true also if another session
 *   is open by now.
 */
export async function read(connect, streamId = null) {
  /** @type {Live | null} */
  let live = null;
  let wait = 300;
  let isGone = false;
  let landed = false;
  const readHere = reading;
  const isHere = visitor();
  if (streamId) readHere.add(streamId);
  try {
    for (;;) {
      try {
        for await (const event of connect()) {
          if (!isHere()) return true;
          live = take(live, event);
          wait = 300;
          if (event.event === "start" && !state.session) await showCreated(event.data.session_id);
        }
        if (!isHere() || !live || isOver(live)) break;
      } catch (error) {
        if (!live) throw error;
        if (error instanceof api.ApiError && error.status === 404) {
          isGone = true;
          handlers.notice(t("interrupted"));
          break;
        }
        if (error instanceof api.ApiError && error.status !== 503) throw error;
      }
      live.broken = true;
      touch("live");
      await pause(wait);
      wait = Math.min(wait * 2, 4000);
      if (!isHere()) return true;
      const { streamId: id, last } = live;
      connect = () => api.events("GET", `/streams/${id}?after=${last}`);
    }
  } finally {
    if (streamId) readHere.delete(streamId);
    if (live && isHere()) {
      await reload().catch(() => {});
      landed = hasLanded(live, state.turns);
      if (isGone && !landed && isHere()) {
        state.lost = { prompt: live.prompt, text: live.replies[0].text };
      }
      state.live.delete(live.streamId);
      readHere.delete(live.streamId);
      touch("live");
    }
    if (live) list();
  }
  return landed || isGone || !isHere();
}

/**
 * Takes one event of a stream into the state.
 * @param {Live | null} live null before its first event.
 * @param {StreamEvent} event
 * @returns {Live | null}
 */
function take(live, event) {
  if (event.event === "start") {
    if (!live) {
      live = liveOf(event.data, state.turns);
      reading.add(live.streamId);
      state.live.set(live.streamId, live);
    }
  } else if (live) {
    const reply = applyEvent(live, event);
    if (event.event === "token") renderer.follow(reply, () => touch("live"));
    if (event.event === "error") handlers.error(new Error(event.data.error.message));
  }
  if (live) {
    live.last = event.id;
    live.broken = false;
  }
  touch("live");
  return live;
}
