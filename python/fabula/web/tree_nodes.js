// The tree's nodes and edges as SVG elements.

import { t } from "./i18n.js";
import { HEIGHT, short, WIDTH } from "./tree_layout.js";
import { countBelow } from "./turns.js";
import { svg } from "./ui.js";

/** @import { State } from "./types.js" */
/** @import { Point } from "./tree_layout.js" */

const LEFT = -WIDTH / 2 + 10; // where text begins
const START_HEIGHT = 18; // of the circle that is the empty start

/**
 * The end of a reply that is being generated.
 * @param {string} text
 */
export const textOfLive = (text) => short(text.slice(-60) || "…", 20);

/**
 * A turn, the empty start (""), or a reply that is being generated ("stream:index").
 * @param {State} state
 * @param {string} id
 * @param {Point} at
 * @param {{isOnPath: boolean, isFolded: boolean}} options
 */
export function nodeElement(state, id, at, { isOnPath, isFolded }) {
  const turn = state.turns.get(id);
  const isHead = id === state.headId;
  const label = turn ? `${turn.number}: ${short(turn.prompt || turn.text, 80)}` : t("start");
  const group = svg("g", {
    class: `node${isOnPath ? " on-path" : ""}${isHead ? " head" : ""}`,
    transform: `translate(${at.x} ${at.y})`,
    tabindex: isHead ? "0" : "-1",
    role: "treeitem",
    "data-id": id,
    "aria-current": isHead ? "true" : null,
    "aria-label": isHead ? `${label} (${t("currentTurn")})` : label,
  });
  if (id === "") {
    group.append(svg("circle", { r: 9, cy: 9 }), svg("text", { x: 16, y: 13 }, t("start")));
    return group;
  }
  group.append(svg("rect", { x: -WIDTH / 2, width: WIDTH, height: HEIGHT, rx: 10 }));
  if (!turn) {
    const split = id.lastIndexOf(":");
    const reply = state.live.get(id.slice(0, split))?.replies[Number(id.slice(split + 1))];
    group.classList.add("growing");
    group.append(svg("text", { x: LEFT, y: 30 }, textOfLive(reply?.text || "")));
    return group;
  }
  group.append(
    svg("text", { class: "prompt", x: LEFT, y: 21 }, short(turn.prompt || "…", 18)),
    svg("text", { class: "reply", x: LEFT, y: 39 }, short(turn.text || "—", 20)),
  );
  if (turn.tags.length) {
    const attributes = { class: "tag", x: WIDTH / 2 - 4, y: -4, "text-anchor": "end" };
    group.append(svg("text", attributes, short(turn.tags.join(", "), 20)));
  }
  if (isFolded && turn.children.length) {
    const attributes = { class: "folded", y: HEIGHT + 16, "text-anchor": "middle" };
    group.append(svg("text", attributes, t("unfold", { n: countBelow(state.turns, turn) })));
  }
  return group;
}

/**
 * @param {Point} from
 * @param {Point} to
 * @param {boolean} isFromStart
 * @param {boolean} isBright
 */
export function edgeElement(from, to, isFromStart, isBright) {
  const y = from.y + (isFromStart ? START_HEIGHT : HEIGHT);
  const middle = (y + to.y) / 2;
  const d = `M${from.x} ${y}C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${to.y}`;
  return svg("path", { class: isBright ? "on-path" : "", d });
}
