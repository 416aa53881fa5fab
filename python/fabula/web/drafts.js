// Words that are written and not sent yet. They outlive a reload, and belong to the tab they are written in: two tabs write
// two messages. Those for a session that exists are kept for tabs opened later as well; a new one has nothing to find them by.

const NEW = "fabula.new.";

/** @param kind "draft" or "story"; what is written there. */
export const draftKey = (kind, state) =>
  state.session ? `fabula.${kind}.${state.session.session_id}` : `${NEW}${kind}`;

export function draftOf(key) {
  const mine = sessionStorage.getItem(key); // "" for what this tab has sent or taken away
  if (mine !== null || key.startsWith(NEW)) return mine || "";
  const found = localStorage.getItem(key) || "";
  if (found) sessionStorage.setItem(key, found);
  return found;
}

export function keepDraft(key, text) {
  const before = sessionStorage.getItem(key);
  sessionStorage.setItem(key, text);
  if (key.startsWith(NEW)) return;
  if (text) localStorage.setItem(key, text);
  else if (localStorage.getItem(key) === before) localStorage.removeItem(key); // another tab's words stay
}
