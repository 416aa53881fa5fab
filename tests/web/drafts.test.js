import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import "./browser.js";
import { draftKey, loadDraft, saveDraft } from "../../python/fabula/web/drafts.js";

const KEY = draftKey("draft", { session: { session_id: "a" } });
const NEW = draftKey("draft", { session: null });

beforeEach(() => {
  localStorage.clear();
  sessionStorage.clear();
});

/** What another tab does: it shares localStorage and has a sessionStorage of its own. */
function inAnotherTab(work) {
  const own = sessionStorage;
  globalThis.sessionStorage = new own.constructor();
  try {
    return work();
  } finally {
    globalThis.sessionStorage = own;
  }
}

test("a draft is found again", () => {
  for (const key of [KEY, NEW]) {
    assert.equal(loadDraft(key), "");
    saveDraft(key, "half a thought");
    assert.equal(loadDraft(key), "half a thought");
    saveDraft(key, "");
    assert.equal(loadDraft(key), "");
  }
});

test("sessions and kinds have drafts of their own", () => {
  const keys = [KEY, NEW, draftKey("story", { session: null })];
  keys.push(draftKey("story", { session: { session_id: "a" } }));
  keys.push(draftKey("draft", { session: { session_id: "b" } }));
  assert.equal(new Set(keys).size, keys.length);
});

test("another tab finds the draft of a session, and none for a new one", () => {
  saveDraft(KEY, "of a session");
  saveDraft(NEW, "of a new one");
  assert.equal(
    inAnotherTab(() => loadDraft(KEY)),
    "of a session",
  );
  assert.equal(
    inAnotherTab(() => loadDraft(NEW)),
    "",
  );
});

test("sending removes this tab's draft, not another's", () => {
  saveDraft(KEY, "mine");
  inAnotherTab(() => saveDraft(KEY, "another's"));
  saveDraft(KEY, "");
  assert.equal(loadDraft(KEY), "", "this tab has sent it");
  assert.equal(
    inAnotherTab(() => loadDraft(KEY)),
    "another's",
  );
});

test("a draft that was sent does not come back", () => {
  saveDraft(KEY, "mine");
  saveDraft(KEY, "");
  inAnotherTab(() => saveDraft(KEY, "written later"));
  assert.equal(loadDraft(KEY), "");
});
