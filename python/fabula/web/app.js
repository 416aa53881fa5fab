// Puts the page together: the list at the side, the view the address asks for, the tree beside it, keys, notices.

import { key } from "./api.js";
import { mountChat } from "./chat.js";
import { t } from "./i18n.js";
import { showKeys } from "./keys.js";
import { mountSidebar } from "./sidebar.js";
import { store } from "./store.js";
import { ask, h, iconButton, toast } from "./ui.js";

const TREE = "fabula.tree"; // whether the tree is shown beside a chat

const main = h("main", { id: "main" });
const aside = h("aside.tree-side", { hidden: true, "aria-label": t("tree") });
const status = h("div.banner", { role: "status", hidden: true });
const live = h("div.sr-only", { role: "status", "aria-live": "polite" });
const sidebar = h("nav.sidebar", { "aria-label": t("sessions") });
const opener = iconButton("menu", t("menu"), () => document.body.classList.toggle("with-sidebar"), {
  id: "opener",
});
const shade = h("div.shade", { onclick: () => document.body.classList.remove("with-sidebar") });

document.querySelector("#booting")?.remove();
document.body.append(
  sidebar,
  shade,
  h("div.content", {}, opener, status, h("div.views", {}, main, aside)),
  live,
);

export const page = {
  /** Tells screen readers something once. */
  say: (text) => {
    live.textContent = "";
    requestAnimationFrame(() => {
      live.textContent = text;
    });
  },
  isTreeShown: () => !aside.hidden,
  toggleTree(show = aside.hidden) {
    localStorage.setItem(TREE, show ? "1" : "");
    placeTree();
  },
  /** Deletes a session once the reader had time to take it back. */
  removeLater(session) {
    const id = session.session_id;
    hiddenSessions.add(id);
    store.touch("sessions");
    if (store.state.session?.session_id === id) location.hash = "#/";
    later(
      t("removed", { title: session.title || t("untitled") }),
      () =>
        store.do.remove(id).then(() => {
          hiddenSessions.delete(id);
          store.list();
        }),
      () => {
        hiddenSessions.delete(id);
        store.touch("sessions");
      },
    );
  },
  later,
};

export const hiddenSessions = new Set();
const pending = new Set();

/** Does something after eight seconds, or when the page is left, unless it is taken back. */
function later(text, work, undo) {
  const entry = {
    run: () => {
      clearTimeout(entry.timer);
      if (pending.delete(entry)) {
        close();
        work();
      }
    },
  };
  entry.timer = setTimeout(() => entry.run(), 8000);
  pending.add(entry);
  const close = toast(text, {
    seconds: 8,
    action: [
      t("undo"),
      () => {
        clearTimeout(entry.timer);
        if (pending.delete(entry)) undo();
      },
    ],
  });
}
addEventListener("pagehide", () => [...pending].forEach((entry) => entry.run()));

// ---- Views ----------------------------------------------------------------------------------------------------------

let view = null,
  shown = "",
  tree = null;

async function route() {
  const [, kind = "chat", id = ""] =
    location.hash.match(/^#\/(chat|tree|story)?\/?([A-Za-z0-9._-]*)/) || [];
  document.body.classList.remove("with-sidebar");
  if (id) await store.open(id);
  else if (store.state.session || shown !== kind) store.clear();
  const first = store.state.turns.values().next().value;
  if (id && kind === "chat" && first && !first.chat) {
    location.replace(`#/story/${id}`);
    return;
  } // it tells a story
  if (shown !== kind || !view) {
    view?.unmount();
    main.replaceChildren();
    shown = kind;
    view =
      kind === "chat"
        ? mountChat(main, store)
        : kind === "tree"
          ? (await import("./tree.js")).mountTree(main, store, { full: true })
          : (await import("./story.js")).mountStory(main, store);
  }
  await placeTree();
}

async function placeTree() {
  const show =
    shown === "chat" && localStorage.getItem(TREE) === "1" && Boolean(store.state.session);
  aside.hidden = !show;
  if (show && !tree) tree = (await import("./tree.js")).mountTree(aside, store, { full: false });
  if (!show && tree) {
    tree.unmount();
    tree = null;
    aside.replaceChildren();
  }
}
addEventListener("hashchange", route);

// ---- Notices --------------------------------------------------------------------------------------------------------

let asking = false;

async function askForKey() {
  if (asking) return;
  asking = true;
  const value = await ask(t("apiKey"), "", {
    type: "password",
    help: key.get() ? `${t("apiKeyWrong")} ${t("apiKeyHelp")}` : t("apiKeyHelp"),
  });
  asking = false;
  if (!value) return;
  await store.do.setKey(value.trim());
  if (!store.state.needsKey) route(); // what the address asks for could not be opened without it
}

function showStatus(state) {
  const lines = [];
  if (!state.online) lines.push(t("offline"));
  for (const model of state.online ? state.health?.models || [] : []) {
    const percent = model.progress ? ` ${Math.round(model.progress * 100)} %` : "";
    if (model.state === "failed")
      lines.push(t("failedModel", { model: model.name, error: model.error }));
    else if (model.state === "fetching")
      lines.push(t("fetchingModel", { model: model.name }) + percent);
    else if (model.state !== "ready")
      lines.push(t("loadingModel", { model: model.name }) + percent);
  }
  status.hidden = !lines.length;
  if (status.textContent !== lines.join(" ")) status.textContent = lines.join(" ");
}

store.subscribe((state, changed) => {
  if (changed.has("health")) showStatus(state);
  if (changed.has("key") && state.needsKey) askForKey();
  if (changed.has("session")) {
    document.title = state.session ? `${state.session.title || t("untitled")} · Fabula` : "Fabula";
    placeTree();
  }
});

// ---- Keys -----------------------------------------------------------------------------------------------------------

addEventListener("keydown", (event) => {
  const writing =
    /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable;
  const state = store.state,
    command = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && state.live.size) store.do.stop();
  else if (writing && !(command && event.altKey)) return;
  else if (event.key === "?") showKeys();
  else if (event.key === "n") location.hash = "#/";
  else if (event.key === "/") {
    document.body.classList.add("with-sidebar");
    sidebar.querySelector("input").focus();
  } else if (event.key === "i") main.querySelector("textarea, [contenteditable=true]")?.focus();
  else if (event.key === "t" && state.session) page.toggleTree();
  else if (
    (event.key === "u" || (command && event.key === "z" && !event.shiftKey)) &&
    state.session &&
    state.headId
  )
    store.do.rollback(state.turns.get(state.headId)?.parent_id || 0);
  else if (
    (event.key === "r" || (command && (event.key === "y" || event.key === "Z"))) &&
    state.session &&
    state.canRedo
  )
    store.do.redo();
  else return;
  event.preventDefault();
});

// ---- Begin ----------------------------------------------------------------------------------------------------------

mountSidebar(sidebar, store);
store.start({
  error: (error) => toast(error.message, { kind: "bad", seconds: 10 }),
  notice: (text) => toast(text, { seconds: 8 }),
});
route();
