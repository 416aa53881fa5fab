// Markdown as HTML, made by the server. A growing text keeps the blocks that cannot change and sends only its last one.

const EVERY_MS = 350; // a growing text is sent so often at most
const KEPT = 400; // finished texts whose blocks are remembered

export class Renderer {
  /** @param send (texts) => Promise of {rendered: [{blocks, last_line}]} */
  constructor(send) {
    this.send = send;
    this.known = new Map(); // text -> blocks
    this.waiting = new Map(); // text -> functions to call
    this.timer = 0;
  }

  /** Blocks of a finished text, at once if they are known; else `done` is called when they are. */
  blocks(text, done) {
    const found = this.known.get(text);
    if (found) return found;
    if (!this.waiting.has(text)) this.waiting.set(text, []);
    this.waiting.get(text).push(done);
    if (!this.timer) this.timer = setTimeout(() => this.flush(), 0);
    return null;
  }

  async flush() {
    this.timer = 0;
    const batch = [];
    let size = 0;
    for (const text of this.waiting.keys()) {
      if (batch.length === 64 || (batch.length && size + text.length > 300000)) break;
      batch.push(text);
      size += text.length;
    }
    const waiting = batch.map((text) => this.waiting.get(text));
    batch.forEach((text) => this.waiting.delete(text));
    try {
      const { rendered } = await this.send(batch);
      rendered.forEach(({ blocks }, i) => this.remember(batch[i], blocks));
      waiting.flat().forEach((done) => done());
    } catch {
      // It is shown as plain text; the next look asks again.
    }
    if (this.waiting.size && !this.timer) this.timer = setTimeout(() => this.flush(), 0);
  }

  remember(text, blocks) {
    this.known.set(text, blocks);
    if (this.known.size > KEPT) this.known.delete(this.known.keys().next().value);
  }

  /** Keeps `answer.blocks` up with `answer.text`; answer.settled and answer.from are its own: blocks that stay, and where
   * the text behind them begins. */
  follow(answer, done) {
    if (answer.asked) {
      answer.again = true;
      return;
    }
    answer.asked = true;
    const wait = Math.max(0, (answer.lastAsked || 0) + EVERY_MS - performance.now());
    setTimeout(async () => {
      answer.lastAsked = performance.now();
      answer.again = false;
      const from = answer.from || 0,
        text = answer.text.slice(from);
      try {
        const { rendered } = await this.send([text]);
        const { blocks, last_line } = rendered[0];
        answer.blocks = [...(answer.settled || []), ...blocks];
        if (last_line > 0 && blocks.length > 1) {
          answer.settled = answer.blocks.slice(0, -1);
          answer.from = from + offsetOfLine(text, last_line);
        }
        answer.shown = from + text.length;
        done();
      } catch {
        // The words are there as plain text until the next try.
      }
      answer.asked = false;
      if (answer.again) this.follow(answer, done);
    }, wait);
  }
}

function offsetOfLine(text, line) {
  let at = 0;
  for (let i = 0; i < line; i++) at = text.indexOf("\n", at) + 1;
  return at;
}

/** Shows blocks in `element`, replacing only those that differ. The HTML was cleaned by the server. */
export function showBlocks(element, blocks) {
  const old = element.shownBlocks || [];
  let same = 0;
  while (same < old.length && same < blocks.length && old[same] === blocks[same]) same++;
  while (element.children.length > same) element.lastElementChild.remove();
  for (const html of blocks.slice(same)) {
    const box = document.createElement("div");
    box.innerHTML = html;
    element.append(box);
  }
  element.shownBlocks = blocks.slice();
}
