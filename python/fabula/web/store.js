// The store: what views see of the state, and the verbs. Also watches the server's health.

import * as api from "./api.js";
import { clear, list, open, reload, renderer } from "./session.js";
import { handlers, state, subscribe, touch } from "./state.js";
import { verbs } from "./verbs.js";

const READY_MS = 15_000; // between two checks of a server that is ready
const WAITING_MS = 700; // while it is loading or away

/**
 * Asks how the server is. One that is back after a pause may have changed meanwhile: what is shown
 * is loaded again.
 */
export async function checkHealth() {
  const { health: before, online: wasOnline } = state;
  try {
    state.health = await api.health();
    state.online = true;
    if (!wasOnline || JSON.stringify(before) !== JSON.stringify(state.health)) touch("health");
    if (!wasOnline) {
      await reload();
      await list();
    }
  } catch {
    if (state.online) {
      state.online = false;
      touch("health");
    }
  }
}

async function watchHealth() {
  for (;;) {
    await checkHealth();
    const wait = state.online && state.health?.ready ? READY_MS : WAITING_MS;
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

/** @typedef {typeof store} Store */

export const store = {
  state,
  subscribe,
  touch,
  open,
  list,
  clear,
  renderer,
  do: verbs,

  /**
   * Starts to watch the server and loads the list.
   * @param {{error: (error: Error) => void, notice: (text: string) => void}} given
   */
  start(given) {
    Object.assign(handlers, given);
    watchHealth();
    return list();
  },
};
