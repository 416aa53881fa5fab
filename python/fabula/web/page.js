// What views may ask of the page around them: announce something, show the tree, delete with a way
// to take it back. app.js puts the page together; views import this file, never app.js.

import { t } from "./i18n.js";
import { Pending } from "./pending.js";
import { store } from "./store.js";
import { h, toast } from "./ui.js";

/** @import { SessionSummary } from "./types.js" */

const TREE = "fabula.tree"; // in the browser's storage: whether the tree is shown next to a chat
const UNDO_S = 8;

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
 * Sessions that the list hides: they will be deleted unless the user takes it back. @type
 * {Set<string>}
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
