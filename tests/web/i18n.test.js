import assert from "node:assert/strict";
import { test } from "node:test";

import "./browser.js";
import { fill, language, pickLanguage, t } from "../../python/fabula/web/i18n.js";

test("the user's choice goes before the browser's language", () => {
  assert.equal(pickLanguage("en", "zh-CN"), "en");
  assert.equal(pickLanguage("zh", "en-US"), "zh");
});

test("without a choice it is the browser's language, else English", () => {
  assert.equal(pickLanguage(null, "zh-TW"), "zh");
  assert.equal(pickLanguage(null, "ZH"), "zh");
  assert.equal(pickLanguage(null, "de-DE"), "en");
  assert.equal(pickLanguage("klingon", "fr"), "en");
  assert.equal(pickLanguage("constructor", "fr"), "en");
});

test("values are filled in, and a name without a value stays", () => {
  assert.equal(fill("{n} of {all}", { n: 0, all: 3 }), "0 of 3");
  assert.equal(fill("{n} {toString}", { n: "$&" }), "$& {toString}");
});

test("words are those of the page's language", () => {
  localStorage.setItem("fabula.language", "zh");
  assert.equal(language(), "zh");
  assert.equal(t("version", { i: 2, n: 3 }), "第 2 版，共 3 版");
});
