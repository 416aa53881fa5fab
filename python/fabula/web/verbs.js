// What the user can do: one function per action. Each reports its own errors and resolves to
// undefined then.

import * as api from "./api.js";
import { list, read, reload, setHead, showCreated, visitor } from "./session.js";
import { fail, guarded, newSampling, state, touch } from "./state.js";
import { titleOf } from "./turns.js";

/**
 * @import { Alternative, Count, Draft, HeadReply, PolicyName, Sampling, Session, SessionFile, SessionRef, Token } from "./types.js"
 */

// ---- Bodies -------------------------------------------------------------------------------------

/** The open session. Views offer its verbs only while there is one. */
function here() {
  if (!state.session) throw new api.ApiError(404, { error: { message: "no session is open" } });
  return { session_id: state.session.session_id };
}

/**
 * The open session, or the settings of one that begins with this text.
 * @param {string} text
 */
const opening = (text) =>
  state.session ? here() : { title: titleOf(text), ...state.draft, sampling: newSampling() };

/**
 * The same for a story. One that outgrows the context drops its oldest pieces, unless it was set to
 * stop.
 * @param {string} text
 */
function openingStory(text) {
  if (!state.session) return { context_policy: "drop_oldest_turns", ...opening(text) };
  // Its notes came before its words: it has no title yet.
  return text && !state.session.title ? { ...here(), title: titleOf(text) } : here();
}

/**
 * Settings of a new session with some of them changed; null puts a sampling setting back to its
 * default.
 * @param {Draft} draft
 * @param {Partial<Draft>} changes
 * @returns {Draft}
 */
export function changedDraft(draft, { sampling = {}, ...rest }) {
  const merged = Object.entries({ ...draft.sampling, ...sampling });
  const given = merged.filter(([, value]) => value !== null);
  return { ...draft, ...rest, sampling: Object.fromEntries(given) };
}

// ---- Replies ------------------------------------------------------------------------------------

/** Starts a reply and reads it to its end. Resolves to whether the tree has it. */
const generate = guarded((/** @type {string} */ path, /** @type {object} */ body) =>
  read(() => api.events("POST", path, { ...body, stream: true, background: true })),
);

/** @param {string} message */
async function send(message) {
  state.lost = null;
  return generate("/chat", { ...opening(message), message });
}

/**
 * Continues the story, after adding text to it.
 * @param {string} prompt
 * @param {Sampling} [sampling]
 */
const continueStory = async (prompt, sampling = {}) =>
  generate("/story", { ...openingStory(prompt), ...sampling, ...(prompt ? { prompt } : {}) });

/**
 * Adds text to the story, or a note for the model, without a reply. Resolves to whether it is
 * there.
 */
const write = guarded(async (/** @type {string} */ text, /** @type {boolean} */ frozen = false) => {
  const isHere = visitor();
  const isNew = !state.session;
  const body = { ...openingStory(frozen ? "" : text), text, frozen };
  if ("system" in body) delete body.system; // a story has no system prompt
  /** @type {SessionRef} */
  const written = await api.post("/write", body);
  if (!isHere()) return false;
  if (isNew) await showCreated(written.session_id);
  await reload();
  if (isNew) list();
  return true;
});

/** Puts other text in place of a reply. */
const rewrite = guarded(async (/** @type {string} */ turn, /** @type {string} */ text) => {
  await api.post("/rewrite", { ...here(), turn, text });
  await reload();
});

const regenerate = guarded(async () => generate("/regenerate", here()));
const continueReply = guarded(async () => generate("/continue", here()));

/** Sends other words in place of a turn's message. */
const edit = guarded(async (/** @type {string} */ turn, /** @type {string} */ message) =>
  generate("/edit", { ...here(), turn, message }),
);

/** Generates n replies to the head's message side by side. */
const branch = guarded(async (/** @type {number} */ n, /** @type {Sampling} */ sampling = {}) =>
  generate("/branch", { ...here(), n, ...sampling }),
);

/** Branches off inside a reply, with another token at a position. */
const forkAt = guarded(
  async (
    /** @type {string} */ turn,
    /** @type {number} */ position,
    /** @type {number} */ token_id,
  ) => generate("/fork_at", { ...here(), turn, position, token_id }),
);

/** Stops what is being generated: also a first reply whose session is not loaded yet. */
const stop = guarded(async () => {
  const [stream_id] = state.live.keys();
  if (state.session || stream_id) await api.post("/stop", state.session ? here() : { stream_id });
});

