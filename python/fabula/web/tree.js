// The session as a tree: every turn drawn, the path to the head bright. A click goes there; it costs nothing.

import { page } from "./app.js";
import { openCompare } from "./compare.js";
import { t } from "./i18n.js";
import { HEIGHT, layout, WIDTH } from "./tree_layout.js";
import { ask, h, iconButton, menu, svg } from "./ui.js";

const short = (text, n) => {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > n ? `${line.slice(0, n - 1)}…` : line;
};

export function mountTree(root, store, { full }) {
  const edges = svg("g", { class: "edges" }),
    nodes = svg("g", { class: "nodes" });
  const world = svg("g", {}, edges, nodes);
  const canvas = svg(
    "svg",
    { class: "tree", role: "tree", "aria-label": t("tree"), tabindex: "0" },
    world,
  );
  const empty = h("p.tree-empty", {}, t("treeEmpty"));
  const view = { x: 0, y: 0, scale: 1, moved: false };
  const folded = new Set(),
    hidden = new Set();
  let places = new Map(),
    session = null,
    frame = 0,
    showHead = true;

  const zoom = (factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) => {
    const scale = Math.min(2, Math.max(0.06, view.scale * factor)),
      ratio = scale / view.scale;
    Object.assign(view, {
      x: x - (x - view.x) * ratio,
      y: y - (y - view.y) * ratio,
      scale,
      moved: true,
    });
    place();
  };
  const bar = h(
    "header.view-head",
    {},
    h("h2", {}, t("tree")),
    iconButton("plus", t("zoomIn"), () => zoom(1.25)),
    h(
      "button.icon-button",
      { type: "button", title: t("zoomOut"), "aria-label": t("zoomOut"), onclick: () => zoom(0.8) },
      "−",
    ),
    h("button.quiet.small", { type: "button", onclick: fit }, t("fit")),
    full
      ? iconButton("chat", t("chat"), () => {
          location.hash = `#/chat/${store.state.session?.session_id || ""}`;
        })
      : iconButton("close", t("hideTree"), () => page.toggleTree(false)),
  );
  root.append(bar, h("div.tree-box", {}, canvas, empty));
  canvas.append(svg("title", {}, t("treeHelp")));

  function place() {
    if (!frame)
      frame = requestAnimationFrame(() => {
        frame = 0;
        world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
        canvas.classList.toggle("far", view.scale < 0.42);
      });
  }

  function fit() {
    const all = [...places.values()];
    if (!all.length || !canvas.clientWidth) return;
    const left = Math.min(...all.map((p) => p.x)) - WIDTH / 2 - 20,
      right = Math.max(...all.map((p) => p.x)) + WIDTH / 2 + 20;
    const bottom = Math.max(...all.map((p) => p.y)) + HEIGHT + 20;
    const scale = Math.min(
      1.1,
      canvas.clientWidth / (right - left),
      canvas.clientHeight / (bottom + 20),
    );
    Object.assign(view, {
      scale,
      x: (canvas.clientWidth - (left + right) * scale) / 2,
      y: 20 * scale,
      moved: false,
    });
    place();
  }

  /** Moves the head into sight if it is not. */
  function reveal(id) {
    const at = places.get(id);
    if (!at || !canvas.clientWidth) return;
    const x = at.x * view.scale + view.x,
      y = at.y * view.scale + view.y;
    if (x < 80 || x > canvas.clientWidth - 80) view.x += canvas.clientWidth / 2 - x;
    if (y < 30 || y > canvas.clientHeight - 90) view.y += canvas.clientHeight * 0.6 - y;
    place();
  }

  // ---- Drawing ------------------------------------------------------------------------------------------------------

  const childrenOf = (state) => {
    const roots = [...state.turns.values()]
      .filter((turn) => !state.turns.has(turn.parent_id))
      .map((turn) => turn.id);
    const live = new Map();
    for (const one of state.live.values()) {
      const ids = one.answers
        .map((answer, i) => `${one.streamId}:${i}`)
        .filter(
          (_, i) =>
            !one.answers[i].done ||
            !one.answers[i].result?.turn_id ||
            !state.turns.has(one.answers[i].result.turn_id),
        );
      const parent = state.turns.has(one.parentId) ? one.parentId : "";
      live.set(parent, [...(live.get(parent) || []), ...ids]);
    }
    return (id) => {
      if (folded.has(id)) return [];
      const own = (id === "" ? roots : state.turns.get(id)?.children || []).filter(
        (child) => !hidden.has(child),
      );
      return live.has(id) ? [...own, ...live.get(id)] : own;
    };
  };

  function nodeElement(state, id, onPath) {
    const turn = state.turns.get(id),
      at = places.get(id),
      isHead = id === state.headId;
    const group = svg("g", {
      class: `node${onPath ? " on-path" : ""}${isHead ? " head" : ""}`,
      transform: `translate(${at.x} ${at.y})`,
      tabindex: isHead ? "0" : "-1",
      role: "treeitem",
      "data-id": id,
      "aria-current": isHead ? "true" : null,
    });
    group.setAttribute(
      "aria-label",
      turn ? `${turn.number}: ${short(turn.prompt || turn.text, 80)}` : t("start"),
    );
    if (id === "") {
      group.append(svg("circle", { r: 9, cy: 9 }), svg("text", { x: 16, y: 13 }, t("start")));
      return group;
    }
    group.append(svg("rect", { x: -WIDTH / 2, width: WIDTH, height: HEIGHT, rx: 10 }));
    if (!turn) {
      const [stream, index] = [
        id.slice(0, id.lastIndexOf(":")),
        Number(id.slice(id.lastIndexOf(":") + 1)),
      ];
      group.classList.add("growing");
      const text = state.live.get(stream)?.answers[index].text || "…";
      group.append(svg("text", { x: -WIDTH / 2 + 10, y: 30 }, short(text.slice(-60), 20)));
      return group;
    }
    group.append(
      svg("text", { class: "prompt", x: -WIDTH / 2 + 10, y: 21 }, short(turn.prompt || "…", 18)),
      svg("text", { class: "reply", x: -WIDTH / 2 + 10, y: 39 }, short(turn.text || "—", 20)),
    );
    if (turn.tags.length)
      group.append(
        svg(
          "text",
          { class: "tag", x: WIDTH / 2 - 4, y: -4, "text-anchor": "end" },
          short(turn.tags.join(", "), 20),
        ),
      );
    if (folded.has(id) && turn.children.length)
      group.append(
        svg(
          "text",
          { class: "folded", y: HEIGHT + 16, "text-anchor": "middle" },
          t("unfold", { n: countBelow(state, id) }),
        ),
      );
    return group;
  }

  const countBelow = (state, id) => {
    let n = 0;
    const stack = [id];
    while (stack.length) {
      const below = state.turns.get(stack.pop())?.children || [];
      n += below.length;
      stack.push(...below);
    }
    return n;
  };

  function draw(state) {
    empty.hidden = state.turns.size + state.live.size > 0;
    const children = childrenOf(state);
    places = layout(children);
    const path = new Set(["", ...state.path]),
      lines = [],
      boxes = [];
    for (const [id, at] of places) {
      boxes.push(nodeElement(state, id, path.has(id)));
      for (const child of children(id)) {
        const to = places.get(child),
          from = at.y + (id === "" ? 18 : HEIGHT),
          middle = (from + to.y) / 2;
        const line = svg("path", {
          class: path.has(id) && path.has(child) ? "on-path" : "",
          d: `M${at.x} ${from}C${at.x} ${middle} ${to.x} ${middle} ${to.x} ${to.y}`,
        });
        path.has(child) ? lines.push(line) : lines.unshift(line);
      }
    }
    edges.replaceChildren(...lines);
    nodes.replaceChildren(...boxes);
    if (state.session?.session_id !== session) {
      session = state.session?.session_id;
      folded.clear();
      fit();
    } else if (!view.moved) fit();
    if (showHead) {
      reveal(state.headId);
      showHead = false;
    }
  }

  /** The words of answers that grow, without drawing everything again. */
  function drawLive(state) {
    for (const live of state.live.values())
      live.answers.forEach((answer, i) => {
        const text = nodes.querySelector(`[data-id="${live.streamId}:${i}"] text`);
        if (text) text.textContent = short(answer.text.slice(-60) || "…", 20);
      });
  }

  // ---- What can be done ---------------------------------------------------------------------------------------------

  const go = (id) => store.do.rollback(id);

  function openMenu(group, id) {
    const state = store.state,
      turn = state.turns.get(id);
    if (id !== "" && !turn) return;
    const n = countBelow(state, id);
    const items = [[t("backHere"), () => go(id)]];
    if (turn)
      items.push(
        [
          t("forkHere"),
          async () => {
            const made = await store.do.fork(id);
            if (made) location.hash = `#/chat/${made}`;
          },
        ],
        [
          t("alternatives", { n: 3 }),
          async () => {
            await go(id);
            store.do.branch(3);
          },
        ],
        [
          t("tagTurn"),
          async () => {
            const name = await ask(t("tagName"), "");
            if (name) store.do.tag(id, name.trim().slice(0, 60));
          },
        ],
        ...turn.tags.map((tag) => [t("untag", { tag }), () => store.do.tag(id, tag, true)]),
      );
    if (turn && id !== state.headId && state.headId)
      items.push([t("compare"), () => openCompare(state.turns, id, state.headId)]);
    if (n)
      items.push(
        [
          folded.has(id) ? t("unfold", { n }) : t("fold"),
          () => {
            folded.has(id) ? folded.delete(id) : folded.add(id);
            draw(store.state);
          },
        ],
        null,
        [t("prune"), () => prune(id, n)],
      );
    menu(anchorOf(group), items);
  }

  function prune(id, n) {
    const below = [
      ...(store.state.turns.get(id)?.children ||
        [...store.state.turns.values()]
          .filter((turn) => !store.state.turns.has(turn.parent_id))
          .map((turn) => turn.id)),
    ];
    below.forEach((child) => hidden.add(child));
    if (store.state.path.some((one) => below.includes(one))) go(id);
    draw(store.state);
    const show = () => {
      below.forEach((child) => hidden.delete(child));
      draw(store.state);
    };
    page.later(t("pruned", { n }), () => store.do.prune(id).then(show), show);
  }

  const anchorOf = (group) => ({
    getBoundingClientRect: () => group.getBoundingClientRect(),
    focus: () => group.focus(),
  });
  const idOf = (event) => event.target.closest?.(".node")?.dataset.id;

  // ---- Hands --------------------------------------------------------------------------------------------------------

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button === 0)
      drag = {
        x: event.clientX,
        y: event.clientY,
        id: idOf(event),
        moved: false,
        pointer: event.pointerId,
      };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const dx = event.clientX - drag.x,
      dy = event.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    if (!drag.moved) canvas.setPointerCapture(drag.pointer);
    drag = { ...drag, x: event.clientX, y: event.clientY, moved: true };
    Object.assign(view, { x: view.x + dx, y: view.y + dy, moved: true });
    place();
  });
  canvas.addEventListener("pointerup", () => {
    if (
      drag &&
      !drag.moved &&
      drag.id !== undefined &&
      (drag.id === "" || store.state.turns.has(drag.id))
    ) {
      folded.has(drag.id) ? (folded.delete(drag.id), draw(store.state)) : go(drag.id);
    }
    drag = null;
  });
  canvas.addEventListener("contextmenu", (event) => {
    const group = event.target.closest?.(".node");
    if (group) {
      event.preventDefault();
      openMenu(group, group.dataset.id);
    }
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
    },
    { passive: false },
  );
  canvas.addEventListener("keydown", (event) => {
    const group = event.target.closest?.(".node") || nodes.querySelector(".head"),
      id = group?.dataset.id,
      turn = store.state.turns.get(id);
    const children = childrenOf(store.state),
      beside = turn ? children(places.has(turn.parent_id) ? turn.parent_id : "") : [];
    const to = {
      ArrowUp: turn ? turn.parent_id : undefined,
      ArrowDown: id === undefined ? undefined : children(id)[0],
      ArrowLeft: beside[beside.indexOf(id) - 1],
      ArrowRight: beside[beside.indexOf(id) + 1],
    }[event.key];
    if (to !== undefined) {
      nodes.querySelector(`[data-id="${CSS.escape(places.has(to) ? to : "")}"]`)?.focus();
      reveal(places.has(to) ? to : "");
    } else if (event.key === "Enter" && id !== undefined) go(id);
    else if (
      (event.key === "ContextMenu" ||
        (event.key === "F10" && event.shiftKey) ||
        event.key === "m") &&
      group
    )
      openMenu(group, id);
    else if (event.key === "+") zoom(1.25);
    else if (event.key === "-") zoom(0.8);
    else if (event.key === "0") fit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const size = new ResizeObserver(() => {
    if (!view.moved) fit();
  });
  size.observe(canvas);
  let liveKeys = "";
  draw(store.state);
  const leave = store.subscribe((state, changed) => {
    const keys = [...state.live.values()]
      .map((live) => live.streamId + live.answers.map((answer) => Number(answer.done)).join(""))
      .join();
    if (changed.has("tree") || changed.has("session") || keys !== liveKeys) {
      showHead = changed.has("tree");
      draw(state);
    } else if (changed.has("live")) drawLive(state);
    liveKeys = keys;
  });
  return {
    unmount() {
      leave();
      size.disconnect();
    },
  };
}
