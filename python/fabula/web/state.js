// The page's state, in one place. Views subscribe and redraw from it; only session.js and verbs.js
// change it.

import * as api from "./api.js";
import { t } from "./i18n.js";

/** @import { Change, Draft, Sampling, State, Subscriber } from "./types.js" */

const LIVE_MS = 125; // shortest time between two redraws of text that grows

/** Sampling settings of new sessions where the model recommends none. */
const BALANCED = { temperature: 0.7, top_p: 0.9, top_k: 40 };

/**
 * Settings of a new session: none, so that the model's own defaults apply.
 * @returns {Draft}
 */
export const newDraft = () => ({ sampling: {} });

/** What is known of the open session when there is none. */
const noSession = () => ({
  session: null,
  turns: new Map(),
  path: [],
  headId: "",
  canRedo: false,
  live: new Map(),
  lost: null,
  count: null,
});

/** @type {State} */
export const state = {
  health: null,
  online: true,
  needsKey: false,
  sessions: [],
  search: "",
  draft: newDraft(),
  ...noSession(),
};

/**
 * Sampling settings of a session that begins now: what was chosen, over what is balanced where the
 * model recommends nothing.
 * @returns {Sampling}
 */
export function newSampling() {
  const recommended = state.health?.models[0]?.sampling_defaults;
  return { ...(recommended?.source === "" ? BALANCED : {}), ...state.draft.sampling };
}

export const forgetSession = () => void Object.assign(state, noSession());

// ---- Changes ------------------------------------------------------------------------------------

/** @type {Set<Subscriber>} */
const subscribers = new Set();
/** @type {Set<Change>} */
const changed = new Set();
let hasFrame = false;
let hasTimer = false;
let notifiedAt = 0;

/**
 * Reports a change. Subscribers are notified with the next frame; of text that grows, eight times a
 * second at most.
 *
 * "session" is any change of the settings. "opened" means that another session, or none, is shown
 * now: text that the user is writing is replaced only then.
 * @param {Change[]} changes
 */
export function touch(...changes) {
  changes.forEach((change) => changed.add(change));
  if (hasFrame) return;
  const wait = notifiedAt + LIVE_MS - performance.now();
  if (changed.size > 1 || !changed.has("live") || wait <= 0) requestFrame();
  else if (!hasTimer) {
    hasTimer = true;
    setTimeout(() => {
      hasTimer = false;
      if (changed.size) requestFrame();
    }, wait);
  }
}

function requestFrame() {
  if (hasFrame) return;
  hasFrame = true;
  requestAnimationFrame(notify);
}

function notify() {
  hasFrame = false;
  notifiedAt = performance.now();
  const changes = new Set(changed);
  changed.clear();
  for (const subscriber of subscribers) subscriber(state, changes);
}

/**
 * Calls a function with the state and what changed, once a frame at most. Returns a function that
 * unsubscribes it.
 * @param {Subscriber} subscriber
 */
export function subscribe(subscriber) {
  subscribers.add(subscriber);
  return () => void subscribers.delete(subscriber);
}

// ---- Errors -------------------------------------------------------------------------------------

/** What the page does with errors and notices; app.js sets it. */
export const handlers = {
  /** @param {Error} _error */
  error(_error) {},
  /** @param {string} _text */
  notice(_text) {},
};

/**
 * Reports an error of a request: asks for an API key on 401, says that the server is away when it
 * cannot be reached.
 * @param {unknown} error
 */
export function fail(error) {
  if (error instanceof DOMException && error.name === "AbortError") return;
  if (!(error instanceof api.ApiError)) handlers.error(new Error(t("offline")));
  else if (error.status === 401) {
    state.needsKey = true;
    touch("key");
  } else handlers.error(error);
}

/**
 * The same function, but errors are reported and the result is undefined then.
 * @template {unknown[]} Args
 * @template Result
 * @param {(...args: Args) => Promise<Result>} work
 * @returns {(...args: Args) => Promise<Result | undefined>}
 */
export const guarded =
  (work) =>
  async (...args) => {
    try {
      return await work(...args);
    } catch (error) {
      fail(error);
      return undefined;
    }
  };
