// Where the nodes of a tree lie, and which part of them the screen shows. Pure arithmetic.
//
// Parents lie above their children, in the middle of them; no two nodes overlap. Positions are
// those of a node's middle at its top edge. A view maps them to the screen: screen = position *
// scale + (x, y).

export const STEP_X = 168;
export const STEP_Y = 84;
export const WIDTH = 148;
export const HEIGHT = 52;

const MIN_SCALE = 0.06;
const MAX_SCALE = 2;
const MAX_FIT_SCALE = 1.1; // a small tree is not blown up
const MARGIN = 20;

/** @typedef {{x: number, y: number}} Point */
/** @typedef {{x: number, y: number, scale: number}} Viewport */
/** @typedef {{width: number, height: number}} Size */

/**
 * Positions of all nodes, parents before their children. Linear in their number, and without
 * recursion: a chat may be deep.
 * @param {(id: string) => string[]} childrenOf The root is "".
 * @returns {Map<string, Point>}
 */
export function layout(childrenOf) {
  /** @type {{id: string, depth: number, children: string[]}[]} */
  const nodes = [];
  const stack = [{ id: "", depth: 0 }];
  for (let next = stack.pop(); next; next = stack.pop()) {
    const { id, depth } = next;
    const children = childrenOf(id);
    nodes.push({ id, depth, children });
    for (const child of [...children].reverse()) stack.push({ id: child, depth: depth + 1 });
  }
  /** @type {Map<string, Point>} */
  const positions = new Map();
  let nLeaves = 0;
  for (const { id, depth, children } of nodes) {
    positions.set(id, { x: children.length ? 0 : nLeaves++ * STEP_X, y: depth * STEP_Y });
  }
  for (const { id, children } of nodes.reverse()) {
    if (children.length)
      at(positions, id).x =
        (at(positions, children[0]).x + at(positions, children[children.length - 1]).x) / 2;
  }
  return positions;
}

/**
 * @param {Map<string, Point>} positions
 * @param {string} id
 */
function at(positions, id) {
  const found = positions.get(id);
  if (!found) throw new RangeError(`there is no node ${id}`);
  return found;
}

/**
 * The view after zooming: the point under (x, y) of the screen stays there.
 * @param {Viewport} view
 * @param {number} factor
 * @param {number} x
 * @param {number} y
 * @returns {Viewport}
 */
export function zoomed(view, factor, x, y) {
  const scale = Math.min(MAX_SCALE, Math.max(MIN_SCALE, view.scale * factor));
  const ratio = scale / view.scale;
  return { x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio, scale };
}

/**
 * The view that shows all nodes, in the middle of the screen.
 * @param {Iterable<Point>} points At least one.
 * @param {Size} screen
 * @returns {Viewport}
 */
export function fitted(points, { width, height }) {
  let left = Infinity;
  let right = -Infinity;
  let bottom = 0;
  for (const { x, y } of points) {
    left = Math.min(left, x - WIDTH / 2 - MARGIN);
    right = Math.max(right, x + WIDTH / 2 + MARGIN);
    bottom = Math.max(bottom, y + HEIGHT + MARGIN);
  }
  const scale = Math.min(MAX_FIT_SCALE, width / (right - left), height / (bottom + MARGIN));
  return { x: (width - (left + right) * scale) / 2, y: MARGIN * scale, scale };
}

/**
 * The view moved so that a node is well inside the screen; the same view if it is already.
 * @param {Viewport} view
 * @param {Point} point
 * @param {Size} screen
 * @returns {Viewport}
 */
export function revealed(view, point, { width, height }) {
  const x = point.x * view.scale + view.x;
  const y = point.y * view.scale + view.y;
  const isBeside = x < 80 || x > width - 80;
  const isAboveOrBelow = y < 30 || y > height - 90;
  return {
    scale: view.scale,
    x: isBeside ? view.x + width / 2 - x : view.x,
    y: isAboveOrBelow ? view.y + height * 0.6 - y : view.y,
  };
}

/**
 * A text in one line, cut to n characters.
 * @param {string} text
 * @param {number} n
 */
export function short(text, n) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > n ? `${line.slice(0, n - 1)}…` : line;
}
