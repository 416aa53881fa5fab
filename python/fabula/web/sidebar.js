// The list of conversations: search, open, rename, tag, import, export, and delete with a way to
// take it back. Below it the model.

import { language, languages, setLanguage, t } from "./i18n.js";
import { showKeys } from "./keys.js";
import { hiddenSessions, removeLater } from "./page.js";
import { ask, download, h, icon, iconButton, menu, toast } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { MenuItem, SessionFile, SessionSummary, State } from "./types.js" */

const SEARCH_MS = 150; // after the last key, before the list is asked for

/**
 * A file that /sessions/{id}/export made; null if the text is something else. The server checks the
 * rest.
 * @param {string} text
 * @returns {SessionFile | null}
 */
export function parseSessionFile(text) {
  try {
    const data = JSON.parse(text);
    return typeof data?.id === "string" && Array.isArray(data.turns) ? data : null;
  } catch {
    return null;
  }
}

/**
 * Tags as the user wrote them, with commas between them.
 * @param {string} text
 */
export const parseTags = (text) =>
  text
    .split(/[,，]/)
    .map((tag) => tag.trim().slice(0, 60))
    .filter(Boolean);

/**
 * @param {HTMLElement} root
 * @param {Store} store
 */
export function mountSidebar(root, store) {
  const list = h("ul.sessions");
  const model = h("div.model-line");
  let timer = 0;
  const search = h("input.search", {
    type: "search",
    placeholder: t("search"),
    "aria-label": t("search"),
    oninput: () => {
      clearTimeout(timer);
      timer = window.setTimeout(() => store.do.search(search.value.trim()), SEARCH_MS);
    },
  });

  /** @param {File | undefined} file */
  async function importFile(file) {
    if (!file) return;
    const data = parseSessionFile(await file.text());
    if (!data) {
      toast(t("badFile"), { kind: "bad" });
      return;
    }
    const id = await store.do.importSession(data);
    if (id) location.hash = `#/chat/${id}`;
  }
  const chooser = h("input", {
    type: "file",
    accept: ".json,application/json",
    hidden: true,
    onchange: () => {
      importFile(chooser.files?.[0]);
      chooser.value = "";
    },
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    importFile(event.dataTransfer?.files[0]);
  });

  const brand = h("img", { src: "/static/icon.svg", alt: "", width: 22, height: 22 });
  /** @type {HTMLSelectElement} */
  const languageChooser = h(
    "select",
    { "aria-label": t("language"), onchange: () => setLanguage(languageChooser.value) },
    Object.entries(languages).map(([name, words]) =>
      h("option", { value: name, selected: name === language() }, words),
    ),
  );
  root.append(
    h("header", {}, h("a.brand", { href: "#/" }, brand, "Fabula")),
    h(
      "div.new-buttons",
      {},
      h("a.button", { href: "#/" }, icon("plus"), t("newChat")),
      h("a.button", { href: "#/story" }, icon("book"), t("newStory")),
    ),
    search,
    list,
    h(
      "footer",
      {},
      model,
      h(
        "div.row",
        {},
        h("button.quiet", { type: "button", onclick: () => chooser.click() }, t("importFile")),
        h("button.quiet", { type: "button", onclick: showKeys }, t("keys")),
        languageChooser,
        chooser,
      ),
    ),
  );

  /**
   * @param {SessionSummary} session
   * @returns {MenuItem[]}
   */
  function menuItems(session) {
    const id = session.session_id;
    const rename = async () => {
      const title = await ask(t("rename"), session.title);
      if (title !== null) store.do.rename(id, title);
    };
    const exportFile = async () => {
      const data = await store.do.exportSession(id);
      if (data) download(`${id}.json`, JSON.stringify(data), "application/json");
    };
    const setTags = async () => {
      const tags = await ask(t("tagSession"), session.tags.join(", "), {
        help: t("tagSessionHelp"),
      });
      if (tags !== null) store.do.setTags(id, parseTags(tags));
    };
    return [
      [t("rename"), rename],
      [t("exportFile"), exportFile],
      [t("tagSession"), setTags],
      null,
      [t("remove"), () => removeLater(session)],
    ];
  }

  /**
   * @param {SessionSummary} session
   * @param {boolean} isOpen
   */
  function rowElement(session, isOpen) {
    const { session_id: id, title, tags } = session;
    const more = iconButton("more", t("more"), () => menu(more, menuItems(session)));
    const tagElements = tags.map((tag) => h("span", {}, tag));
    const link = h(
      "a",
      { href: `#/chat/${id}`, "aria-current": isOpen ? "page" : null },
      title || t("untitled"),
      tags.length ? h("span.tags", {}, tagElements) : null,
    );
    return h(isOpen ? "li.open" : "li", {}, link, more);
  }

  /** @param {State} state */
  function draw(state) {
    const seen = state.sessions.filter((one) => !hiddenSessions.has(one.session_id));
    const openId = state.session?.session_id;
    list.replaceChildren(...seen.map((one) => rowElement(one, one.session_id === openId)));
    if (!seen.length) list.append(h("li.empty", {}, t(state.search ? "noneFound" : "noSessions")));
  }

  /** @param {State} state */
  function drawModel({ online, health }) {
    const found = health?.models[0];
    const dot = h(online && health?.ready ? "span.dot.good" : "span.dot.bad");
    model.replaceChildren(dot, found ? found.name : "…");
    /** @param {number | undefined} bytes */
    const mb = (bytes = 0) => Math.round(bytes / 1e6).toLocaleString(language());
    if (found?.weight_bytes) {
      const figures = {
        weights: mb(found.weight_bytes),
        used: mb(found.cache_bytes),
        all: mb(found.cache_limit_bytes),
      };
      model.append(h("small", {}, t("memory", figures)));
      if (found.state_limit_bytes) {
        const states = { used: mb(found.state_bytes), all: mb(found.state_limit_bytes) };
        model.append(h("small", {}, t("memoryOfStates", states)));
      }
    }
    model.title = health ? `Fabula ${health.version}` : "";
  }

  draw(store.state);
  drawModel(store.state);
  store.subscribe((state, changed) => {
    if (changed.has("sessions") || changed.has("session")) draw(state);
    if (changed.has("health")) drawModel(state);
  });
}
