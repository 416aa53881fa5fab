// The open session's tree as data: pure functions on a Map of turns by id. "" is the empty start,
// which is no turn.

/** @import { Turn, TurnJson, Turns } from "./types.js" */

/**
 * Turns by id, each with its children in the order the server sent them.
 * @param {TurnJson[]} list
 * @returns {Turns}
 */
export function turnsById(list) {
  const turns = new Map(
    list.map((turn) => [turn.id, /** @type {Turn} */ ({ ...turn, children: [] })]),
  );
  for (const turn of turns.values()) turns.get(turn.parent_id)?.children.push(turn.id);
  return turns;
}

/**
 * The turns from the first to `id`.
 * @param {Turns} turns
 * @param {string} id
 */
export function pathTo(turns, id) {
  const path = [];
  for (let turn = turns.get(id); turn; turn = turns.get(turn.parent_id)) path.push(turn);
  return path.reverse();
}

/**
 * The turn that is asked for. Throws if there is none: ids of the path are always in the tree.
 * @param {Turns} turns
 * @param {string} id
 */
export function turnOf(turns, id) {
  const turn = turns.get(id);
  if (!turn) throw new RangeError(`there is no turn ${id}`);
  return turn;
}

/**
 * Ids of the turns that follow `id`; of the first turns for "" and for a turn that is gone.
 * @param {Turns} turns
 * @param {string} id
 */
export function childrenOf(turns, id) {
  const turn = turns.get(id);
  if (turn) return turn.children;
  return [...turns.values()].filter((one) => !turns.has(one.parent_id)).map((one) => one.id);
}

/**
 * Ids of the turns with the same parent, `turn` among them.
 * @param {Turns} turns
 * @param {Turn} turn
 */
export const siblingsOf = (turns, turn) => childrenOf(turns, turn.parent_id);

/**
 * The newest leaf below a turn: where a version of the conversation ends.
 * @param {Turns} turns
 * @param {string} id
 */
export function newestLeaf(turns, id) {
  for (let last = turns.get(id)?.children.at(-1); last; last = turns.get(id)?.children.at(-1))
    id = last;
  return id;
}

/**
 * How many turns are below a turn.
 * @param {Turns} turns
 * @param {Turn} turn
 */
export function countBelow(turns, turn) {
  let n = 0;
  const stack = [...turn.children];
  for (let id = stack.pop(); id !== undefined; id = stack.pop()) {
    n += 1;
    stack.push(...turnOf(turns, id).children);
  }
  return n;
}

/**
 * A session's title until the user gives it one: how its first words begin.
 * @param {string} text
 */
export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 60).replace(/\s+\S*$/, "")}…` : line;
}
