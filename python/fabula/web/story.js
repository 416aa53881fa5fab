// The story: one growing text. The reader writes, the model goes on, and the tree keeps every way it could have gone.
//
// The text on the page is that of the path. Words added behind its end are told to the model with the next continuation. A
// change further up goes back to the turn before the change and tells the rest again as one piece: nothing is overwritten,
// the old way stays in the tree.

import { page } from "./app.js";
import { closerElement } from "./closer.js";
import { draftKey, draftOf, keepDraft } from "./drafts.js";
import { t } from "./i18n.js";
import { openNotes } from "./notes.js";
import { openSettings } from "./settings.js";
import { download, h, icon, iconButton, menu } from "./ui.js";

const WAYS = 3,
  PIECE = 60; // ways offered at once; tokens of a piece, unless the settings say how long

export function mountStory(root, store) {
  const paper = h("textarea.paper", {
    "aria-label": t("story"),
    placeholder: t("storyPlaceholder"),
    spellcheck: false,
    id: "paper",
  });
  const cards = h("div.cards", { "aria-live": "off" });
  const words = h("span.quiet");
  const title = h("h1");
  const on = h(
    "button.primary",
    { type: "button", id: "write-on", onclick: () => writeOn(1) },
    t("writeOn"),
  );
  const ways = h(
    "button.button",
    { type: "button", id: "ways", onclick: () => writeOn(WAYS) },
    t("ways", { n: WAYS }),
  );
  const back = iconButton("back", t("undoStory"), () => {
    const state = store.state;
    if (state.headId) store.do.rollback(state.turns.get(state.headId)?.parent_id || 0);
  });
  const more = iconButton("more", t("more"), () =>
    menu(more, [
      [
        t("chapter"),
        () => {
          paper.value = `${paper.value.trimEnd()}\n\n## `;
          keep();
          paper.focus();
        },
      ],
      [t("redoStory"), () => store.do.redo()],
      null,
      [
        t("exportText"),
        () =>
          download(
            "story.md",
            `# ${store.state.session?.title || t("untitled")}\n\n${paper.value.trim()}\n`,
            "text/markdown",
          ),
      ],
      [
        t("exportTxt"),
        () => download("story.txt", `${paper.value.trim().replace(/^## /gm, "")}\n`, "text/plain"),
      ],
      [
        t("tree"),
        () => {
          if (store.state.session) location.hash = `#/tree/${store.state.session.session_id}`;
        },
      ],
    ]),
  );
  const closer = h(
    "button.button",
    { type: "button", id: "closer", "aria-pressed": "false", onclick: () => lookCloser(!close) },
    t("closer"),
  );
  const notes = h(
    "button.quiet.small",
    { type: "button", id: "notes", onclick: () => openNotes(store) },
    icon("book"),
    t("notes"),
  );
  const help = h("p.help", {}, t("storyHelp"));
  let close = null; // the closer look, while it lasts
  root.append(
    h(
      "header.view-head",
      {},
      title,
      words,
      notes,
      iconButton("tune", t("storyStart"), () => openSettings(store)),
      more,
    ),
    h("div.scroller.story", {}, help, paper, cards),
    h("div.story-foot", {}, on, ways, closer, back),
  );

  // Notes are read by the model and are no part of the story.
  const partOf = (turn) => (turn.frozen ? "" : turn.prompt + turn.text);
  const textOf = (state) => state.path.map((id) => partOf(state.turns.get(id))).join("");
  let told = ""; // what the turns of the path say
  let shownKey = draftKey("story", store.state),
    visits = 0;
  let draft = draftOf(shownKey); // words that differ from it, as long as they are not told

  function grow() {
    paper.style.setProperty("block-size", "auto");
    paper.style.setProperty("block-size", `${paper.scrollHeight + 8}px`);
    words.textContent = t("wordsOf", { n: (paper.value.match(/\S+/g) || []).length });
  }
  function remember(key, text) {
    draft = text;
    keepDraft(key, text);
  }
  function keep() {
    remember(shownKey, paper.value === told ? "" : paper.value);
    grow();
  }
  paper.addEventListener("input", keep);
  paper.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      writeOn(1);
    }
  });

  const length = () => (store.state.session || store.state.draft).sampling.max_tokens ?? PIECE;

  /** What must be said so that the path says `text`: the turn to go back to, and the words behind it. */
  function difference(state, text) {
    let at = 0,
      turn = "";
    for (const id of state.path) {
      const part = partOf(state.turns.get(id));
      if (!text.startsWith(part, at)) break;
      at += part.length;
      turn = id;
    }
    return { turn, rest: text.slice(at) };
  }

  async function writeOn(n) {
    const state = store.state;
    if (state.live.size) {
      store.do.stop();
      return;
    }
    const cursor =
      document.activeElement === paper &&
      paper.selectionStart < paper.value.length &&
      paper.selectionStart > 0
        ? paper.selectionStart
        : paper.value.length;
    const text = paper.value
      .slice(0, cursor)
      .replace(/\s+$/, (end) => (end.includes("\n") ? end : ""));
    if (!text.trim()) {
      paper.focus();
      return;
    }
    const { turn, rest } = difference(state, text);
    // Words behind the cursor that the tree has are dropped; those that were never told stay behind what is told now.
    const untold = difference(state, paper.value).rest.length,
      behind = paper.value.slice(Math.max(text.length, paper.value.length - untold));
    const mine = visits;
    if (state.session && turn !== state.headId) await store.do.rollback(turn || 0);
    // Several ways need a turn to begin from: the words are put there first.
    const isTold =
      n === 1
        ? await store.do.tell(rest, { max_tokens: length() })
        : !rest || (await store.do.write(rest));
    if (mine !== visits) return; // another story is shown by now
    if (!isTold) {
      draw(store.state, new Set(["tree"]));
      return;
    } // refused: the draft is still there
    const all = textOf(store.state) + behind;
    remember(shownKey, behind.trim() ? all : "");
    if (n > 1) await store.do.branch(n, null, { max_tokens: length() });
    draw(store.state, new Set(["tree"]));
  }

  /** Shows the words as tokens, with what else could stand there; or the paper again. */
  function lookCloser(wanted) {
    close?.remove();
    close = wanted
      ? closerElement(store, () => {
          lookCloser(false);
          paper.focus();
        })
      : null;
    if (close) paper.before(close);
    paper.hidden = help.hidden = Boolean(close);
    closer.setAttribute("aria-pressed", String(Boolean(close)));
    closer.textContent = t(close ? "closerLeave" : "closer");
    if (close) close.querySelector(".closer").focus();
    else grow();
  }

  function draw(state, changed) {
    title.textContent = state.session?.title || t("newStory");
    const busy = state.live.size > 0;
    on.textContent = busy ? t("stop") : t("writeOn");
    ways.disabled = busy;
    closer.disabled = busy || !state.headId;
    back.disabled = !state.headId || busy;
    const key = draftKey("story", state);
    if (key !== shownKey) {
      const words = draft;
      if (changed.has("opened")) {
        visits++;
        draft = draftOf(key);
      } else {
        keepDraft(shownKey, "");
        remember(key, words);
      } // the first words began a session
      shownKey = key;
    }
    if (changed.has("session") || changed.has("tree") || changed.has("opened")) {
      told = textOf(state);
      if (close) lookCloser(Boolean(state.headId) && !busy); // the words are others now
      const shown = draft || told;
      if (!busy && paper.value !== shown) paper.value = shown;
    }
    const lives = [...state.live.values()];
    const single = lives.find((live) => live.selects);
    if (single) {
      const at = single.parentId
        ? state.path.slice(0, state.path.indexOf(single.parentId) + 1)
        : [];
      paper.value = textOf({ ...state, path: at }) + single.prompt + single.answers[0].text;
    }
    paper.readOnly = busy;
    const choices = [];
    const many = lives.find((live) => !live.selects && live.answers.length > 1);
    if (many)
      many.answers.forEach((answer) => choices.push(h("div.card.growing", {}, answer.text || "…")));
    else if (state.headId)
      for (const id of state.turns.get(state.headId)?.children || []) {
        const turn = state.turns.get(id);
        if (!turn.frozen)
          choices.push(
            h(
              "div.card",
              {},
              h("p", {}, turn.prompt + turn.text),
              h(
                "button.quiet.small",
                { type: "button", onclick: () => store.do.rollback(id) },
                icon("go"),
                t("choose"),
              ),
            ),
          );
      }
    cards.replaceChildren(...choices);
    grow();
    if (busy) page.say(t("answering"));
  }
  draw(store.state, new Set(["session"]));
  const leave = store.subscribe(draw);
  return {
    unmount() {
      visits++;
      leave();
    },
  };
}
