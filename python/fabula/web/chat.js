// The chat: a transcript of the turns from the first to the head, what is being said now, and the composer.

import { page } from "./app.js";
import { mountComposer } from "./composer.js";
import { t } from "./i18n.js";
import { openSettings } from "./settings.js";
import { liveElement, lostElement, turnElement } from "./turn.js";
import { h, iconButton } from "./ui.js";

export function mountChat(root, store) {
  const title = h("h1");
  const bar = h(
    "div.context-bar",
    { role: "meter", "aria-label": t("context"), "aria-valuemin": 0, "aria-valuemax": 100 },
    h("i"),
  );
  const treeButton = iconButton("tree", t("showTree"), () => page.toggleTree(), {
    id: "tree-button",
  });
  const head = h(
    "header.view-head",
    {},
    title,
    bar,
    treeButton,
    iconButton("tune", t("settings"), () => openSettings(store), { id: "settings-button" }),
  );
  const log = h("div.log", { role: "log", "aria-live": "off", "aria-label": t("chat") });
  const scroller = h("div.scroller", { tabIndex: 0, "aria-label": t("chat") }, log);
  const foot = h("div.composer-box");
  root.append(head, scroller, foot);
  const shown = new Map(); // turn id or stream id -> {element, mark}
  let wasAnswering = false,
    sticks = true,
    shownId = store.state.session?.session_id;
  const composer = mountComposer(foot, store, () => {
    sticks = true;
  });
  scroller.addEventListener("scroll", () => {
    sticks = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  });

  function element(key, mark, make) {
    const known = shown.get(key);
    // A change that is being written stays, whatever happens to its turn meanwhile.
    if (known && (known.mark === mark || known.element.querySelector("form.edit")))
      return known.element;
    const made = { element: make(), mark };
    shown.set(key, made);
    return made.element;
  }

  function welcome() {
    const starters = ["starter1", "starter2", "starter3"].map((name) =>
      h("button.starter", { type: "button", onclick: () => composer.send(t(name)) }, t(name)),
    );
    return h(
      "section.welcome",
      {},
      h("img", { src: "/static/icon.svg", alt: "", width: 44, height: 44 }),
      h("p.lead", {}, t("welcome1")),
      h("p", {}, t("welcome2")),
      h("p", {}, t("welcome3")),
      h("div.starters", {}, starters),
    );
  }

  function draw(state) {
    const lives = [...state.live.values()];
    // An answer in the making hides the turns behind the one it follows, if it will be the head.
    const leading = lives.find((live) => live.selects);
    let path = state.path;
    if (leading) path = leading.parentId ? path.slice(0, path.indexOf(leading.parentId) + 1) : [];
    const wanted = [];
    if (!path.length && !lives.length && !(state.session && state.turns.size))
      wanted.push(element("welcome", "1", welcome));
    for (const id of path) {
      const turn = state.turns.get(id),
        beside = store.siblings(turn);
      const mark = [
        turn.text.length,
        beside.join(),
        turn.tags.join(),
        id === state.headId && !leading,
        turn.finish_reason,
      ].join("|");
      wanted.push(
        element(id, mark, () =>
          turnElement(store, turn, beside, { isHead: id === state.headId && !leading }),
        ),
      );
    }
    for (const live of lives) {
      const made = element(live.streamId, "live", () => liveElement(store, live));
      made.update(live);
      wanted.push(made);
    }
    if (state.lost)
      wanted.push(element("lost", state.lost.text, () => lostElement(store, state.lost)));
    if (!lives.length && !state.lost && state.session && state.turns.size && !path.length)
      wanted.push(element("start", "1", () => h("p.at-start", {}, t("start"))));
    wanted.forEach((one, i) => {
      if (log.children[i] !== one) log.insertBefore(one, log.children[i] || null);
    });
    while (log.children.length > wanted.length) log.lastElementChild.remove();
    for (const [key, made] of shown)
      if (!wanted.includes(made.element) && shown.size > 300) shown.delete(key);
    log.setAttribute("aria-busy", String(lives.length > 0));
    if (sticks) scroller.scrollTop = scroller.scrollHeight;
    if (wasAnswering && !lives.length) page.say(t("answered"));
    if (!wasAnswering && lives.length) page.say(t("answering"));
    wasAnswering = lives.length > 0;
  }

  function drawHead(state) {
    title.textContent = state.session ? state.session.title || t("untitled") : t("newChat");
    treeButton.hidden = !state.session;
    treeButton.setAttribute("aria-pressed", String(page.isTreeShown()));
    const count = state.count,
      full = count ? Math.min(1, count.prompt_tokens / count.context) : 0;
    bar.hidden = !count || !state.session;
    bar.firstChild.style.setProperty("inline-size", `${full * 100}%`);
    bar.setAttribute("aria-valuenow", String(Math.round(full * 100)));
    bar.classList.toggle("full", full > 0.9);
    if (count) bar.title = t("contextBar", { used: count.prompt_tokens, all: count.context });
  }

  draw(store.state);
  drawHead(store.state);
  const leave = store.subscribe((state, changed) => {
    const id = state.session?.session_id;
    if (changed.has("opened") && id !== shownId) {
      shown.clear();
      sticks = true;
    }
    shownId = id;
    if (changed.has("tree") || changed.has("live") || changed.has("session")) draw(state);
    if (changed.has("session") || changed.has("count") || changed.has("tree")) drawHead(state);
  });
  return {
    unmount() {
      leave();
      composer.unmount();
    },
  };
}
