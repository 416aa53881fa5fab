// Two branches beside each other, with the words that only one of them says marked.

import { t } from "./i18n.js";
import { dialog, h } from "./ui.js";

const MOST = 1500; // words compared; beyond them nothing is marked

/** Which words of `a` and `b` are in their longest common subsequence: two arrays of booleans. */
export function common(a, b) {
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i][j] =
        a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const inA = new Array(a.length).fill(false),
    inB = new Array(b.length).fill(false);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      inA[i++] = true;
      inB[j++] = true;
    } else if (table[i + 1][j] >= table[i][j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

const wordsOf = (text) => text.match(/\s+|[^\s]+/g) || [];

function pathOf(turns, id) {
  const path = [];
  for (let turn = turns.get(id); turn; turn = turns.get(turn.parent_id)) path.unshift(turn);
  return path;
}

export function openCompare(turns, left, right) {
  const a = pathOf(turns, left),
    b = pathOf(turns, right);
  let same = 0;
  while (same < a.length && same < b.length && a[same].id === b[same].id) same++;
  const texts = [a, b].map((path) =>
    path
      .slice(same)
      .map((turn) => (turn.prompt ? `${turn.prompt}\n\n` : "") + turn.text)
      .join("\n\n"),
  );
  const words = texts.map(wordsOf);
  const marks = words.every((list) => list.length <= MOST)
    ? common(...words)
    : words.map((list) => list.map(() => true));
  const columns = words.map((list, side) =>
    h(
      "div.branch",
      {},
      list.map((word, i) => (marks[side][i] || !word.trim() ? word : h("mark", {}, word))),
    ),
  );
  dialog(t("compareTitle"), [h("p.help", {}, t("compareHelp")), h("div.branches", {}, columns)], {
    wide: true,
  });
}
