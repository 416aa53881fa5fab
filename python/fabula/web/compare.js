// Two branches side by side. Words that only one of them has are marked.

import { common, wordsOf } from "./diff.js";
import { t } from "./i18n.js";
import { pathTo } from "./turns.js";
import { dialog, h } from "./ui.js";

/** @import { Turn, Turns } from "./types.js" */

const MAX_WORDS = 1500; // of a branch; in longer ones nothing is marked

/**
 * The texts of two branches from where they part.
 * @param {Turns} turns
 * @param {string} left Turn id.
 * @param {string} right Turn id.
 */
export function partingTexts(turns, left, right) {
  const a = pathTo(turns, left);
  const b = pathTo(turns, right);
  let shared = 0;
  while (shared < a.length && shared < b.length && a[shared].id === b[shared].id) shared++;
  /** @param {Turn} turn */
  const textOf = ({ prompt, text }) => (prompt ? `${prompt}\n\n${text}` : text);
  return [a, b].map((path) => path.slice(shared).map(textOf).join("\n\n"));
}

/**
 * @param {Turns} turns
 * @param {string} left Turn id.
 * @param {string} right Turn id.
 */
export function openCompare(turns, left, right) {
  const [a, b] = partingTexts(turns, left, right).map(wordsOf);
  const isShort = a.length <= MAX_WORDS && b.length <= MAX_WORDS;
  const [inA, inB] = isShort ? common(a, b) : [a.map(() => true), b.map(() => true)];
  /**
   * @param {string[]} words
   * @param {boolean[]} isCommon
   */
  const column = (words, isCommon) =>
    h(
      "div.branch",
      {},
      words.map((word, i) => (isCommon[i] || !word.trim() ? word : h("mark", {}, word))),
    );
  const columns = h("div.branches", {}, column(a, inA), column(b, inB));
  dialog(t("compareTitle"), [h("p.help", {}, t("compareHelp")), columns], { wide: true });
}
