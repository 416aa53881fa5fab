// The server as functions: JSON in and out, errors as `ApiError`, streams as events.

/** @import { ErrorBody, Health, SessionEvent, StreamEvent } from "./types.js" */

const KEY = "fabula.key";

/** A reply that is an error. `code` is the server's name for it, or "". */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {ErrorBody | null} body null if the reply is not JSON.
   */
  constructor(status, body) {
    super(body?.error?.message || `HTTP ${status}`);
    this.status = status;
    this.code = body?.error?.code || "";
  }
}

/** The API key that this browser keeps. */
export const key = {
  get: () => localStorage.getItem(KEY) || "",
  /** @param {string} value "" removes it. */
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

/**
 * Sends a request.
 * @param {"GET" | "POST" | "PATCH"} method
 * @param {string} path
 * @param {object} [body] Sent as JSON.
 * @param {RequestInit} [options]
 * @throws {ApiError} The server refused. A server that cannot be reached is fetch's own TypeError.
 */
async function request(method, path, body, options = {}) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, { method, headers, body: JSON.stringify(body), ...options });
  if (response.ok) return response;
  throw new ApiError(response.status, await response.json().catch(() => null));
}

/**
 * @template T
 * @param {string} path
 * @returns {Promise<T>}
 */
export const get = async (path) => (await request("GET", path)).json();

/**
 * @template T
 * @param {string} path
 * @param {object} [body]
 * @returns {Promise<T>}
 */
export const post = async (path, body = {}) => (await request("POST", path, body)).json();

/**
 * @template T
 * @param {string} path
 * @param {object} body
 * @returns {Promise<T>}
 */
export const patch = async (path, body) => (await request("PATCH", path, body)).json();

/**
 * Sends what must arrive even while the page is being closed.
 * @param {string} path
 * @param {object} body
 */
export const postLast = (path, body) => request("POST", path, body, { keepalive: true });

/**
 * The server's health. A server that is not ready answers too, with status 503.
 * @returns {Promise<Health>}
 */
export async function health() {
  const response = await fetch("/health");
  return response.json();
}

// ---- Server-sent events -------------------------------------------------------------------------

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

/**
 * Events of a stream. Throws when the connection breaks before the stream ends.
 * @template {StreamEvent | SessionEvent} E
 * @param {"GET" | "POST"} method
 * @param {string} path
 * @param {object} [body]
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<E>}
 */
export async function* events(method, path, body, signal) {
  const response = await request(method, path, body, { signal });
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      for (const event of parser.push(value)) yield /** @type {E} */ (event);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
