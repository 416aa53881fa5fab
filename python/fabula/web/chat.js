// The chat: the turns from the first to the head, replies that are being generated, and the
// composer.

import { mountComposer } from "./composer.js";
import { t } from "./i18n.js";
import { pathBefore } from "./live.js";
import { announce, treePanel } from "./page.js";
import { openSettings } from "./settings.js";
import { liveElement, lostElement, turnElement } from "./turn.js";
import { siblingsOf, turnOf } from "./turns.js";
import { h, iconButton } from "./ui.js";

/** @import { WordKey } from "./i18n.js" */
/** @import { Store } from "./store.js" */
/** @import { Live, State, View } from "./types.js" */

/** @typedef {{element: HTMLElement, mark: string, update?: (live: Live) => void}} Shown `mark` changes with its content. */

const MAX_SHOWN = 300; // elements that are kept although they are not shown
const NEAR_END_PX = 60; // so near to its end the transcript follows a reply that grows

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @returns {View}
 */
export function mountChat(root, store) {
  const title = h("h1");
  const fill = h("i");
  const bar = h(
    "div.context-bar",
    { role: "meter", "aria-label": t("context"), "aria-valuemin": 0, "aria-valuemax": 100 },
    fill,
  );
  const treeButton = iconButton("tree", t("showTree"), () => treePanel.toggle(), {
    id: "tree-button",
  });
  const settings = iconButton("tune", t("settings"), () => openSettings(store), {
    id: "settings-button",
  });
  const log = h("div.log", { role: "log", "aria-live": "off", "aria-label": t("chat") });
  const scroller = h("div.scroller", { tabIndex: 0, "aria-label": t("chat") }, log);
  const foot = h("div.composer-box");
  root.append(h("header.view-head", {}, title, bar, treeButton, settings), scroller, foot);

  /** @type {Map<string, Shown>} By turn id, stream id or a name. */
  const shown = new Map();
  let wasAnswering = false;
  let isAtEnd = true;
  let shownId = store.state.session?.session_id;
  const composer = mountComposer(foot, store, () => {
    isAtEnd = true;
  });
  scroller.addEventListener("scroll", () => {
    isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
  });

  /**
   * The element that is shown for a key; made again when its mark is another.
   * @param {string} key
   * @param {string} mark
   * @param {() => Pick<Shown, "element" | "update">} make
   */
  function keep(key, mark, make) {
    const known = shown.get(key);
    // A change that is being written stays, whatever happens to its turn meanwhile.
    if (known && (known.mark === mark || known.element.querySelector("form.edit"))) return known;
    const made = { ...make(), mark };
    shown.set(key, made);
    return made;
  }

  function welcome() {
    /** @type {WordKey[]} */
    const starters = ["starter1", "starter2", "starter3"];
    const buttons = starters.map((key) =>
      h("button.starter", { type: "button", onclick: () => composer.send(t(key)) }, t(key)),
    );
    return h(
      "section.welcome",
      {},
      h("img", { src: "/static/icon.svg", alt: "", width: 44, height: 44 }),
      h("p.lead", {}, t("welcome1")),
      h("p", {}, t("welcome2")),
      h("p", {}, t("welcome3")),
      h("div.starters", {}, buttons),
    );
  }

  /**
   * Everything the transcript shows, in order.
   * @param {State} state
   */
  function contents(state) {
    const lives = [...state.live.values()];
    const leading = lives.find((live) => live.selects);
    const path = pathBefore(state.path, leading);
    const hasTurns = Boolean(state.session && state.turns.size);
    /** @type {Shown[]} */
    const wanted = [];
    if (!path.length && !lives.length && !hasTurns) {
      wanted.push(keep("welcome", "1", () => ({ element: welcome() })));
    }
    for (const id of path) {
      const turn = turnOf(state.turns, id);
      const siblings = siblingsOf(state.turns, turn);
      const isHead = id === state.headId && !leading;
      const mark = JSON.stringify([
        turn.text.length,
        siblings,
        turn.tags,
        isHead,
        turn.finish_reason,
      ]);
      wanted.push(
        keep(id, mark, () => ({ element: turnElement(store, turn, siblings, { isHead }) })),
      );
    }
    for (const live of lives) {
      const made = keep(live.streamId, "live", () => liveElement(live));
      made.update?.(live);
      wanted.push(made);
    }
    const { lost } = state;
    if (lost) wanted.push(keep("lost", lost.text, () => ({ element: lostElement(store, lost) })));
    if (!lives.length && !lost && hasTurns && !path.length) {
      wanted.push(keep("start", "1", () => ({ element: h("p.at-start", {}, t("start")) })));
    }
    return wanted;
  }

  /** @param {State} state */
  function draw(state) {
    const wanted = contents(state).map((one) => one.element);
    const isWanted = new Set(wanted);
    wanted.forEach((element, i) => {
      if (log.children[i] !== element) log.insertBefore(element, log.children[i] || null);
    });
    while (log.children.length > wanted.length) log.lastElementChild?.remove();
    for (const [key, { element }] of shown) {
      if (shown.size > MAX_SHOWN && !isWanted.has(element)) shown.delete(key);
    }
    const isAnswering = state.live.size > 0;
    log.setAttribute("aria-busy", String(isAnswering));
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
    if (wasAnswering !== isAnswering) announce(t(isAnswering ? "answering" : "answered"));
    wasAnswering = isAnswering;
  }

  /** @param {State} state */
  function drawHead({ session, count }) {
    title.textContent = session ? session.title || t("untitled") : t("newChat");
    treeButton.hidden = !session;
    treeButton.setAttribute("aria-pressed", String(treePanel.isShown));
    const share = count ? Math.min(1, count.prompt_tokens / count.context) : 0;
    bar.hidden = !count || !session;
    fill.style.setProperty("inline-size", `${share * 100}%`);
    bar.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    bar.classList.toggle("full", share > 0.9);
    if (count) bar.title = t("contextBar", { used: count.prompt_tokens, all: count.context });
  }

  draw(store.state);
  drawHead(store.state);
  const unsubscribe = store.subscribe((state, changed) => {
    const id = state.session?.session_id;
    if (changed.has("opened") && id !== shownId) {
      shown.clear();
      isAtEnd = true;
    }
    shownId = id;
    if (changed.has("tree") || changed.has("live") || changed.has("session")) draw(state);
    if (changed.has("session") || changed.has("count") || changed.has("tree")) drawHead(state);
  });
  return {
    unmount() {
      unsubscribe();
      composer.unmount();
    },
  };
}
