// One turn as the transcript shows it: what was said, the answer, its versions, and what can be done with it.

import { page } from "./app.js";
import { t } from "./i18n.js";
import { showBlocks } from "./render.js";
import { ask, copy, h, icon, iconButton, menu, toast } from "./ui.js";

const seconds = (ms) => Math.round(ms);
const detailed = new Set(); // turns whose details are shown

/** An answer's text as markdown, plain until the server has rendered it. */
function textElement(store, text) {
  const box = h("div.markdown");
  const show = () => {
    const blocks = store.renderer.blocks(text, show);
    if (blocks) {
      box.classList.remove("plain");
      showBlocks(box, blocks);
      addCopyButtons(box);
    }
  };
  const blocks = store.renderer.blocks(text, show);
  if (blocks) {
    showBlocks(box, blocks);
    addCopyButtons(box);
  } else {
    box.classList.add("plain");
    box.append(h("div", {}, text));
  }
  return box;
}

function addCopyButtons(box) {
  for (const code of box.querySelectorAll("pre")) {
    if (code.querySelector("button")) continue;
    code.tabIndex = 0;
    code.append(
      iconButton("copy", t("copy"), async () => {
        if (await copy(code.querySelector("code")?.textContent || code.textContent))
          toast(t("copied"), { seconds: 2 });
      }),
    );
  }
}

function said(text) {
  return h("div.said", {}, h("span.sr-only", {}, `${t("you")}: `), text);
}

export function turnElement(store, turn, beside, { isHead }) {
  const root = h("article.turn", { "aria-label": `${t("model")}, ${turn.number}` });
  root.dataset.turn = turn.id;
  const at = beside.indexOf(turn.id);

  /** Lets words be changed in their place; Enter sends a message, an answer may have lines of its own. */
  function editing(place, text, label, hasLines, change) {
    const box = h("textarea", {
      value: text,
      rows: Math.min(hasLines ? 20 : 10, Math.ceil(text.length / 80) + text.split("\n").length),
      "aria-label": t("edit"),
    });
    const done = () => {
      form.replaceWith(place);
    };
    const form = h(
      "form.edit",
      {
        onsubmit: (event) => {
          event.preventDefault();
          done();
          if (box.value.trim() && box.value !== text) change(box.value);
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            done();
          }
          if (
            event.key === "Enter" &&
            (hasLines ? event.ctrlKey || event.metaKey : !event.shiftKey) &&
            !event.isComposing
          ) {
            event.preventDefault();
            form.requestSubmit();
          }
        },
      },
      box,
      h(
        "div.row",
        {},
        h("button.primary", { type: "submit" }, label),
        h("button.quiet", { type: "button", onclick: done }, t("cancel")),
      ),
    );
    place.replaceWith(form);
    box.focus();
  }

  const message = h(
    "div.message",
    {},
    turn.prompt ? said(turn.prompt) : null,
    turn.prompt
      ? h(
          "div.tools.mine",
          {},
          iconButton("edit", t("edit"), () =>
            editing(message, turn.prompt, t("save"), false, (text) => store.do.edit(turn.id, text)),
          ),
          iconButton("copy", t("copy"), async () => {
            if (await copy(turn.prompt)) toast(t("copied"), { seconds: 2 });
          }),
        )
      : null,
  );

  const move = (by) => {
    // The version's own last word: its newest descendant.
    let id = beside[at + by];
    for (
      let next = store.state.turns.get(id);
      next?.children.length;
      next = store.state.turns.get(id)
    )
      id = next.children.at(-1);
    store.do.rollback(id);
  };
  const versions =
    beside.length > 1
      ? h(
          "span.versions",
          {},
          iconButton("left", t("previous"), () => move(-1), { disabled: at === 0 }),
          h(
            "span",
            { title: t("version", { i: at + 1, n: beside.length }) },
            `${at + 1}/${beside.length}`,
          ),
          iconButton("right", t("next"), () => move(1), { disabled: at === beside.length - 1 }),
        )
      : null;

  const reasons = {
    stop: "stop_reason",
    written: "written",
    length: "length",
    cancelled: "cancelled",
    timeout: "timeout",
    interrupted: "interrupted_reason",
  };
  const details = h(
    "p.details",
    { hidden: !detailed.has(turn.id) },
    [
      t("generated", { n: turn.generated }),
      turn.tokens_per_s ? t("tokensPerS", { n: turn.tokens_per_s.toFixed(1) }) : "",
      turn.first_token_ms ? t("firstToken", { ms: seconds(turn.first_token_ms) }) : "",
      t("computed", { n: turn.prompt_tokens }),
      t("reused", { n: turn.reused }),
      turn.recomputed ? t("recomputed", { n: turn.recomputed }) : "",
      t(reasons[turn.finish_reason] || "stop_reason"),
      turn.seed !== null ? t("seed", { n: turn.seed }) : "",
    ]
      .filter(Boolean)
      .join(" · "),
  );

  const more = iconButton("more", t("more"), () =>
    menu(
      more,
      [
        [
          t("details"),
          () => {
            details.hidden = !details.hidden;
            details.hidden ? detailed.delete(turn.id) : detailed.add(turn.id);
          },
        ],
        isHead ? null : [t("backHere"), () => store.do.rollback(turn.id)],
        [
          t("alternatives", { n: 3 }),
          async () => {
            if (!isHead) await store.do.rollback(turn.id);
            store.do.branch(3);
            page.toggleTree(true);
          },
        ],
        [
          t("forkHere"),
          async () => {
            const id = await store.do.fork(turn.id);
            if (id) {
              toast(t("forked"), { seconds: 4 });
              location.hash = `#/chat/${id}`;
            }
          },
        ],
        [
          t("tagTurn"),
          async () => {
            const name = await ask(t("tagName"), "");
            if (name) store.do.tag(turn.id, name.trim().slice(0, 60));
          },
        ],
        ...turn.tags.map((tag) => [t("untag", { tag }), () => store.do.tag(turn.id, tag, true)]),
      ].filter((item, i, all) => item !== null || all[i - 1]),
    ),
  );

  const isCut = turn.finish_reason !== "stop",
    words = textElement(store, turn.text);
  const tools = h(
    "div.tools",
    {},
    versions,
    iconButton("copy", t("copy"), async () => {
      if (await copy(turn.text)) toast(t("copied"), { seconds: 2 });
    }),
    iconButton("edit", t("editAnswer"), () =>
      editing(words, turn.text, t("keep"), true, (text) => store.do.rewrite(turn.id, text)),
    ),
    isHead ? iconButton("again", t("regenerate"), () => store.do.regenerate()) : null,
    isHead && isCut
      ? h(
          "button.quiet.small",
          { type: "button", onclick: () => store.do.continueReply() },
          icon("go"),
          t("continueReply"),
        )
      : null,
    more,
    turn.tags.map((tag) => h("span.tag", {}, icon("tag"), tag)),
    isCut ? h("span.reason", {}, t(reasons[turn.finish_reason] || "interrupted_reason")) : null,
  );
  root.append(
    message,
    h("div.answer", {}, h("span.sr-only", {}, `${t("model")}: `), words, tools, details),
  );
  return root;
}

