// The page's words, in the reader's language.

import { en } from "./words_en.js";
import { zh } from "./words_zh.js";

/** @typedef {keyof typeof en} WordKey */
/** @typedef {keyof typeof languages} Language */

const STORED_AS = "fabula.language";
const WORDS = { en, zh };

/** What each language calls itself. */
export const languages = { en: "English", zh: "中文" };

/**
 * The language to show: the one the reader chose, else the browser's, else English.
 * @param {string | null} chosen
 * @param {string} preferred The browser's, such as "zh-CN".
 * @returns {Language}
 */
export function pickLanguage(chosen, preferred) {
  if (chosen === "en" || chosen === "zh") return chosen;
  return preferred.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** @type {Language | null} */
let current = null;

/** The language of this page; it stays the same until the page is loaded again. */
export function language() {
  current ??= pickLanguage(localStorage.getItem(STORED_AS), navigator.language);
  return current;
}

/** @param {string} name */
export function setLanguage(name) {
  localStorage.setItem(STORED_AS, name);
  location.reload();
}

/**
 * Puts values in place of {names}; a name without a value stays as it is.
 * @param {string} text
 * @param {Record<string, string | number>} values
 */
export function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) =>
    Object.hasOwn(values, name) ? String(values[name]) : whole,
  );
}

/**
 * The words of a key in the page's language, with values in place of {names}.
 * @param {WordKey} key
 * @param {Record<string, string | number>} [values]
 */
export function t(key, values = {}) {
  return fill(WORDS[language()][key], values);
}
