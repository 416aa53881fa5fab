// Markdown as elements. The HTML comes from the server, which has sanitized it; the rest of the
// page sets text only.

import { t } from "./i18n.js";
import { copy, h, iconButton, toast } from "./ui.js";

/** @import { Store } from "./store.js" */

/** @type {WeakMap<HTMLElement, string[]>} The blocks an element shows. */
const shown = new WeakMap();

/**
 * Shows blocks of HTML in an element, replacing only those that differ.
 * @param {HTMLElement} element
 * @param {string[]} blocks
 */
export function showBlocks(element, blocks) {
  const old = shown.get(element) || [];
  let same = 0;
  while (same < old.length && same < blocks.length && old[same] === blocks[same]) same++;
  while (element.children.length > same) element.lastElementChild?.remove();
  for (const html of blocks.slice(same)) {
    const box = document.createElement("div");
    box.innerHTML = html;
    element.append(box);
  }
  shown.set(element, blocks.slice());
}

/**
 * A finished text as markdown; plain until the server has rendered it.
 * @param {Store} store
 * @param {string} text
 */
export function markdownElement(store, text) {
  const box = h("div.markdown.plain", {}, h("div", {}, text));
  const show = () => {
    const blocks = store.renderer.blocks(text, show);
    if (!blocks) return;
    if (box.classList.contains("plain")) box.replaceChildren();
    box.classList.remove("plain");
    showBlocks(box, blocks);
    addCopyButtons(box);
  };
  show();
  return box;
}

/** @param {HTMLElement} box */
function addCopyButtons(box) {
  for (const pre of box.querySelectorAll("pre")) {
    if (pre.querySelector("button")) continue;
    pre.tabIndex = 0;
    pre.append(copyButton(() => pre.querySelector("code")?.textContent || pre.textContent || ""));
  }
}

/**
 * A button that copies text and says so.
 * @param {() => string} text
 */
export function copyButton(text) {
  return iconButton("copy", t("copy"), async () => {
    if (await copy(text())) toast(t("copied"), { seconds: 2 });
  });
}
