// The list of keys, on "?".

import { t } from "./i18n.js";
import { dialog, h } from "./ui.js";

const KEYS = [
  ["n", "key_new"],
  ["/", "key_search"],
  ["i", "key_focus"],
  ["u", "key_undo"],
  ["r", "key_redo"],
  ["t", "key_tree"],
  ["Esc", "key_stop"],
  ["?", "key_help"],
];

export function showKeys() {
  dialog(
    t("keys"),
    h(
      "dl.keys",
      {},
      KEYS.flatMap(([name, words]) => [h("dt", {}, h("kbd", {}, name)), h("dd", {}, t(words))]),
    ),
  );
}
