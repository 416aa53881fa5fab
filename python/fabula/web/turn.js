// One turn in the transcript: the message, the reply, its versions, and what can be done with it.

import { t } from "./i18n.js";
import { isOver } from "./live.js";
import { copyButton, markdownElement, showBlocks } from "./markdown.js";
import { treePanel } from "./page.js";
import { newestLeaf } from "./turns.js";
import { ask, h, icon, iconButton, menu, toast } from "./ui.js";

/** @import { WordKey } from "./i18n.js" */
/** @import { Store } from "./store.js" */
/** @import { FinishReason, Live, LiveReply, MenuItem, State, Turn } from "./types.js" */

/** @type {Record<FinishReason, WordKey>} */
const REASONS = {
  stop: "stop_reason",
  written: "written",
  length: "length",
  cancelled: "cancelled",
  timeout: "timeout",
  interrupted: "interrupted_reason",
};

/** @type {Set<string>} Ids of turns whose details are shown. */
const detailed = new Set();

/** @param {string} text */
const messageElement = (text) => h("div.said", {}, h("span.sr-only", {}, `${t("you")}: `), text);

/**
 * Lets the user edit a text in its place. Enter submits a message; a reply may have lines of its
 * own, so there it is Ctrl+Enter.
 * @param {HTMLElement} place What the form replaces while it is open.
 * @param {string} text
 * @param {{label: string, hasLines: boolean, change: (text: string) => void}} options
 */
function editInPlace(place, text, { label, hasLines, change }) {
  const nRows = Math.ceil(text.length / 80) + text.split("\n").length;
  const box = h("textarea", {
    value: text,
    rows: Math.min(hasLines ? 20 : 10, nRows),
    "aria-label": t("edit"),
  });
  const close = () => form.replaceWith(place);
  /** @param {SubmitEvent} event */
  const onsubmit = (event) => {
    event.preventDefault();
    close();
    if (box.value.trim() && box.value !== text) change(box.value);
  };
  /** @param {KeyboardEvent} event */
  const onkeydown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
    const submits = hasLines ? event.ctrlKey || event.metaKey : !event.shiftKey;
    if (event.key === "Enter" && submits && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  };
  const buttons = [
    h("button.primary", { type: "submit" }, label),
    h("button.quiet", { type: "button", onclick: close }, t("cancel")),
  ];
  /** @type {HTMLFormElement} */
  const form = h("form.edit", { onsubmit, onkeydown }, box, h("div.row", {}, buttons));
  place.replaceWith(form);
  box.focus();
}

/**
 * Figures of a reply, in one line.
 * @param {Turn} turn
 */
export function detailsText(turn) {
  return [
    t("generated", { n: turn.generated }),
    turn.tokens_per_s && t("tokensPerS", { n: turn.tokens_per_s.toFixed(1) }),
    turn.first_token_ms && t("firstToken", { ms: Math.round(turn.first_token_ms) }),
    t("computed", { n: turn.prompt_tokens }),
    t("reused", { n: turn.reused }),
    turn.recomputed && t("recomputed", { n: turn.recomputed }),
    t(turn.finish_reason ? REASONS[turn.finish_reason] : "stop_reason"),
    turn.seed !== null && t("seed", { n: turn.seed }),
  ]
    .filter(Boolean)
    .join(" · ");
}

/**
 * @param {Store} store
 * @param {Turn} turn
 * @param {string[]} siblings Ids of the turns with the same parent, this one among them.
 * @param {{isHead: boolean}} options
 */
export function turnElement(store, turn, siblings, { isHead }) {
  const root = h("article.turn", { "aria-label": `${t("model")}, ${turn.number}` });
  root.dataset.turn = turn.id;
  const details = h("p.details", { hidden: !detailed.has(turn.id) }, detailsText(turn));
  const isCut = turn.finish_reason !== "stop";
  const words = markdownElement(store, turn.text);
  const editReply = () =>
    editInPlace(words, turn.text, {
      label: t("keep"),
      hasLines: true,
      change: (text) => store.do.rewrite(turn.id, text),
    });
  const regenerate = () => store.do.regenerate();
  const continueReply = () => store.do.continueReply();
  const more = iconButton("more", t("more"), () =>
    menu(more, menuItems(store, turn, isHead, details)),
  );
  const tools = h(
    "div.tools",
    {},
    versionsElement(store, turn, siblings),
    copyButton(() => turn.text),
    iconButton("edit", t("editAnswer"), editReply),
    isHead && iconButton("again", t("regenerate"), regenerate),
    isHead &&
      isCut &&
      h(
        "button.quiet.small",
        { type: "button", onclick: continueReply },
        icon("go"),
        t("continueReply"),
      ),
    more,
    turn.tags.map((tag) => h("span.tag", {}, icon("tag"), tag)),
    isCut && h("span.reason", {}, t(REASONS[turn.finish_reason || "interrupted"])),
  );
  const label = h("span.sr-only", {}, `${t("model")}: `);
  root.append(promptElement(store, turn), h("div.answer", {}, label, words, tools, details));
  return root;
}

/**
 * @param {Store} store
 * @param {Turn} turn
 */
