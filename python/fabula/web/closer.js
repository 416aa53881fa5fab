// A closer look at a story: the model's text as the tokens it was sampled as. Pointing at one, or
// going there with the arrow keys, shows the alternatives with their probabilities; choosing one
// branches off there.

import { t } from "./i18n.js";
import { visibleTokens } from "./story_text.js";
import { turnOf } from "./turns.js";
import { closest, h } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { Alternative, Turn } from "./types.js" */

const WAIT_MS = 120; // the pointer must rest this long on a token

/**
 * @param {Store} store
 * @param {() => void} leave Called when a token was chosen, or Escape pressed.
 */
export function closerElement(store, leave) {
  /** @type {Map<string, Promise<Alternative[] | undefined>>} By "turn:position". */
  const known = new Map();
  const card = h("div.alternatives", { hidden: true, role: "group", "aria-label": t("closer") });
  const text = h("div.closer", { tabIndex: 0, role: "document", "aria-label": t("story") });
  const root = h("div.closer-box", {}, h("p.help", {}, t("closerHelp")), text, card);
  /** @type {HTMLElement | null} */
  let shown = null;
  let timer = 0;

  for (const id of store.state.path) {
    const turn = turnOf(store.state.turns, id);
    if (turn.frozen) continue;
    const words = h("span.drawn", {}, turn.text);
    text.append(turn.prompt, words);
    if (turn.generated > 0 || turn.text) showTokens(words, turn);
  }

  /**
   * @param {HTMLElement} words
   * @param {Turn} turn
   */
  async function showTokens(words, turn) {
    const tokens = await store.do.turnTokens(turn.id);
    if (!tokens) return;
    const spans = visibleTokens(tokens, turn.text).map(({ text, position }) => {
      const span = h(/^\n+$/.test(text) ? "span.token.newline" : "span.token", {}, text);
      span.dataset.turn = turn.id;
      span.dataset.position = String(position);
      return span;
    });
    words.replaceChildren(...spans);
  }

  /** @param {HTMLElement} span */
  async function show(span) {
    shown?.classList.remove("at");
    shown = span;
    span.classList.add("at");
    const turn = span.dataset.turn || "";
    const position = Number(span.dataset.position);
    const key = `${turn}:${position}`;
    const asked = known.get(key) || store.do.alternatives(turn, position);
    known.set(key, asked);
    const found = await asked;
    if (shown !== span || !found) return;
    card.replaceChildren(...found.map((one) => alternativeButton(one, turn, position)));
    card.hidden = false;
    const at = span.getBoundingClientRect();
    const box = root.getBoundingClientRect();
    const left = Math.max(0, Math.min(at.left - box.left, box.width - card.offsetWidth));
    card.style.setProperty("left", `${left}px`);
    card.style.setProperty("top", `${at.bottom - box.top + 2}px`);
  }

  /**
   * @param {Alternative} alternative
   * @param {string} turn
   * @param {number} position
   */
  function alternativeButton({ text, logprob, chosen, token_id }, turn, position) {
    const onclick = () => {
      if (chosen) return;
      leave();
      store.do.forkAt(turn, position, token_id);
    };
    const percent = (Math.exp(logprob) * 100).toFixed(1);
    return h(
      chosen ? "button.chosen" : "button",
      { type: "button", onclick },
      h("span", {}, JSON.stringify(text).slice(1, -1) || "∅"),
      h("span.quiet", {}, t("probability", { p: percent })),
    );
  }

  function hide() {
    clearTimeout(timer);
    card.hidden = true;
    shown?.classList.remove("at");
    shown = null;
  }

  text.addEventListener("pointerover", (event) => {
    clearTimeout(timer);
    const span = closest(event, ".token");
    if (span && span !== shown) timer = window.setTimeout(() => show(span), WAIT_MS);
  });
  text.addEventListener("click", (event) => {
    const span = closest(event, ".token");
    if (span) show(span);
  });
  root.addEventListener("pointerleave", hide);
  root.addEventListener("keydown", (event) => {
    const handled = card.contains(document.activeElement)
      ? onCardKey(event.key)
      : onTextKey(event.key);
    if (!handled) return;
    event.preventDefault();
    event.stopPropagation();
  });

  /**
   * A key while an alternative has the focus. Returns whether it did something.
   * @param {string} key
   */
  function onCardKey(key) {
    const focused = document.activeElement;
    if (key === "Escape") text.focus();
    else if (key === "ArrowDown" || key === "ArrowUp") {
      const next =
        key === "ArrowDown" ? focused?.nextElementSibling : focused?.previousElementSibling;
      if (next instanceof HTMLElement) next.focus();
    } else return false;
    return true;
  }

  /**
   * A key while the text has the focus. Returns whether it did something.
   * @param {string} key
   */
  function onTextKey(key) {
    /** @type {HTMLElement[]} */
    const all = [...text.querySelectorAll(/** @type {"span"} */ (".token"))];
    if (key === "Escape") leave();
    else if ((key === "ArrowRight" || key === "ArrowLeft") && all.length) {
      const at = all.findIndex((span) => span === shown);
      const next = at < 0 ? all.length - 1 : at + (key === "ArrowRight" ? 1 : -1);
      show(all[Math.max(0, Math.min(all.length - 1, next))]);
    } else if ((key === "Enter" || key === "ArrowDown") && !card.hidden) {
      card.querySelector("button")?.focus();
    } else return false;
    return true;
  }

  return root;
}
