// A stream that is being read, as data: begun by its first event, changed by each further one.

/** @import { Live, LiveReply, StreamEvent, StreamStart, Turns } from "./types.js" */

/**
 * @param {StreamStart} start
 * @param {Turns} turns Those there are now.
 * @returns {Live}
 */
export function liveOf(start, turns) {
  return {
    streamId: start.stream_id,
    parentId: start.parent_id,
    prompt: start.prompt,
    selects: start.selects,
    replies: Array.from({ length: start.n || 1 }, () => replyOf(start.begun_text || "")),
    last: -1,
    broken: false,
    before: new Set(turns.keys()),
  };
}

/**
 * @param {string} text
 * @returns {LiveReply}
 */
const replyOf = (text) => ({ text, blocks: [], done: false, result: null, nTokens: 0 });

/**
 * Applies a token or the end of a reply. Returns the reply that changed.
 * @param {Live} live
 * @param {Exclude<StreamEvent, {event: "start"}>} event
 */
export function applyEvent(live, event) {
  const reply = live.replies[event.data.index || 0];
  if (event.event === "token") {
    reply.text += event.data.text;
    reply.nTokens += 1;
  } else {
    reply.done = true;
    reply.result = event.event === "done" ? event.data : null;
  }
  return reply;
}

/**
 * Whether every reply has ended.
 * @param {Live} live
 */
export const isOver = (live) => live.replies.every((reply) => reply.done);

/**
 * Whether the tree has a turn that this stream made.
 * @param {Live} live
 * @param {Turns} turns
 */
export const hasLanded = (live, turns) =>
  [...turns.values()].some((turn) => !live.before.has(turn.id) && turn.parent_id === live.parentId);

/**
 * The turns that stand before a reply on screen: a reply that becomes the head hides those after
 * its parent.
 * @param {string[]} path
 * @param {Live | undefined} leading The stream whose reply becomes the head, if there is one.
 */
export function pathBefore(path, leading) {
  if (!leading) return path;
  return leading.parentId ? path.slice(0, path.indexOf(leading.parentId) + 1) : [];
}