/** An answer that is being made. `update` shows how far it is. */
export function liveElement(store, live) {
  const bodies = live.answers.map(() => ({
    markdown: h("div.markdown"),
    rest: h("span.rest"),
    speed: h("span.speed"),
  }));
  const broken = h("p.broken", { hidden: true }, t("reconnecting"));
  const root = h(
    "article.turn.live",
    {},
    live.prompt ? h("div.message", {}, said(live.prompt)) : null,
    h(
      `div.answers${live.answers.length > 1 ? ".many" : ""}`,
      {},
      bodies.map((body) =>
        h("div.answer", {}, body.markdown, body.rest, h("div.tools", {}, body.speed)),
      ),
    ),
    broken,
  );
  root.update = (now) => {
    broken.hidden = !now.broken || now.answers.every((answer) => answer.done);
    now.answers.forEach((answer, i) => {
      const { markdown, rest, speed } = bodies[i];
      showBlocks(markdown, answer.blocks);
      rest.textContent = answer.text
        ? answer.text.slice(answer.shown || 0)
        : answer.done
          ? ""
          : t("thinking");
      rest.classList.toggle("waiting", !answer.text && !answer.done);
      if (answer.nTokens === 1) answer.firstAt = performance.now();
      const taken = (performance.now() - (answer.firstAt || performance.now())) / 1000;
      if (answer.nTokens > 8 && !answer.done)
        speed.textContent = t("tokensPerS", { n: ((answer.nTokens - 1) / taken).toFixed(0) });
    });
  };
  return root;
}

/** What was seen of an answer that the server lost when it ended: the words stay, and can be asked for again. */
export function lostElement(store, lost) {
  return h(
    "article.turn.lost",
    {},
    h("div.message", {}, said(lost.prompt)),
    h(
      "div.answer",
      {},
      h("div.rest", {}, lost.text),
      h("p.broken", {}, t("lost")),
      h(
        "div.tools",
        {},
        h(
          "button.quiet.small",
          { type: "button", onclick: () => store.do.send(lost.prompt) },
          icon("again"),
          t("askAgain"),
        ),
      ),
    ),
  );
}
