// Server-sent events: splits a stream of text into events with JSON data.

/** @typedef {{id: number, event: string, data: unknown}} RawEvent id is -1 if the event has none. */

/**
 * Reads one event; null if it carries no data (a comment that keeps the connection alive).
 * @param {string} text Its lines, without the empty line that ends it.
 * @returns {RawEvent | null}
 */
export function parseEvent(text) {
  const found = { id: -1, event: "message", data: null };
  for (const line of text.split("\n")) {
    if (line.startsWith("id: ")) found.id = Number(line.slice(4));
    else if (line.startsWith("event: ")) found.event = line.slice(7);
    else if (line.startsWith("data: ")) found.data = JSON.parse(line.slice(6));
  }
  return found.data === null ? null : found;
}

/** Collects chunks, wherever the network cut them, and returns the events that are complete. */
export class EventParser {
  #rest = "";

  /**
   * @param {string} chunk
   * @returns {RawEvent[]}
   */
  push(chunk) {
    const parts = (this.#rest + chunk).split("\n\n");
    this.#rest = parts.pop() ?? "";
    return parts.map(parseEvent).filter((event) => event !== null);
  }
}
