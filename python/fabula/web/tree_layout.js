// Where the nodes of a tree lie: parents above their children, in the middle of them, no two on each other.

export const STEP_X = 168,
  STEP_Y = 84,
  WIDTH = 148,
  HEIGHT = 52;

/** @param children (id) => ids
 *  @returns Map id -> {x, y}; the root is "" at depth 0. Linear in the nodes, without recursion: a chat may be deep. */
export function layout(children) {
  const places = new Map(),
    order = [],
    stack = [["", 0]];
  while (stack.length) {
    const [id, depth] = stack.pop();
    order.push(id);
    places.set(id, { x: 0, y: depth * STEP_Y });
    const below = children(id);
    for (let i = below.length - 1; i >= 0; i--) stack.push([below[i], depth + 1]);
  }
  let leaf = 0;
  // Leaves stand side by side in the order they are met; a parent stands over the middle of its own.
  const seen = new Map();
  for (const id of order) if (!children(id).length) seen.set(id, leaf++ * STEP_X);
  for (let i = order.length - 1; i >= 0; i--) {
    const id = order[i],
      below = children(id);
    const x = below.length
      ? (places.get(below[0]).x + places.get(below.at(-1)).x) / 2
      : seen.get(id);
    places.get(id).x = x;
  }
  return places;
}
