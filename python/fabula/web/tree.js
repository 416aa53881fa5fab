// The session as a tree: every turn, with the path to the head bright. A click goes to a turn.

import { openCompare } from "./compare.js";
import { t } from "./i18n.js";
import { later, treePanel } from "./page.js";
import { edgeElement, nodeElement, textOfLive } from "./tree_nodes.js";
import { fitted, layout, revealed, zoomed } from "./tree_layout.js";
import { tagItems } from "./turn.js";
import { childrenOf, countBelow } from "./turns.js";
import { closest, h, iconButton, menu, svg } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { Anchor, MenuItem, State, Turn, View } from "./types.js" */
/** @import { Viewport } from "./tree_layout.js" */

const MIN_DRAG_PX = 4; // less is a click
const FAR_SCALE = 0.42; // below it text is not shown

/**
 * @param {HTMLElement} root
 * @param {Store} store
 * @param {{full: boolean}} options Whether the tree is a view of its own, or next to the chat.
 * @returns {View}
 */
export function mountTree(root, store, { full }) {
  const edges = svg("g", { class: "edges" });
  const nodes = svg("g", { class: "nodes" });
  const world = svg("g", {}, edges, nodes);
  const attributes = { class: "tree", role: "tree", "aria-label": t("tree"), tabindex: "0" };
  const canvas = svg("svg", attributes, world, svg("title", {}, t("treeHelp")));
  const empty = h("p.tree-empty", {}, t("treeEmpty"));

  /** @type {Viewport} */
  let view = { x: 0, y: 0, scale: 1 };
  let isMoved = false; // whether the user moved the view; until then it shows all
  /** @type {Set<string>} Turns whose children are not shown. */
  const folded = new Set();
  /** @type {Set<string>} Turns that will be deleted unless the user takes it back. */
  const hidden = new Set();
  /** @type {ReturnType<typeof layout>} */
  let positions = new Map();
  /** @type {string | undefined} */
  let shownId;
  let hasFrame = false;
  let showHead = true; // whether the next drawing moves the head into sight

  const toChat = () => {
    location.hash = `#/chat/${store.state.session?.session_id || ""}`;
  };
  const zoomOut = {
    type: "button",
    title: t("zoomOut"),
    "aria-label": t("zoomOut"),
    onclick: () => zoom(0.8),
  };
  const header = h(
    "header.view-head",
    {},
    h("h2", {}, t("tree")),
    iconButton("plus", t("zoomIn"), () => zoom(1.25)),
    h("button.icon-button", zoomOut, "−"),
    h("button.quiet.small", { type: "button", onclick: fit }, t("fit")),
    full
      ? iconButton("chat", t("chat"), toChat)
      : iconButton("close", t("hideTree"), () => treePanel.toggle(false)),
  );
  root.append(header, h("div.tree-box", {}, canvas, empty));

  // ---- The view ---------------------------------------------------------------------------------

  const screen = () => ({ width: canvas.clientWidth, height: canvas.clientHeight });

  /** @param {Viewport} next */
  function show(next) {
    view = next;
    if (hasFrame) return;
    hasFrame = true;
    requestAnimationFrame(() => {
      hasFrame = false;
      world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
      canvas.classList.toggle("far", view.scale < FAR_SCALE);
    });
  }

  /** @param {number} factor */
  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    isMoved = true;
    show(zoomed(view, factor, x, y));
  }

  function fit() {
    if (!positions.size || !canvas.clientWidth) return;
    isMoved = false;
    show(fitted(positions.values(), screen()));
  }

  /** @param {string} id */
  function reveal(id) {
    const position = positions.get(id);
    if (position && canvas.clientWidth) show(revealed(view, position, screen()));
  }

  // ---- Drawing ----------------------------------------------------------------------------------

  /**
   * What the tree shows below a node: turns that are not hidden or folded, then replies that are
   * being generated.
   * @param {State} state
   * @returns {(id: string) => string[]}
   */
  function shownChildren(state) {
    const first = childrenOf(state.turns, "");
    /** @type {Map<string, string[]>} */
    const live = new Map();
    for (const { streamId, parentId, replies } of state.live.values()) {
      const parent = state.turns.has(parentId) ? parentId : "";
      const ids = live.get(parent) || [];
      replies.forEach(({ done, result }, i) => {
        const isTurn = done && result?.turn_id && state.turns.has(result.turn_id);
        if (!isTurn) ids.push(`${streamId}:${i}`);
      });
      live.set(parent, ids);
    }
    return (id) => {
      if (folded.has(id)) return [];
      const own = id === "" ? first : state.turns.get(id)?.children || [];
      return [...own.filter((child) => !hidden.has(child)), ...(live.get(id) || [])];
    };
  }

  /** @param {State} state */
  function draw(state) {
    empty.hidden = state.turns.size + state.live.size > 0;
    const children = shownChildren(state);
    positions = layout(children);
    const path = new Set(["", ...state.path]);
    /** @type {SVGElement[]} */
    const lines = [];
    const boxes = [];
    for (const [id, from] of positions) {
      const isOnPath = path.has(id);
      boxes.push(nodeElement(state, id, from, { isOnPath, isFolded: folded.has(id) }));
      for (const child of children(id)) {
        const to = positions.get(child);
        if (!to) continue;
        const isBright = isOnPath && path.has(child);
        const line = edgeElement(from, to, id === "", isBright);
        if (isBright) lines.push(line);
        else lines.unshift(line); // behind the bright ones
      }
    }
    edges.replaceChildren(...lines);
    nodes.replaceChildren(...boxes);
    const id = state.session?.session_id;
    if (id !== shownId) folded.clear();
    if (id !== shownId || !isMoved) fit();
    shownId = id;
    if (showHead) reveal(state.headId);
    showHead = false;
  }

  /**
   * Updates the text of replies that grow, and nothing else.
   * @param {State} state
   */
  function drawLive(state) {
    for (const { streamId, replies } of state.live.values()) {
      replies.forEach((reply, i) => {
        const text = nodes.querySelector(`[data-id="${streamId}:${i}"] text`);
        if (text) text.textContent = textOfLive(reply.text);
      });
    }
  }

  // ---- What can be done -------------------------------------------------------------------------

  /** @param {string} id */
  const go = (id) => store.do.rollback(id);

  /** @param {string} id */
  function fold(id) {
    if (!folded.delete(id)) folded.add(id);
    draw(store.state);
  }

  /**
   * @param {SVGElement} group
   * @param {string} id
   */
  function openMenu(group, id) {
    const turn = store.state.turns.get(id);
    if (id !== "" && !turn) return; // a reply that is being generated
    /** @type {Anchor} */
    const anchor = group;
    menu(anchor, [[t("backHere"), () => go(id)], ...(turn ? turnItems(turn) : [])]);
  }

  /**
   * @param {Turn} turn
   * @returns {MenuItem[]}
   */
  function turnItems(turn) {
    const { turns, headId } = store.state;
    const { id } = turn;
    const fork = async () => {
      const made = await store.do.fork(id);
      if (made) location.hash = `#/chat/${made}`;
    };
    const branch = async () => {
      await go(id);
      store.do.branch(3);
    };
    /** @type {MenuItem[]} */
    const items = [
      [t("forkHere"), fork],
      [t("alternatives", { n: 3 }), branch],
      ...tagItems(store, turn),
    ];
    if (headId && id !== headId) items.push([t("compare"), () => openCompare(turns, id, headId)]);
    const n = countBelow(turns, turn);
    if (!n) return items;
    const foldLabel = folded.has(id) ? t("unfold", { n }) : t("fold");
    return [...items, [foldLabel, () => fold(id)], null, [t("prune"), () => prune(turn, n)]];
  }

  /**
   * Deletes what follows a turn, unless the user takes it back in time.
   * @param {Turn} turn
   * @param {number} n How many turns that are.
   */
  function prune({ id, children }, n) {
    const below = [...children];
    below.forEach((child) => hidden.add(child));
    if (store.state.path.some((one) => below.includes(one))) go(id);
    draw(store.state);
    const showAgain = () => {
      below.forEach((child) => hidden.delete(child));
      draw(store.state);
    };
    later(t("pruned", { n }), () => void store.do.prune(id).then(showAgain), showAgain);
  }

  // ---- Pointer and keyboard ---------------------------------------------------------------------

  /** @param {Event} event */
  const nodeOf = (event) => /** @type {SVGGElement | null} */ (closest(event, ".node"));

  /** @type {{pointer: number, x: number, y: number, id: string | undefined, isDrag: boolean} | null} */
  let press = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    press = {
      pointer: event.pointerId,
      x: event.clientX,
      y: event.clientY,
      id: nodeOf(event)?.dataset.id,
      isDrag: false,
    };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!press) return;
    const dx = event.clientX - press.x;
    const dy = event.clientY - press.y;
    if (!press.isDrag && Math.hypot(dx, dy) < MIN_DRAG_PX) return;
    if (!press.isDrag) canvas.setPointerCapture(press.pointer);
    press = { ...press, x: event.clientX, y: event.clientY, isDrag: true };
    isMoved = true;
    show({ ...view, x: view.x + dx, y: view.y + dy });
  });
  canvas.addEventListener("pointerup", () => {
    const id = press?.isDrag ? undefined : press?.id;
    press = null;
    if (id === undefined || (id !== "" && !store.state.turns.has(id))) return;
    if (folded.has(id)) fold(id);
    else go(id);
  });
  canvas.addEventListener("contextmenu", (event) => {
    const group = nodeOf(event);
    if (!group) return;
    event.preventDefault();
    openMenu(group, group.dataset.id || "");
  });
  const wheel = (/** @type {WheelEvent} */ event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("wheel", wheel, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (!onViewKey(event.key) && !onNodeKey(event)) return;
    event.preventDefault();
    event.stopPropagation();
  });

  /**
   * A key that changes the view. Returns whether it did something.
   * @param {string} key
   */
  function onViewKey(key) {
    if (key === "+") zoom(1.25);
    else if (key === "-") zoom(0.8);
    else if (key === "0") fit();
    else return false;
    return true;
  }

  /**
   * A key for the node that has the focus, else for the head. Returns whether it did something.
   * @param {KeyboardEvent} event
   */
  function onNodeKey(event) {
    /** @type {SVGGElement | null} */
    const group = nodeOf(event) || nodes.querySelector(/** @type {"g"} */ (".head"));
    const id = group?.dataset.id;
    if (!group || id === undefined) return false;
    const to = neighbor(id, event.key);
    if (to !== undefined) {
      const shown = positions.has(to) ? to : "";
      /** @type {SVGGElement | null} */
      const next = nodes.querySelector(/** @type {"g"} */ (`[data-id="${CSS.escape(shown)}"]`));
      next?.focus();
      reveal(shown);
    } else if (event.key === "Enter") go(id);
    else if (
      event.key === "ContextMenu" ||
      event.key === "m" ||
      (event.key === "F10" && event.shiftKey)
    ) {
      openMenu(group, id);
    } else return false;
    return true;
  }

  /**
   * The node that an arrow key leads to; undefined if there is none.
   * @param {string} id
   * @param {string} key
   */
  function neighbor(id, key) {
    const children = shownChildren(store.state);
    const turn = store.state.turns.get(id);
    if (key === "ArrowDown") return children(id)[0];
    if (!turn) return undefined;
    if (key === "ArrowUp") return turn.parent_id;
    const siblings = children(positions.has(turn.parent_id) ? turn.parent_id : "");
    if (key === "ArrowLeft") return siblings[siblings.indexOf(id) - 1];
    if (key === "ArrowRight") return siblings[siblings.indexOf(id) + 1];
    return undefined;
  }

  // ---- Begin ------------------------------------------------------------------------------------

  const observer = new ResizeObserver(() => {
    if (!isMoved) fit();
  });
  observer.observe(canvas);
  let shownLive = "";
  draw(store.state);
  const unsubscribe = store.subscribe((state, changed) => {
    const lives = [...state.live.values()];
    const live = JSON.stringify(
      lives.map((one) => [one.streamId, one.replies.map(({ done }) => done)]),
    );
    if (changed.has("tree") || changed.has("session") || live !== shownLive) {
      showHead = changed.has("tree");
      draw(state);
    } else if (changed.has("live")) drawLive(state);
    shownLive = live;
  });
  return {
    unmount() {
      unsubscribe();
      observer.disconnect();
    },
  };
}
