// The part of the page's address after "#": which view shows which session.

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
