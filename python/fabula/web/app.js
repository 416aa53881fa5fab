// Puts the page together: the list of conversations, the view that the address asks for, the tree
// next to a chat, keyboard shortcuts and notices. No other module imports this one.

import { key } from "./api.js";
import { mountChat } from "./chat.js";
import { language, t } from "./i18n.js";
import { actionOf, showKeys } from "./keys.js";
import { announce, parseAddress, runPending, statusText, treePanel } from "./page.js";
import { mountSidebar } from "./sidebar.js";
import { store } from "./store.js";
import { ask, h, iconButton, toast } from "./ui.js";

/** @import { Action } from "./keys.js" */
/** @import { ViewName } from "./page.js" */
/** @import { View } from "./types.js" */

document.documentElement.lang = language();
const main = h("main", { id: "main" });
const aside = h("aside.tree-side", { hidden: true, "aria-label": t("tree") });
const status = h("div.banner", { role: "status", hidden: true });
const sidebar = h("nav.sidebar", { "aria-label": t("sessions") });
const toggleSidebar = () => document.body.classList.toggle("with-sidebar");
const hideSidebar = () => document.body.classList.remove("with-sidebar");
const opener = iconButton("menu", t("menu"), toggleSidebar, { id: "opener" });
const shade = h("div.shade", { onclick: hideSidebar });

document.querySelector("#booting")?.remove();
document.body.append(
  sidebar,
  shade,
  h("div.content", {}, opener, status, h("div.views", {}, main, aside)),
);
announce(""); // screen readers hear only what changes in an element that is there already

// ---- Views --------------------------------------------------------------------------------------

/** @type {View | null} */
let view = null;
/** @type {ViewName | null} */
let shown = null;
/** @type {View | null} */
let tree = null;

/**
 * @param {ViewName} name
 * @returns {Promise<View>}
 */
async function mount(name) {
  if (name === "tree") return (await import("./tree.js")).mountTree(main, store, { full: true });
  if (name === "story") return (await import("./story.js")).mountStory(main, store);
  return mountChat(main, store);
}

/** Shows what the address asks for. */
async function route() {
  const { view: name, id } = parseAddress(location.hash);
  hideSidebar();
  if (id) await store.open(id);
  else if (store.state.session || shown !== name) store.clear();
  const [first] = store.state.turns.values();
  if (id && name === "chat" && first && !first.chat) {
    location.replace(`#/story/${id}`);
    return;
  }
  if (shown !== name || !view) {
    view?.unmount();
    main.replaceChildren();
    shown = name;
    view = await mount(name);
  }
  await placeTree();
}

/** Shows the tree next to a chat where the user wants it, else removes it. */
async function placeTree() {
  const isShown = shown === "chat" && treePanel.isWanted() && Boolean(store.state.session);
  aside.hidden = !isShown;
  treePanel.isShown = isShown;
  if (isShown && !tree) {
    const { mountTree } = await import("./tree.js");
    tree = mountTree(aside, store, { full: false });
  }
  if (!isShown && tree) {
    tree.unmount();
    tree = null;
    aside.replaceChildren();
  }
}

treePanel.onchange = placeTree;
addEventListener("hashchange", route);
addEventListener("pagehide", runPending);

// ---- Notices ------------------------------------------------------------------------------------

let isAsking = false;

async function askForKey() {
  if (isAsking) return;
  isAsking = true;
  const help = key.get() ? `${t("apiKeyWrong")} ${t("apiKeyHelp")}` : t("apiKeyHelp");
  const value = await ask(t("apiKey"), "", { type: "password", help });
  isAsking = false;
  if (!value) return;
  await store.do.setKey(value.trim());
  if (!store.state.needsKey) route(); // it could not open the session without the key
}

store.subscribe((state, changed) => {
  if (changed.has("health")) {
    const text = statusText(state);
    status.hidden = !text;
    if (status.textContent !== text) status.textContent = text;
  }
  if (changed.has("key") && state.needsKey) askForKey();
  if (changed.has("session")) {
    document.title = state.session ? `${state.session.title || t("untitled")} · Fabula` : "Fabula";
    placeTree();
  }
});

// ---- Keys ---------------------------------------------------------------------------------------

/** @type {Record<Action, () => unknown>} */
const actions = {
  stop: () => store.do.stop(),
  help: showKeys,
  new: () => {
    location.hash = "#/";
  },
  search: () => {
    document.body.classList.add("with-sidebar");
    sidebar.querySelector("input")?.focus();
  },
  focus: () => {
    main.querySelector("textarea")?.focus();
  },
  tree: () => treePanel.toggle(),
  undo: () => store.do.rollback(store.state.turns.get(store.state.headId)?.parent_id || ""),
  redo: () => store.do.redo(),
};

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const { state } = store;
  const isWriting =
    event.target instanceof Element && event.target.matches("input, textarea, select");
  const action = actionOf(event, isWriting, {
    hasSession: Boolean(state.session),
    hasTurn: Boolean(state.headId),
    canRedo: state.canRedo,
    isAnswering: state.live.size > 0,
  });
  if (!action) return;
  actions[action]();
  event.preventDefault();
});

// ---- Start --------------------------------------------------------------------------------------

mountSidebar(sidebar, store);
store.start({
  error: (error) => toast(error.message, { kind: "bad", seconds: 10 }),
  notice: (text) => toast(text, { seconds: 8 }),
});
route();
