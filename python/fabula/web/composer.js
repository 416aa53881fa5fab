// Where a message is written. It grows, keeps its draft over reloads, and tells whether the message fits.

import { draftKey, draftOf, keepDraft } from "./drafts.js";
import { t } from "./i18n.js";
import { h, icon } from "./ui.js";

/** @param onsend called when a message goes off, however it was sent. */
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
  const form = h(
    "form.composer",
    {
      onsubmit: (event) => {
        event.preventDefault();
        if (store.state.live.size) store.do.stop();
        else send();
      },
    },
    box,
    button,
  );
  root.append(warning, form);
  let counting = 0,
    shownKey = draftKey("draft", store.state),
    visits = 0;

  function grow() {
    box.style.setProperty("block-size", "auto");
    box.style.setProperty("block-size", `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`);
  }

  async function send(text = box.value.trim()) {
    if (!text || !store.state.online) return;
    const kept = shownKey,
      mine = visits;
    box.value = "";
    grow();
    keepDraft(kept, "");
    onsend();
    if (await store.do.send(text)) return;
    // Refused, or stopped before its first word: the words go back, to where they were written.
    if (visits !== mine) {
      if (!draftOf(kept)) keepDraft(kept, text);
      return;
    }
    if (box.value) return;
    box.value = text;
    keepDraft(shownKey, text);
    grow();
  }

  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!store.state.live.size) send();
    }
  });
  box.addEventListener("input", () => {
    grow();
    keepDraft(shownKey, box.value);
    clearTimeout(counting);
    counting = setTimeout(() => store.do.count(box.value), 400);
  });

  function draw(state, changed) {
    const key = draftKey("draft", state);
    if (key !== shownKey) {
      if (changed.has("opened")) {
        visits++;
        box.value = draftOf(key);
        grow();
      } else {
        keepDraft(shownKey, "");
        keepDraft(key, box.value);
      } // the first message began a session: what was typed since goes with it
      shownKey = key;
    }
    if (changed.has("session") || changed.has("tree")) if (state.session) store.do.count(box.value);
    const busy = state.live.size > 0,
      label = busy ? t("stop") : t("send");
    button.classList.toggle("stopping", busy);
    if (button.title !== label) {
      button.title = label;
      button.setAttribute("aria-label", label);
      button.replaceChildren(icon(busy ? "stop" : "send"));
    }
    const count = state.count;
    warning.hidden = !(count && !count.fits && box.value);
    if (!warning.hidden)
      warning.textContent = t("contextFull", { used: count.prompt_tokens, all: count.context });
  }
  box.value = draftOf(shownKey);
  grow();
  draw(store.state, new Set(["session"]));
  if (matchMedia("(hover: hover)").matches) box.focus();
  return { send, unmount: store.subscribe(draw) };
}
