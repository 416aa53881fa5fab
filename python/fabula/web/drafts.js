// Text that is written and not sent yet. It survives a reload and belongs to its tab: two tabs
// write two messages. Drafts of an existing session are also found by tabs that are opened later; a
// new session has no id to find its draft by.

/** @import { State } from "./types.js" */

const NEW = "fabula.new.";

/**
 * The key of a draft in the browser's storage.
 * @param {"draft" | "story"} kind
 * @param {Pick<State, "session">} state
 */
export const draftKey = (kind, state) =>
  state.session ? `fabula.${kind}.${state.session.session_id}` : `${NEW}${kind}`;

/**
 * The draft, or "".
 * @param {string} key
 */
export function loadDraft(key) {
  const own = sessionStorage.getItem(key); // "" after this tab sent or removed it
  if (own !== null || key.startsWith(NEW)) return own || "";
  const found = localStorage.getItem(key) || "";
  if (found) sessionStorage.setItem(key, found);
  return found;
}

/**
 * Keeps a draft; "" removes it.
 * @param {string} key
 * @param {string} text
 */
export function saveDraft(key, text) {
  const before = sessionStorage.getItem(key);
  sessionStorage.setItem(key, text);
  if (key.startsWith(NEW)) return;
  if (text) localStorage.setItem(key, text);
  else if (localStorage.getItem(key) === before) localStorage.removeItem(key); // keep another tab's
}
