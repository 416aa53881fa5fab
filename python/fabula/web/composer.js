// Where a message is written. It grows with its text, keeps its draft over reloads, and says when
// the message does not fit.

import { draftKey, loadDraft, saveDraft } from "./drafts.js";
import { t } from "./i18n.js";
import { h, icon } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { Change, State } from "./types.js" */

const COUNT_MS = 400; // after the last key, before the message is counted

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @param {() => void} onsend Called when a message is sent.
 */
export function mountComposer(root, store, onsend) {
  const warning = h("p.warning", { hidden: true, role: "alert" });
  const box = h("textarea", {
    rows: 1,
    placeholder: t("placeholder"),
    "aria-label": t("message"),
    id: "composer",
    enterKeyHint: "send",
  });
  const button = h(
    "button.send",
    { type: "submit", title: t("send"), "aria-label": t("send") },
    icon("send"),
  );
  /** @param {SubmitEvent} event */
  const onsubmit = (event) => {
    event.preventDefault();
    if (store.state.live.size) store.do.stop();
    else send();
  };
  root.append(warning, h("form.composer", { onsubmit }, box, button));
  let timer = 0;
  let shownKey = draftKey("draft", store.state);
  let visits = 0; // counts sessions that were shown

  function grow() {
    box.style.setProperty("block-size", "auto");
    box.style.setProperty("block-size", `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`);
  }

  async function send(text = box.value.trim()) {
    if (!text || !store.state.online) return;
    const sentKey = shownKey;
    const mine = visits;
    box.value = "";
    grow();
    saveDraft(sentKey, "");
    onsend();
    if (await store.do.send(text)) return;
    // Refused, or stopped before its first token: the text goes back to where it was written.
    if (visits !== mine) {
      if (!loadDraft(sentKey)) saveDraft(sentKey, text);
    } else if (!box.value) {
      box.value = text;
      saveDraft(shownKey, text);
      grow();
    }
  }

  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!store.state.live.size) send();
  });
  box.addEventListener("input", () => {
    grow();
    saveDraft(shownKey, box.value);
    clearTimeout(timer);
    timer = window.setTimeout(() => store.do.count(box.value), COUNT_MS);
  });

  /**
   * @param {State} state
   * @param {Set<Change>} changed
   */
  function draw(state, changed) {
    const key = draftKey("draft", state);
    if (key !== shownKey && changed.has("opened")) {
      visits++;
      box.value = loadDraft(key);
      grow();
    } else if (key !== shownKey) {
      // The first message created a session: what was typed since belongs to it.
      saveDraft(shownKey, "");
      saveDraft(key, box.value);
    }
    shownKey = key;
    if (state.session && (changed.has("session") || changed.has("tree"))) store.do.count(box.value);
    drawButton(state.live.size > 0);
    const count = state.count;
    warning.hidden = !count || count.fits || !box.value;
    if (count && !warning.hidden) {
      warning.textContent = t("contextFull", { used: count.prompt_tokens, all: count.context });
    }
  }

  /** @param {boolean} isAnswering */
  function drawButton(isAnswering) {
    const label = isAnswering ? t("stop") : t("send");
    button.classList.toggle("stopping", isAnswering);
    if (button.title === label) return;
    button.title = label;
    button.setAttribute("aria-label", label);
    button.replaceChildren(icon(isAnswering ? "stop" : "send"));
  }

  box.value = loadDraft(shownKey);
  grow();
  draw(store.state, new Set(["session"]));
  if (matchMedia("(hover: hover)").matches) box.focus();
  return { send, unmount: store.subscribe(draw) };
}
