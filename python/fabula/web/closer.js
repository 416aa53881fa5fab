// A story looked at closely: the words of the model as the tokens they were drawn as. Pointing at one, or going there with the
// arrow keys, shows what else could stand there and how likely it was; choosing one branches the story off at it.

import { t } from "./i18n.js";
import { h } from "./ui.js";

const WAIT_MS = 120; // a pointer that only passes asks for nothing

/** @param leave called when a token was chosen, or Escape pressed. */
export function closerElement(store, leave) {
  const known = new Map(); // "turn:position" -> promise of alternatives
  const card = h("div.alternatives", { hidden: true, role: "group", "aria-label": t("closer") });
  const text = h("div.closer", { tabIndex: 0, role: "document", "aria-label": t("story") });
  const root = h("div.closer-box", {}, h("p.help", {}, t("closerHelp")), text, card);
  let shown = null,
    timer = 0;

  for (const id of store.state.path) {
    const turn = store.state.turns.get(id);
    if (turn.frozen) continue;
    const words = h("span.drawn", {}, turn.text);
    text.append(turn.prompt, words);
    if (turn.generated > 0 || turn.text) fill(words, turn);
  }

  async function fill(words, turn) {
    const tokens = await store.do.turnTokens(turn.id);
    if (!tokens) return;
    // The text may end before its last token: at a stop string, or in front of an end token.
    let left = turn.text.length;
    const spans = [];
    tokens.forEach((token, position) => {
      if (left <= 0 || !token.text) return;
      const shownText = token.text.slice(0, left);
      left -= shownText.length;
      const span = h(`span.token${/^\n+$/.test(shownText) ? ".newline" : ""}`, {}, shownText);
      span.dataset.turn = turn.id;
      span.dataset.position = position;
      spans.push(span);
    });
    words.replaceChildren(...spans);
  }

  async function show(span) {
    shown?.classList.remove("at");
    shown = span;
    span.classList.add("at");
    const { turn, position } = span.dataset,
      key = `${turn}:${position}`;
    if (!known.has(key)) known.set(key, store.do.alternatives(turn, Number(position)));
    const found = await known.get(key);
    if (shown !== span || !found) return;
    card.replaceChildren(
      ...found.map((one) =>
        h(
          `button${one.chosen ? ".chosen" : ""}`,
          {
            type: "button",
            onclick: () => {
              if (one.chosen) return;
              leave();
              store.do.forkAt(turn, Number(position), one.token_id);
            },
          },
          h("span", {}, JSON.stringify(one.text).slice(1, -1) || "∅"),
          h("span.quiet", {}, t("probability", { p: (Math.exp(one.logprob) * 100).toFixed(1) })),
        ),
      ),
    );
    card.hidden = false;
    const at = span.getBoundingClientRect(),
      box = root.getBoundingClientRect();
    card.style.setProperty(
      "left",
      `${Math.max(0, Math.min(at.left - box.left, box.width - card.offsetWidth))}px`,
    );
    card.style.setProperty("top", `${at.bottom - box.top + 2}px`);
  }

  const hide = () => {
    clearTimeout(timer);
    card.hidden = true;
    shown?.classList.remove("at");
    shown = null;
  };
  text.addEventListener("pointerover", (event) => {
    clearTimeout(timer);
    const span = event.target.closest(".token");
    if (span && span !== shown) timer = setTimeout(() => show(span), WAIT_MS);
  });
  text.addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (span) show(span);
  });
  root.addEventListener("pointerleave", hide);
  root.addEventListener("keydown", (event) => {
    const all = [...text.querySelectorAll(".token")],
      at = all.indexOf(shown),
      isInCard = card.contains(document.activeElement);
    if (event.key === "Escape") {
      if (isInCard) text.focus();
      else leave();
    } else if (isInCard && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      const next =
        document.activeElement[
          event.key === "ArrowDown" ? "nextElementSibling" : "previousElementSibling"
        ];
      next?.focus();
    } else if (!isInCard && (event.key === "ArrowRight" || event.key === "ArrowLeft") && all.length)
      show(
        all[
          Math.max(
            0,
            at < 0
              ? all.length - 1
              : Math.min(all.length - 1, at + (event.key === "ArrowRight" ? 1 : -1)),
          )
        ],
      );
    else if (!isInCard && (event.key === "Enter" || event.key === "ArrowDown") && !card.hidden)
      card.querySelector("button")?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return root;
}