// ---- The tree -----------------------------------------------------------------------------------

/** Makes a turn the head; "" is the empty start. */
const rollback = guarded(async (/** @type {string} */ turn) => {
  /** @type {HeadReply} */
  const reply = await api.post("/rollback", { ...here(), target_turn: turn || 0 });
  state.canRedo = true;
  setHead(reply.head_id);
});

const redo = guarded(async () => {
  /** @type {HeadReply} */
  const reply = await api.post("/redo", here());
  setHead(reply.head_id);
  await reload();
});

/** Begins a new session at a turn. Resolves to its id. */
const fork = guarded(async (/** @type {string} */ turn) => {
  /** @type {SessionRef} */
  const made = await api.post("/fork", { ...here(), turn });
  await list();
  return made.session_id;
});

/** Names a turn, or removes a name. */
const tag = guarded(
  async (
    /** @type {string} */ turn,
    /** @type {string} */ tag,
    /** @type {boolean} */ remove = false,
  ) => {
    await api.post("/tags", { ...here(), turn, tag, remove });
    await reload();
  },
);

/** Deletes what follows a turn. */
const prune = guarded(async (/** @type {string} */ turn) => {
  await api.postLast("/rollback", { ...here(), target_turn: turn || 0, prune: true });
  await reload();
});

/** The tokens that could stand at a position of a reply. */
const alternatives = guarded(async (/** @type {string} */ turn, /** @type {number} */ position) => {
  /** @type {{alternatives: Alternative[]}} */
  const reply = await api.post("/alternatives", { ...here(), turn, position, n: 8 });
  return reply.alternatives;
});

/** The tokens of a reply. */
const turnTokens = guarded(async (/** @type {string} */ turn) => {
  /** @type {{tokens: Token[]}} */
  const reply = await api.post("/turn_tokens", { ...here(), turn });
  return reply.tokens;
});

// ---- Sessions -----------------------------------------------------------------------------------

/** Changes settings of the open session, or of the one to come. */
const configure = guarded(
  async (
    /** @type {{sampling?: Sampling, system?: string, context_policy?: PolicyName}} */ changes,
  ) => {
    if (!state.session) {
      state.draft = changedDraft(state.draft, changes);
      touch("session");
      return;
    }
    /** @type {Session} */
    const session = await api.patch(`/sessions/${here().session_id}`, changes);
    state.session = session;
    touch("session");
    list();
  },
);

const rename = guarded(async (/** @type {string} */ id, /** @type {string} */ title) => {
  await api.patch(`/sessions/${id}`, { title });
  if (state.session?.session_id === id) await reload();
  await list();
});

const setTags = guarded(async (/** @type {string} */ id, /** @type {string[]} */ tags) => {
  await api.patch(`/sessions/${id}`, { tags });
  await list();
});

/** @param {string} id */
const remove = async (id) =>
  void (await api.postLast("/delete_session", { session_id: id }).catch(fail));

const exportSession = guarded(
  (/** @type {string} */ id) =>
    /** @type {Promise<SessionFile>} */ (api.get(`/sessions/${id}/export`)),
);

/** Imports a session, under another id if its own is taken. Resolves to its id. */
const importSession = guarded(async (/** @type {SessionFile} */ file) => {
  /**
   * @param {string} id
   * @returns {Promise<SessionRef>}
   */
  const take = (id) => api.post(`/sessions/import?id=${encodeURIComponent(id)}`, file);
  const made = await take(file.id).catch((error) => {
    // Only the server knows which ids are free: the page's list may be short or old.
    if (!(error instanceof api.ApiError) || error.code !== "session_exists") throw error;
    return take(`${file.id.slice(0, 100)}-${Math.random().toString(36).slice(2, 8)}`);
  });
  await list();
  return made.session_id;
});

/** Asks whether a message fits into the context. */
const count = guarded(async (/** @type {string} */ message) => {
  /** @type {Count} */
  const reply = await api.post("/count", { ...(state.session ? here() : {}), message });
  state.count = reply;
  touch("count");
});

/** @param {string} text */
function search(text) {
  state.search = text;
  return list();
}

/** @param {string} value */
function setKey(value) {
  api.key.set(value);
  state.needsKey = false;
  return list();
}

export const verbs = {
  ...{ send, continueStory, write, rewrite, regenerate, continueReply, edit, branch, forkAt, stop },
  ...{ rollback, redo, fork, tag, prune, alternatives, turnTokens },
  ...{ configure, rename, setTags, remove, exportSession, importSession, count, search, setKey },
};
