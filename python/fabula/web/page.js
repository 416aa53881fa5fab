// The page around the views: the address, the status line, and what views may ask for: announce
// something, show the tree, delete with a way to take it back. app.js puts the page together; views
// import this file, never app.js.

import { t } from "./i18n.js";
import { store } from "./store.js";
import { h, toast } from "./ui.js";

/** @import { ModelHealth, SessionSummary, State } from "./types.js" */

const TREE = "fabula.tree"; // in the browser's storage: whether the tree is shown next to a chat
const UNDO_S = 8;

// ---- The address --------------------------------------------------------------------------------

/** @typedef {"chat" | "tree" | "story"} ViewName */

/**
 * "#/story/abc" is the story of the session "abc"; without a view it is the chat, without an id a
 * new session.
 * @param {string} hash
 * @returns {{view: ViewName, id: string}}
 */
export function parseAddress(hash) {
  const [, view = "chat", id = ""] = hash.match(/^#\/(chat|tree|story)?\/?([A-Za-z0-9._-]*)/) || [];
  return { view: /** @type {ViewName} */ (view), id };
}

// ---- The status line ----------------------------------------------------------------------------

/**
 * "" when everything is well.
 * @param {Pick<State, "online" | "health">} state
 */
export function statusText({ online, health }) {
  if (!online) return t("offline");
  return (health?.models || []).map(modelText).filter(Boolean).join(" ");
}

/** @param {ModelHealth} model */
function modelText({ name, state, progress, error }) {
  const percent = progress ? ` ${Math.round(progress * 100)} %` : "";
  if (state === "ready") return "";
  if (state === "failed") return t("failedModel", { model: name, error: error || "" });
  return t(state === "fetching" ? "fetchingModel" : "loadingModel", { model: name }) + percent;
}

// ---- Screen readers -----------------------------------------------------------------------------

/** @type {HTMLElement | null} */
let announcer = null;

/**
 * Lets screen readers say something once.
 * @param {string} text
 */
export function announce(text) {
  if (!announcer) {
    announcer = h("div.sr-only", { role: "status", "aria-live": "polite" });
    document.body.append(announcer);
  }
  const target = announcer;
  target.textContent = "";
  requestAnimationFrame(() => void (target.textContent = text));
}

// ---- The tree next to a chat --------------------------------------------------------------------

/** The tree next to a chat. app.js shows it and sets these fields. */
export const treePanel = {
  isShown: false,

  /** Called when the user asks to show or to hide it. */
  onchange() {},

  /** Whether the user wants it where there is a chat. */
  isWanted: () => localStorage.getItem(TREE) === "1",

  /** @param {boolean} [wanted] Default: the other way round. */
  toggle(wanted) {
    const show = wanted ?? !treePanel.isShown;
    localStorage.setItem(TREE, show ? "1" : "");
    treePanel.onchange();
  },
};

// ---- Actions that can be taken back -------------------------------------------------------------

/** Actions that wait, so that the user can take them back. */
export class Pending {
  /** @type {Set<{run: () => void}>} */
  #actions = new Set();

  /**
   * Runs an action after a while. Returns a function that takes it back: true if it was not too
   * late.
   * @param {() => void} work
   * @param {number} ms
   * @returns {() => boolean}
   */
  add(work, ms) {
    const action = {
      run: () => {
        if (take()) work();
      },
    };
    const take = () => {
      clearTimeout(timer);
      return this.#actions.delete(action);
    };
    const timer = setTimeout(action.run, ms);
    this.#actions.add(action);
    return take;
  }

  /** Runs everything that waits now: the page is being closed. */
  runAll() {
    for (const { run } of [...this.#actions]) run();
  }
}

const pending = new Pending();

/** Does now what would be done later: the page is being closed. */
export const runPending = () => pending.runAll();

/**
 * Does something after eight seconds, or when the page is closed, unless the user takes it back.
 * @param {string} text What the user reads meanwhile.
 * @param {() => void} work
 * @param {() => void} undo Called if it is taken back.
 */
export function later(text, work, undo) {
  const takeBack = pending.add(() => {
    close();
    work();
  }, UNDO_S * 1000);
  const onUndo = () => {
    if (takeBack()) undo();
  };
  const close = toast(text, { seconds: UNDO_S, action: [t("undo"), onUndo] });
}

/**
 * Sessions that the list hides: they will be deleted unless the user takes it back.
 * @type {Set<string>}
 */
export const hiddenSessions = new Set();

/** @param {SessionSummary} session */
export function removeLater(session) {
  const id = session.session_id;
  hiddenSessions.add(id);
  store.touch("sessions");
  if (store.state.session?.session_id === id) location.hash = "#/";
  const show = () => {
    hiddenSessions.delete(id);
    store.touch("sessions");
  };
  const remove = async () => {
    await store.do.remove(id);
    hiddenSessions.delete(id);
    store.list();
  };
  later(t("removed", { title: session.title || t("untitled") }), remove, show);
}