function promptElement(store, turn) {
  const message = h("div.message");
  if (!turn.prompt) return message;
  const edit = () =>
    editInPlace(message, turn.prompt, {
      label: t("save"),
      hasLines: false,
      change: (text) => store.do.edit(turn.id, text),
    });
  const tools = [iconButton("edit", t("edit"), edit), copyButton(() => turn.prompt)];
  message.append(messageElement(turn.prompt), h("div.tools.mine", {}, tools));
  return message;
}

/**
 * ‹ 2/3 ›: goes to another version of the turn, at its newest leaf.
 * @param {Store} store
 * @param {Turn} turn
 * @param {string[]} siblings
 */
function versionsElement(store, turn, siblings) {
  if (siblings.length < 2) return null;
  const at = siblings.indexOf(turn.id);
  const n = siblings.length;
  /** @param {number} by */
  const move = (by) => store.do.rollback(newestLeaf(store.state.turns, siblings[at + by]));
  return h(
    "span.versions",
    {},
    iconButton("left", t("previous"), () => move(-1), { disabled: at === 0 }),
    h("span", { title: t("version", { i: at + 1, n }) }, `${at + 1}/${n}`),
    iconButton("right", t("next"), () => move(1), { disabled: at === n - 1 }),
  );
}

/**
 * @param {Store} store
 * @param {Turn} turn
 * @param {boolean} isHead
 * @param {HTMLElement} details
 * @returns {MenuItem[]}
 */
function menuItems(store, turn, isHead, details) {
  const showDetails = () => {
    details.hidden = !details.hidden;
    if (details.hidden) detailed.delete(turn.id);
    else detailed.add(turn.id);
  };
  const branch = async () => {
    if (!isHead) await store.do.rollback(turn.id);
    store.do.branch(3);
    treePanel.toggle(true);
  };
  const fork = async () => {
    const id = await store.do.fork(turn.id);
    if (!id) return;
    toast(t("forked"), { seconds: 4 });
    location.hash = `#/chat/${id}`;
  };
  /** @type {MenuItem[]} */
  const items = [[t("details"), showDetails]];
  if (!isHead) items.push([t("backHere"), () => store.do.rollback(turn.id)]);
  items.push([t("alternatives", { n: 3 }), branch], [t("forkHere"), fork]);
  return [...items, ...tagItems(store, turn)];
}

/**
 * Menu items that name a turn and remove its names.
 * @param {Store} store
 * @param {Turn} turn
 * @returns {MenuItem[]}
 */
export function tagItems(store, turn) {
  const add = async () => {
    const name = await ask(t("tagName"), "");
    if (name) store.do.tag(turn.id, name.trim().slice(0, 60));
  };
  /**
   * @param {string} tag
   * @returns {MenuItem}
   */
  const removal = (tag) => [t("untag", { tag }), () => store.do.tag(turn.id, tag, true)];
  return [[t("tagTurn"), add], ...turn.tags.map(removal)];
}

// ---- Replies that have no turn ------------------------------------------------------------------

/**
 * A reply that is being generated. `update` shows how far it is.
 * @param {Live} live
 */
export function liveElement(live) {
  const parts = live.replies.map(() => ({
    markdown: h("div.markdown"),
    rest: h("span.rest"),
    speed: h("span.speed"),
  }));
  const broken = h("p.broken", { hidden: true }, t("reconnecting"));
  const replies = parts.map(({ markdown, rest, speed }) =>
    h("div.answer", {}, markdown, rest, h("div.tools", {}, speed)),
  );
  const element = h(
    "article.turn.live",
    {},
    live.prompt ? h("div.message", {}, messageElement(live.prompt)) : null,
    h(replies.length > 1 ? "div.answers.many" : "div.answers", {}, replies),
    broken,
  );
  /** @param {Live} now */
  const update = (now) => {
    broken.hidden = !now.broken || isOver(now);
    now.replies.forEach((reply, i) => {
      const { markdown, rest, speed } = parts[i];
      showBlocks(markdown, reply.blocks);
      const isWaiting = !reply.text && !reply.done;
      rest.textContent = isWaiting ? t("thinking") : reply.text.slice(reply.shown || 0);
      rest.classList.toggle("waiting", isWaiting);
      speed.textContent = speedText(reply, performance.now()) || speed.textContent;
    });
  };
  return { element, update };
}

/**
 * Tokens per second of a reply that is being generated; "" while it is too early to say.
 * @param {LiveReply} reply
 * @param {number} now
 */
export function speedText(reply, now) {
  if (!reply.nTokens) return "";
  reply.firstAt ??= now;
  const seconds = (now - reply.firstAt) / 1000;
  if (reply.nTokens <= 8 || reply.done || !seconds) return "";
  return t("tokensPerS", { n: ((reply.nTokens - 1) / seconds).toFixed(0) });
}

/**
 * What was seen of a reply that the server lost when it ended. The text stays and its message can
 * be sent again.
 * @param {Store} store
 * @param {NonNullable<State["lost"]>} lost
 */
export function lostElement(store, lost) {
  const onclick = () => store.do.send(lost.prompt);
  const button = h("button.quiet.small", { type: "button", onclick }, icon("again"), t("askAgain"));
  return h(
    "article.turn.lost",
    {},
    h("div.message", {}, messageElement(lost.prompt)),
    h(
      "div.answer",
      {},
      h("div.rest", {}, lost.text),
      h("p.broken", {}, t("lost")),
      h("div.tools", {}, button),
    ),
  );
}
