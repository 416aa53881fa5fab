// The text of a story as data: what the path says, what changed in it, and the pieces it is written
// from.

import { turnOf } from "./turns.js";

/** @import { Token, Turn, Turns } from "./types.js" */

/** @typedef {{turns: Turns, path: string[]}} Path */

/**
 * What a turn adds to the story: nothing if it is a note.
 * @param {Turn} turn
 */
const partOf = (turn) => (turn.frozen ? "" : turn.prompt + turn.text);

/**
 * The story as the path has it.
 * @param {Path} path
 */
export const textOf = ({ turns, path }) => path.map((id) => partOf(turnOf(turns, id))).join("");

/**
 * How to make the path say `text`: the turn to go back to, and the text to add after it.
 * @param {Path} path
 * @param {string} text
 */
export function difference({ turns, path }, text) {
  let offset = 0;
  let turn = "";
  for (const id of path) {
    const part = partOf(turnOf(turns, id));
    if (!text.startsWith(part, offset)) break;
    offset += part.length;
    turn = id;
  }
  return { turn, rest: text.slice(offset) };
}

/**
 * What to continue when the user asks for it with the cursor at an offset.
 *
 * Text after the cursor that the tree has is dropped, it can be found again; text that is in no
 * turn yet is kept.
 * @param {Path} path
 * @param {string} paper
 * @param {number} cursor
 */
export function continuation(path, paper, cursor) {
  const text = paper.slice(0, cursor).replace(/\s+$/, (end) => (end.includes("\n") ? end : ""));
  const unwritten = difference(path, paper).rest.length;
  const after = paper.slice(Math.max(text.length, paper.length - unwritten));
  return { text, after, ...difference(path, text) };
}

/**
 * The pieces that write turns again, with text that the model wrote as plain text. Neighboring
 * pieces of the story become one; notes stay on their own.
 * @param {Turn[]} turns
 * @param {string | null} [note] A note that comes first.
 */
export function piecesOf(turns, note = null) {
  /** @type {{frozen: boolean, text: string}[]} */
  const pieces = note ? [{ frozen: true, text: note }] : [];
  for (const { frozen, prompt, text } of turns) {
    const last = pieces.at(-1);
    if (last && !last.frozen && !frozen) last.text += prompt + text;
    else pieces.push({ frozen, text: prompt + text });
  }
  return pieces;
}

/**
 * A note that ends with a line break, so that the story starts on a line of its own.
 * @param {string} text
 */
export const endedNote = (text) => (/\n\s*$/.test(text) ? text : `${text.trimEnd()}\n\n`);

/**
 * Tokens with a place in a reply's text. The text may end before its last token: at a stop string,
 * or before an end token.
 * @param {Token[]} tokens
 * @param {string} text
 */
export function visibleTokens(tokens, text) {
  let left = text.length;
  /** @type {{text: string, position: number}[]} */
  const found = [];
  tokens.forEach((token, position) => {
    if (left <= 0 || !token.text) return;
    const shown = token.text.slice(0, left);
    left -= shown.length;
    found.push({ text: shown, position });
  });
  return found;
}
