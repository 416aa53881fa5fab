// Actions that wait, so that the user can take them back.

export class Pending {
  /** @type {Set<{run: () => void}>} */
  #actions = new Set();

  /**
   * Runs an action after a while. Returns a function that takes it back: true if it was not too
   * late.
   * @param {() => void} work
   * @param {number} ms
   * @returns {() => boolean}
   */
  add(work, ms) {
    const action = {
      run: () => {
        if (take()) work();
      },
    };
    const take = () => {
      clearTimeout(timer);
      return this.#actions.delete(action);
    };
    const timer = setTimeout(action.run, ms);
    this.#actions.add(action);
    return take;
  }

  /** Runs everything that waits now: the page is being closed. */
  runAll() {
    for (const { run } of [...this.#actions]) run();
  }
}
