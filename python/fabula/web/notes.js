// Notes and lore of a story: what the model reads and the story does not show. Each is a turn of
// the tree that never changes, so its prefill is paid once. Editing a note makes another branch:
// the tree keeps both.

import { t } from "./i18n.js";
import { endedNote, piecesOf } from "./story_text.js";
import { turnOf } from "./turns.js";
import { dialog, h, iconButton } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { State, Turn } from "./types.js" */

/** @param {State} state */
const pathOf = (state) => state.path.map((id) => turnOf(state.turns, id));

/**
 * How many turns of the path come before the story's own words: notes.
 * @param {State} state
 */
function nNotesInFront(state) {
  const first = pathOf(state).findIndex((turn) => !turn.frozen);
  return first < 0 ? state.path.length : first;
}

/** @param {State} state */
const hasStarted = (state) => nNotesInFront(state) < state.path.length;

/**
 * Writes the path again after its first `n` turns: `note` first, and without the turn `left`. What
 * the model wrote becomes plain text there.
 * @param {Store} store
 * @param {number} n
 * @param {string | null} note
 * @param {string | null} [left]
 */
async function writeAgain(store, n, note, left = null) {
  const { state } = store;
  const rest = pathOf(state)
    .slice(n)
    .filter((turn) => turn.id !== left);
  const pieces = piecesOf(rest, note);
  await store.do.rollback(state.path[n - 1] || "");
  for (const { text, frozen } of pieces) {
    if (!(await store.do.write(text, frozen))) return;
  }
}

/** @param {Store} store */
export function openNotes(store) {
  const list = h("ul.notes");
  const help = h("p.help", {}, t("noteFrontHelp"));
  const box = h("textarea", {
    rows: 4,
    placeholder: t("notePlaceholder"),
    "aria-label": t("notes"),
    id: "note",
  });

  /** @param {(note: string) => Promise<unknown>} add */
  async function add(add) {
    const text = box.value;
    if (!text.trim()) return;
    box.value = "";
    if ((await add(endedNote(text))) === false) box.value = text;
  }
  const addHere = () => add((note) => store.do.write(note, true));
  const addInFront = () => {
    if (!hasStarted(store.state)) return addHere();
    return add((note) => writeAgain(store, nNotesInFront(store.state), note));
  };
  const front = h(
    "button.primary",
    { type: "button", id: "note-front", onclick: addInFront },
    t("noteAdd"),
  );
  const fromHere = h(
    "button.button",
    { type: "button", id: "note-here", onclick: addHere },
    t("noteAddHere"),
  );

  /** @param {Turn} turn */
  function edit(turn) {
    const box = h("textarea", {
      rows: 6,
      value: turn.prompt.trimEnd(),
      "aria-label": t("noteEdit"),
    });
    /** @param {string | null} note null removes it. */
    const change = (note) => {
      close();
      const at = store.state.path.indexOf(turn.id);
      if (at >= 0) writeAgain(store, at, note, turn.id);
    };
    /** @param {SubmitEvent} event */
    const onsubmit = (event) => {
      event.preventDefault();
      if (box.value.trim()) change(endedNote(box.value));
      else close();
    };
    const buttons = [
      h("button.primary", { type: "submit" }, t("keep")),
      h("button.quiet", { type: "button", onclick: () => change(null) }, t("noteRemove")),
    ];
    const form = h("form.ask", { onsubmit }, box, h("div.row", {}, buttons));
    const close = dialog(t("noteEdit"), form);
  }

  /** @param {State} state */
  function draw(state) {
    const notes = pathOf(state).filter((turn) => turn.frozen);
    const rows = notes.map((turn) =>
      h(
        "li",
        {},
        h("span", {}, turn.prompt.trim()),
        iconButton("edit", t("noteEdit"), () => edit(turn)),
      ),
    );
    list.replaceChildren(...rows);
    help.hidden = fromHere.hidden = !hasStarted(state);
    front.disabled = fromHere.disabled = state.live.size > 0;
  }

  draw(store.state);
  const unsubscribe = store.subscribe(draw);
  const buttons = h("div.row", {}, front, fromHere);
  const content = h("div.notes-box", {}, h("p.help", {}, t("notesHelp")), list, box, help, buttons);
  dialog(t("notes"), content, { onclose: unsubscribe });
}
