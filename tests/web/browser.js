// What modules of the page need of a browser besides its elements. Import it before them.

class FakeStorage {
  #items = new Map();
  getItem = (key) => this.#items.get(key) ?? null;
  setItem = (key, value) => void this.#items.set(key, String(value));
  removeItem = (key) => void this.#items.delete(key);
  clear = () => this.#items.clear();
}

/** Sets a global, also where node has one of its own that is read-only. */
const define = (name, value) =>
  Object.defineProperty(globalThis, name, { value, writable: true, configurable: true });

define("localStorage", new FakeStorage());
define("sessionStorage", new FakeStorage());
define("navigator", { language: "en-US" });
define("location", { hash: "" });
define("history", { replaceState: (_state, _title, url) => void (location.hash = url) });
define("requestAnimationFrame", (fn) => setImmediate(() => fn(performance.now())));

/** Waits until a condition holds; fails after ten seconds. */
export async function until(condition, what = "the condition") {
  const end = performance.now() + 10_000;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`${what} did not come true`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
