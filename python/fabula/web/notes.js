// Notes and lore of a story: what the model reads and the story does not show. Each is a turn of the tree that stays as it
// is, so that what it costs is paid once. Changing one is another way the story could have been told: the tree keeps both.

import { t } from "./i18n.js";
import { dialog, h, iconButton } from "./ui.js";

const spaced = (text) => (/\n\s*$/.test(text) ? text : `${text.trimEnd()}\n\n`);
const notesOf = (state) =>
  state.path.map((id) => state.turns.get(id)).filter((turn) => turn.frozen);
const hasBegun = (state) => state.path.some((id) => !state.turns.get(id).frozen);

/**
 * Tells the path again behind its first `n` turns: `first` before the rest, without the turn `left`. What the model wrote
 * becomes plain text there.
 */
async function retell(store, n, first, left = null) {
  const state = store.state,
    rest = state.path
      .slice(n)
      .filter((id) => id !== left)
      .map((id) => state.turns.get(id));
  const pieces = first ? [{ frozen: true, text: first }] : [];
  for (const turn of rest) {
    const text = turn.prompt + turn.text,
      last = pieces.at(-1);
    if (last && !last.frozen && !turn.frozen) last.text += text;
    else pieces.push({ frozen: turn.frozen, text });
  }
  await store.do.rollback(state.path[n - 1] || 0);
  for (const piece of pieces) if (!(await store.do.write(piece.text, piece.frozen))) return;
}

export function openNotes(store) {
  const list = h("ul.notes"),
    help = h("p.help", {}, t("noteFrontHelp"));
  const box = h("textarea", {
    rows: 4,
    placeholder: t("notePlaceholder"),
    "aria-label": t("notes"),
    id: "note",
  });
  const take = async (add) => {
    const text = box.value;
    if (!text.trim()) return;
    box.value = "";
    if ((await add(spaced(text))) === false) box.value = text;
  };
  const front = h(
    "button.primary",
    {
      type: "button",
      id: "note-front",
      onclick: () =>
        take((text) =>
          hasBegun(store.state) ? retell(store, frontLength(), text) : store.do.write(text, true),
        ),
    },
    t("noteAdd"),
  );
  const hereOn = h(
    "button.button",
    { type: "button", id: "note-here", onclick: () => take((text) => store.do.write(text, true)) },
    t("noteAddHere"),
  );
  const frontLength = () => {
    const at = store.state.path.findIndex((id) => !store.state.turns.get(id).frozen);
    return at < 0 ? store.state.path.length : at;
  };

  function change(turn) {
    const words = h("textarea", {
      rows: 6,
      value: turn.prompt.trimEnd(),
      "aria-label": t("noteEdit"),
    });
    const at = () => store.state.path.indexOf(turn.id);
    const close = dialog(
      t("noteEdit"),
      h(
        "form.ask",
        {
          onsubmit: (event) => {
            event.preventDefault();
            close();
            if (words.value.trim() && at() >= 0) retell(store, at(), spaced(words.value), turn.id);
          },
        },
        words,
        h(
          "div.row",
          {},
          h("button.primary", { type: "submit" }, t("keep")),
          h(
            "button.quiet",
            {
              type: "button",
              onclick: () => {
                close();
                if (at() >= 0) retell(store, at(), null, turn.id);
              },
            },
            t("noteRemove"),
          ),
        ),
      ),
    );
  }

  function draw(state) {
    list.replaceChildren(
      ...notesOf(state).map((turn) =>
        h(
          "li",
          {},
          h("span", {}, turn.prompt.trim()),
          iconButton("edit", t("noteEdit"), () => change(turn)),
        ),
      ),
    );
    help.hidden = hereOn.hidden = !hasBegun(state);
    front.disabled = hereOn.disabled = state.live.size > 0;
  }
  draw(store.state);
  const leave = store.subscribe(draw);
  dialog(
    t("notes"),
    h(
      "div.notes-box",
      {},
      h("p.help", {}, t("notesHelp")),
      list,
      box,
      help,
      h("div.row", {}, front, hereOn),
    ),
    { onclose: leave },
  );
}
