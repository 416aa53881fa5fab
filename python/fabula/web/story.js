// The story: one growing text that the user and the model write together; the tree keeps every
// version.
//
// The text on the page is that of the path. Text that is added at its end goes to the model with
// the next continuation. A change further up goes back to the turn before the change and writes the
// rest again as one piece: nothing is overwritten, the earlier version stays in the tree.

import { closerElement } from "./closer.js";
import { draftKey, loadDraft, saveDraft } from "./drafts.js";
import { t } from "./i18n.js";
import { pathBefore } from "./live.js";
import { openNotes } from "./notes.js";
import { announce } from "./page.js";
import { openSettings } from "./settings.js";
import { continuation, textOf } from "./story_text.js";
import { turnOf } from "./turns.js";
import { download, h, icon, iconButton, menu } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { Change, MenuItem, State, View } from "./types.js" */

const N_CONTINUATIONS = 3; // offered at once
const N_TOKENS = 60; // of a continuation, unless the settings say how long

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @returns {View}
 */
export function mountStory(root, store) {
  const paper = h("textarea.paper", {
    "aria-label": t("story"),
    placeholder: t("storyPlaceholder"),
    spellcheck: false,
    id: "paper",
  });
  const cards = h("div.cards", { "aria-live": "off" });
  const nWords = h("span.quiet");
  const title = h("h1");
  const help = h("p.help", {}, t("storyHelp"));
  const continueButton = h(
    "button.primary",
    { type: "button", id: "write-on", onclick: () => continueStory(1) },
    t("continueStory"),
  );
  const severalButton = h(
    "button.button",
    { type: "button", id: "ways", onclick: () => continueStory(N_CONTINUATIONS) },
    t("continuations", { n: N_CONTINUATIONS }),
  );
  const closerButton = h(
    "button.button",
    { type: "button", id: "closer", "aria-pressed": "false", onclick: () => lookCloser(!closer) },
    t("closer"),
  );
  const back = iconButton("back", t("undoStory"), () => {
    const head = store.state.turns.get(store.state.headId);
    if (head) store.do.rollback(head.parent_id);
  });
  const more = iconButton("more", t("more"), () => menu(more, menuItems()));
  const notes = h(
    "button.quiet.small",
    { type: "button", id: "notes", onclick: () => openNotes(store) },
    icon("book"),
    t("notes"),
  );
  const settings = iconButton("tune", t("storyStart"), () => openSettings(store));
  root.append(
    h("header.view-head", {}, title, nWords, notes, settings, more),
    h("div.scroller.story", {}, help, paper, cards),
    h("div.story-foot", {}, continueButton, severalButton, closerButton, back),
  );

  /** @type {HTMLElement | null} */
  let closer = null; // the closer look, while it is shown
  let written = ""; // what the turns of the path say
  let shownKey = draftKey("story", store.state);
  let visits = 0; // counts stories that were shown
  let draft = loadDraft(shownKey); // the whole text if it differs from `written`, else ""

  /** @returns {MenuItem[]} */
  function menuItems() {
    const startChapter = () => {
      paper.value = `${paper.value.trimEnd()}\n\n## `;
      keep();
      paper.focus();
    };
    const exportMarkdown = () => {
      const name = store.state.session?.title || t("untitled");
      download("story.md", `# ${name}\n\n${paper.value.trim()}\n`, "text/markdown");
    };
    const exportPlain = () =>
      download("story.txt", `${paper.value.trim().replace(/^## /gm, "")}\n`, "text/plain");
    const showTree = () => {
      if (store.state.session) location.hash = `#/tree/${store.state.session.session_id}`;
    };
    return [
      [t("chapter"), startChapter],
      [t("redoStory"), () => store.do.redo()],
      null,
      [t("exportText"), exportMarkdown],
      [t("exportTxt"), exportPlain],
      [t("tree"), showTree],
    ];
  }

  function grow() {
    paper.style.setProperty("block-size", "auto");
    paper.style.setProperty("block-size", `${paper.scrollHeight + 8}px`);
    nWords.textContent = t("wordsOf", { n: (paper.value.match(/\S+/g) || []).length });
  }

  /**
   * @param {string} key
   * @param {string} text
   */
  function setDraft(key, text) {
    draft = text;
    saveDraft(key, text);
  }

  function keep() {
    setDraft(shownKey, paper.value === written ? "" : paper.value);
    grow();
  }

  paper.addEventListener("input", keep);
  paper.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    continueStory(1);
  });

  /** Where to continue: at the cursor if it is inside the text, else at its end. */
  function cursor() {
    const at = document.activeElement === paper ? paper.selectionStart : 0;
    return at > 0 ? at : paper.value.length;
  }

  /**
   * Continues the story at the cursor; several continuations are offered as cards. Stops the model
   * while it is writing.
   * @param {number} n
   */
  async function continueStory(n) {
    const { state } = store;
    if (state.live.size) {
      store.do.stop();
      return;
    }
    const { text, after, turn, rest } = continuation(state, paper.value, cursor());
    if (!text.trim()) {
      paper.focus();
      return;
    }
    const mine = visits;
    const sampling = { max_tokens: (state.session || state.draft).sampling.max_tokens ?? N_TOKENS };
    if (state.session && turn !== state.headId) await store.do.rollback(turn);
    // Several continuations need a turn to branch from: the text is written first.
    const isWritten =
      n === 1
        ? await store.do.continueStory(rest, sampling)
        : !rest || (await store.do.write(rest));
    if (mine !== visits) return; // another story is shown by now
    if (isWritten) {
      setDraft(shownKey, after.trim() ? textOf(store.state) + after : "");
      if (n > 1) await store.do.branch(n, sampling);
    } // else it was refused, and the draft is still there
    draw(store.state, new Set(["tree"]));
  }

  /**
   * Shows the text as tokens with their alternatives, or the paper again.
   * @param {boolean} isWanted
   */
  function lookCloser(isWanted) {
    closer?.remove();
    closer = isWanted ? closerElement(store, leaveCloser) : null;
    if (closer) paper.before(closer);
    paper.hidden = help.hidden = isWanted;
    closerButton.setAttribute("aria-pressed", String(isWanted));
    closerButton.textContent = t(isWanted ? "closerLeave" : "closer");
    const text = closer?.querySelector(".closer");
    if (text instanceof HTMLElement) text.focus();
    else grow();
  }

  function leaveCloser() {
    lookCloser(false);
    paper.focus();
  }

  /**
   * @param {State} state
   * @param {Set<Change>} changed
   */
  function draw(state, changed) {
    const isAnswering = state.live.size > 0;
    title.textContent = state.session?.title || t("newStory");
    continueButton.textContent = t(isAnswering ? "stop" : "continueStory");
    severalButton.disabled = isAnswering;
    closerButton.disabled = back.disabled = isAnswering || !state.headId;
    followDraft(draftKey("story", state), changed.has("opened"));
    if (changed.has("session") || changed.has("tree") || changed.has("opened")) {
      written = textOf(state);
      if (closer) lookCloser(Boolean(state.headId) && !isAnswering); // the text is another one now
      const shown = draft || written;
      if (!isAnswering && paper.value !== shown) paper.value = shown;
    }
    const leading = [...state.live.values()].find((live) => live.selects);
    if (leading) {
      const before = textOf({ turns: state.turns, path: pathBefore(state.path, leading) });
      paper.value = before + leading.prompt + leading.replies[0].text;
    }
    paper.readOnly = isAnswering;
    cards.replaceChildren(...cardElements(state));
    grow();
    if (isAnswering) announce(t("answering"));
  }

  /**
   * Takes the draft of the story that is shown now.
   * @param {string} key
   * @param {boolean} isOpened Whether another story was opened.
   */
  function followDraft(key, isOpened) {
    if (key === shownKey) return;
    if (isOpened) {
      visits++;
      draft = loadDraft(key);
    } else {
      // The first text created a session: what was typed since belongs to it.
      saveDraft(shownKey, "");
      saveDraft(key, draft);
    }
    shownKey = key;
  }

  /**
   * Continuations to choose from: those that are being generated, else the turns that follow the
   * head.
   * @param {State} state
   */
  function cardElements(state) {
    const growing = [...state.live.values()].find(
      (live) => !live.selects && live.replies.length > 1,
    );
    if (growing) return growing.replies.map(({ text }) => h("div.card.growing", {}, text || "…"));
    const children = state.turns.get(state.headId)?.children || [];
    return children
      .map((id) => turnOf(state.turns, id))
      .filter((turn) => !turn.frozen)
      .map((turn) => {
        const props = { type: "button", onclick: () => store.do.rollback(turn.id) };
        const button = h("button.quiet.small", props, icon("go"), t("choose"));
        return h("div.card", {}, h("p", {}, turn.prompt + turn.text), button);
      });
  }

  draw(store.state, new Set(["session"]));
  const unsubscribe = store.subscribe(draw);
  return {
    unmount() {
      visits++;
      unsubscribe();
    },
  };
}
