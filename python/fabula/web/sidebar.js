// The list of conversations: search, open, rename, tags of the model, import and export, delete with undo.

import { hiddenSessions, page } from "./app.js";
import { language, languages, setLanguage, t } from "./i18n.js";
import { showKeys } from "./keys.js";
import { ask, download, h, icon, iconButton, menu, toast } from "./ui.js";

export function mountSidebar(root, store) {
  const list = h("ul.sessions");
  let timer = 0;
  const search = h("input.search", {
    type: "search",
    placeholder: t("search"),
    "aria-label": t("search"),
    oninput: () => {
      clearTimeout(timer);
      timer = setTimeout(() => store.do.search(search.value.trim()), 150);
    },
  });
  const chooser = h("input", {
    type: "file",
    accept: ".json,application/json",
    hidden: true,
    onchange: () => {
      if (chooser.files[0]) take(chooser.files[0]);
      chooser.value = "";
    },
  });
  const model = h("div.model-line");
  root.append(
    h(
      "header",
      {},
      h(
        "a.brand",
        { href: "#/" },
        h("img", { src: "/static/icon.svg", alt: "", width: 22, height: 22 }),
        "Fabula",
      ),
    ),
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
        h(
          "select",
          { "aria-label": t("language"), onchange: (event) => setLanguage(event.target.value) },
          Object.entries(languages).map(([name, words]) =>
            h("option", { value: name, selected: name === language() }, words),
          ),
        ),
        chooser,
      ),
    ),
  );

  async function take(file) {
    let data = null;
    try {
      data = JSON.parse(await file.text());
    } catch {
      // told below
    }
    if (!data || typeof data.id !== "string" || !Array.isArray(data.turns)) {
      toast(t("badFile"), { kind: "bad" });
      return;
    }
    const id = await store.do.importSession(data);
    if (id) location.hash = `#/chat/${id}`;
  }
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });

  const actions = (session) => [
    [
      t("rename"),
      async () => {
        const title = await ask(t("rename"), session.title);
        if (title !== null) store.do.rename(session.session_id, title);
      },
    ],
    [
      t("exportFile"),
      async () => {
        const data = await store.do.exportSession(session.session_id);
        if (data) download(`${session.session_id}.json`, JSON.stringify(data), "application/json");
      },
    ],
    [
      t("tagSession"),
      async () => {
        const words = await ask(t("tagSession"), session.tags.join(", "), {
          help: t("tagSessionHelp"),
        });
        if (words !== null)
          store.do.setTags(
            session.session_id,
            words
              .split(/[,，]/)
              .map((word) => word.trim().slice(0, 60))
              .filter(Boolean),
          );
      },
    ],
    null,
    [t("remove"), () => page.removeLater(session)],
  ];

  function draw(state) {
    const seen = state.sessions.filter((one) => !hiddenSessions.has(one.session_id));
    list.replaceChildren(
      ...seen.map((session) => {
        const isOpen = state.session?.session_id === session.session_id;
        const more = iconButton("more", t("more"), () => menu(more, actions(session)));
        return h(
          `li${isOpen ? ".open" : ""}`,
          {},
          h(
            "a",
            { href: `#/chat/${session.session_id}`, "aria-current": isOpen ? "page" : null },
            session.title || t("untitled"),
            session.tags.length
              ? h(
                  "span.tags",
                  {},
                  session.tags.map((tag) => h("span", {}, tag)),
                )
              : null,
          ),
          more,
        );
      }),
    );
    if (!seen.length)
      list.append(h("li.empty", {}, state.search ? t("noneFound") : t("noSessions")));
  }

  function drawModel(state) {
    const found = state.health?.models?.[0];
    model.replaceChildren(
      h("span.dot", { className: `dot ${state.online && state.health?.ready ? "good" : "bad"}` }),
      found ? found.name : "…",
    );
    const mb = (bytes) => Math.round(bytes / 1e6).toLocaleString(language());
    if (found?.weight_bytes)
      model.append(
        h(
          "small",
          {},
          t("memory", {
            weights: mb(found.weight_bytes),
            used: mb(found.cache_bytes),
            all: mb(found.cache_limit_bytes),
          }),
        ),
      );
    model.title = state.health ? `Fabula ${state.health.version}` : "";
  }

  draw(store.state);
  drawModel(store.state);
  store.subscribe((state, changed) => {
    if (changed.has("sessions") || changed.has("session")) draw(state);
    if (changed.has("health")) drawModel(state);
  });
}
