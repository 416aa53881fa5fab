// The page's words, in English and Chinese.

import { en } from "./words_en.js";
import { zh } from "./words_zh.js";

const WORDS = { en, zh };
const LANGUAGE = "fabula.language";

export const languages = { en: "English", zh: "中文" };

export function language() {
  const chosen = localStorage.getItem(LANGUAGE);
  if (WORDS[chosen]) return chosen;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export function setLanguage(name) {
  localStorage.setItem(LANGUAGE, name);
  location.reload();
}

const words = WORDS[language()];
document.documentElement.lang = language();

/** The words of a key, with {names} filled in. */
export function t(key, values = {}) {
  const text = words[key] ?? en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) =>
    name in values ? String(values[name]) : whole,
  );
}
