// Keyboard shortcuts: which key does what, and the list of them on "?".

import { t } from "./i18n.js";
import { dialog, h } from "./ui.js";

/** @import { WordKey } from "./i18n.js" */

/** @typedef {"new" | "search" | "focus" | "undo" | "redo" | "tree" | "stop" | "help"} Action */
/** @typedef {Pick<KeyboardEvent, "key" | "ctrlKey" | "metaKey" | "altKey" | "shiftKey">} Key */
/** @typedef {{hasSession: boolean, hasTurn: boolean, canRedo: boolean, isAnswering: boolean}} Situation */

/** @type {[key: string, words: WordKey][]} */
const LIST = [
  ["n", "key_new"],
  ["/", "key_search"],
  ["i", "key_focus"],
  ["u", "key_undo"],
  ["r", "key_redo"],
  ["t", "key_tree"],
  ["Esc", "key_stop"],
  ["?", "key_help"],
];

/**
 * What a key does now; null for nothing.
 * @param {Key} key
 * @param {boolean} isWriting Whether the focus is where text is written.
 * @param {Situation} now
 * @returns {Action | null}
 */
export function actionOf({ key, ctrlKey, metaKey, altKey, shiftKey }, isWriting, now) {
  const isCommand = ctrlKey || metaKey;
  if (key === "Escape" && now.isAnswering) return "stop";
  if (isWriting && !(isCommand && altKey)) return null;
  if (key === "?") return "help";
  if (key === "n") return "new";
  if (key === "/") return "search";
  if (key === "i") return "focus";
  if (key === "t" && now.hasSession) return "tree";
  const isUndo = key === "u" || (isCommand && key === "z" && !shiftKey);
  if (isUndo && now.hasSession && now.hasTurn) return "undo";
  const isRedo = key === "r" || (isCommand && (key === "y" || key === "Z"));
  if (isRedo && now.hasSession && now.canRedo) return "redo";
  return null;
}

export function showKeys() {
  const rows = LIST.flatMap(([key, words]) => [
    h("dt", {}, h("kbd", {}, key)),
    h("dd", {}, t(words)),
  ]);
  dialog(t("keys"), h("dl.keys", {}, rows));
}
