// Markdown to HTML, by the server. Requests are batched. Of a text that grows, blocks that cannot
// change any more are kept and only the rest is sent.

/** @import { GrowingText, Rendered } from "./types.js" */

const EVERY_MS = 350; // shortest time between two requests for one growing text
const MAX_KNOWN = 400; // finished texts whose blocks are kept
const MAX_BATCH = 64; // texts in one request
const MAX_BATCH_SIZE = 300_000; // characters in one request of several texts

export class Renderer {
  /** @type {Map<string, string[]>} Blocks by text, oldest first. */
  #known = new Map();
  /** @type {Map<string, (() => void)[]>} Callbacks by text. */
  #waiting = new Map();
  #isScheduled = false;

  /** @param {(texts: string[]) => Promise<{rendered: Rendered[]}>} send */
  constructor(send) {
    this.send = send;
  }

  /**
   * Blocks of a finished text if they are known; else null, and `done` is called when they are.
   * @param {string} text
   * @param {() => void} done
   */
  blocks(text, done) {
    const found = this.#known.get(text);
    if (found) return found;
    const waiting = this.#waiting.get(text);
    if (waiting) waiting.push(done);
    else this.#waiting.set(text, [done]);
    this.#schedule();
    return null;
  }

  #schedule() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    setTimeout(() => this.#flush(), 0);
  }

  async #flush() {
    this.#isScheduled = false;
    /** @type {string[]} */
    const batch = [];
    let size = 0;
    for (const text of this.#waiting.keys()) {
      if (batch.length === MAX_BATCH || (batch.length && size + text.length > MAX_BATCH_SIZE))
        break;
      batch.push(text);
      size += text.length;
    }
    const callbacks = batch.flatMap((text) => this.#waiting.get(text) || []);
    batch.forEach((text) => this.#waiting.delete(text));
    try {
      const { rendered } = await this.send(batch);
      rendered.forEach(({ blocks }, i) => this.#remember(batch[i], blocks));
      callbacks.forEach((done) => done());
    } catch {
      // The text is shown as plain text; the next call of blocks() asks again.
    }
    if (this.#waiting.size) this.#schedule();
  }

  /**
   * @param {string} text
   * @param {string[]} blocks
   */
  #remember(text, blocks) {
    this.#known.set(text, blocks);
    for (const oldest of this.#known.keys()) {
      if (this.#known.size <= MAX_KNOWN) break;
      this.#known.delete(oldest);
    }
  }

  /**
   * Keeps `growing.blocks` up to date with `growing.text`; call it after each change. `done` is
   * called after each update.
   * @param {GrowingText} growing
   * @param {() => void} done
   */
  follow(growing, done) {
    if (growing.isAsked) {
      growing.isChanged = true;
      return;
    }
    growing.isAsked = true;
    const wait = Math.max(0, (growing.askedAt || 0) + EVERY_MS - performance.now());
    setTimeout(async () => {
      growing.askedAt = performance.now();
      growing.isChanged = false;
      const from = growing.from || 0;
      const text = growing.text.slice(from);
      try {
        const { rendered } = await this.send([text]);
        update(growing, from, text, rendered[0]);
        done();
      } catch {
        // The rest is shown as plain text until the next request.
      }
      growing.isAsked = false;
      if (growing.isChanged) this.follow(growing, done);
    }, wait);
  }
}

/**
 * Takes the blocks of text[from, from + text.length) over. All but the last block are settled.
 * @param {GrowingText} growing
 * @param {number} from
 * @param {string} text
 * @param {Rendered} rendered
 */
function update(growing, from, text, { blocks, last_line }) {
  growing.blocks = [...(growing.settled || []), ...blocks];
  if (last_line > 0 && blocks.length > 1) {
    growing.settled = growing.blocks.slice(0, -1);
    growing.from = from + offsetOfLine(text, last_line);
  }
  growing.shown = from + text.length;
}

/**
 * Where a line begins.
 * @param {string} text
 * @param {number} line From 0.
 */
export function offsetOfLine(text, line) {
  let offset = 0;
  for (let i = 0; i < line; i++) offset = text.indexOf("\n", offset) + 1;
  return offset;
}
