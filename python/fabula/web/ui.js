// Elements, messages, dialogs and menus: what every view is built from. Text is set as text, never
// as HTML.

/** @import { Anchor, Child, ElementOf, MenuItem, Props } from "./types.js" */

/**
 * Makes an element: h("button.quiet", {onclick, title}, "Save"). Properties and children that are
 * null, undefined or false are left out.
 * @template {string} Name
 * @param {Name} name Tag and classes.
 * @param {Props} [props] Properties of the element, attributes, and listeners as "onclick".
 * @param {(Child | Child[])[]} children
 * @returns {ElementOf<Name>}
 */
export function h(name, props = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on"))
      element.addEventListener(key.slice(2), /** @type {EventListener} */ (value));
    else if (key in element) Reflect.set(element, key, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return /** @type {ElementOf<Name>} */ (element);
}

/**
 * Makes an SVG element. Attributes that are null are left out.
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number | null>} [attributes]
 * @param {(Node | string)[]} children
 * @returns {SVGElementTagNameMap[Tag]}
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(key, String(value));
  }
  element.append(...children);
  return element;
}

const PATHS = {
  plus: "M8 3v10M3 8h10",
  send: "M8 13V3M4 7l4-4 4 4",
  stop: "M4.5 4.5h7v7h-7z",
  copy: "M5.5 5.5h7v7h-7zM3.5 10V3.5H10",
  edit: "M3 13l.7-3L10.5 3.2a1.2 1.2 0 0 1 1.8 0l.5.5a1.2 1.2 0 0 1 0 1.8L6 12.3z",
  again: "M12.5 6A5 5 0 1 0 13 9M13 3v3h-3",
  more: "M4 8h.01M8 8h.01M12 8h.01",
  menu: "M3 4.5h10M3 8h10M3 11.5h10",
  tree: "M8 3v4M8 7c0 2-4 1-4 5M8 7c0 2 4 1 4 5",
  left: "M10 3.5L5.5 8l4.5 4.5",
  right: "M6 3.5L10.5 8 6 12.5",
  tune: "M3 5h6M12 5h1M3 11h1M7 11h6M10.5 3.5v3M5.5 9.5v3",
  close: "M4 4l8 8M12 4l-8 8",
  go: "M4 3.5L12 8l-8 4.5z",
  back: "M6 4L2.5 7.5 6 11M3 7.5h6a4 4 0 0 1 4 4",
  book: "M3 3.5h4l1 1 1-1h4v9H9l-1 1-1-1H3zM8 4.5v9",
  chat: "M3 3.5h10v7H7L4 13v-2.5H3z",
  tag: "M3 3h5l5 5-5 5-5-5zM5.7 5.7h.01",
};

/** @typedef {keyof typeof PATHS} IconName */

/**
 * A line icon of 16 x 16, hidden from screen readers: the element that carries it has a label.
 * @param {IconName} name
 */
export function icon(name) {
  const path = svg("path", {
    d: PATHS[name],
    fill: "none",
    stroke: "currentColor",
    "stroke-width": "1.5",
    "stroke-linecap": "round",
    "stroke-linejoin": "round",
  });
  const box = { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true", class: "icon" };
  return svg("svg", box, path);
}

/**
 * A button that shows an icon and has a label.
 * @param {IconName} name
 * @param {string} label
 * @param {() => unknown} onclick
 * @param {Props} [props]
 */
export function iconButton(name, label, onclick, props = {}) {
  const own = { type: "button", title: label, "aria-label": label, onclick };
  return h("button.icon-button", { ...own, ...props }, icon(name));
}

/**
 * The nearest element around an event's target that matches; null if there is none.
 * @template {Element} [Found=HTMLElement]
 * @param {Event} event
 * @param {string} selector
 * @returns {Found | null}
 */
export function closest(event, selector) {
  return event.target instanceof Element ? event.target.closest(selector) : null;
}

// ---- Messages -----------------------------------------------------------------------------------

/** @type {HTMLElement | null} */
let toasts = null;

/**
 * A message at the edge of the page that goes by itself. Returns a function that removes it.
 * @param {string} text
 * @param {{action?: [label: string, run: () => void] | null, seconds?: number, kind?: "" | "bad"}} [options]
 */
export function toast(text, { action = null, seconds = 6, kind = "" } = {}) {
  if (!toasts) {
    toasts = h("div.toasts", { role: "status", "aria-live": "polite" });
    document.body.append(toasts);
  }
  const box = h(kind ? "div.toast.bad" : "div.toast", {}, h("span", {}, text));
  const close = () => {
    clearTimeout(timer);
    box.remove();
  };
  if (action) {
    const [label, run] = action;
    const onclick = () => {
      close();
      run();
    };
    box.append(h("button", { type: "button", onclick }, label));
  }
  const timer = setTimeout(close, seconds * 1000);
  toasts.append(box);
  return close;
}

// ---- Dialogs and menus --------------------------------------------------------------------------

/**
 * Shows a dialog; returns a function that closes it. Escape and a click outside close it too.
 * @param {string} title
 * @param {Child | Child[]} content
 * @param {{onclose?: () => void, wide?: boolean}} [options]
 */
export function dialog(title, content, { onclose = () => {}, wide = false } = {}) {
  const box = h(wide ? "dialog.wide" : "dialog", {
    "aria-label": title,
    onclose: () => {
      box.remove();
      onclose();
    },
  });
  box.addEventListener("click", (event) => {
    if (event.target === box) box.close();
  });
  const close = () => box.close();
  box.append(
    h("header", {}, h("h2", {}, title), iconButton("close", "×", close)),
    h("div.dialog-body", {}, content),
  );
  document.body.append(box);
  box.showModal();
  return close;
}

/**
 * Asks for a line of text. Resolves to null when the dialog is closed without it.
 * @param {string} title
 * @param {string} value
 * @param {{type?: "text" | "password", help?: string}} [options]
 * @returns {Promise<string | null>}
 */
export function ask(title, value, { type = "text", help = "" } = {}) {
  return new Promise((resolve) => {
    /** @type {string | null} */
    let answer = null;
    const input = h("input", { type, value, "aria-label": title, autocomplete: "off" });
    /** @param {SubmitEvent} event */
    const onsubmit = (event) => {
      event.preventDefault();
      answer = input.value;
      close();
    };
    const button = h("button.primary", { type: "submit" }, "OK");
    const form = h("form.ask", { onsubmit }, help ? h("p", {}, help) : null, input, button);
    const close = dialog(title, form, { onclose: () => resolve(answer) });
    input.select();
  });
}

/**
 * Opens a menu below an element.
 * @param {Anchor} anchor Gets the focus back.
 * @param {MenuItem[]} items
 */
export function menu(anchor, items) {
  document.querySelector(".menu")?.remove();
  const close = () => {
    list.remove();
    document.removeEventListener("pointerdown", onOutside, true);
    anchor.focus();
  };
  /** @param {Event} event */
  const onOutside = (event) => {
    if (!(event.target instanceof Node && list.contains(event.target))) close();
  };
  /** @type {HTMLButtonElement[]} */
  const buttons = [];
  const rows = items.map((item) => {
    if (!item) return h("hr");
    const [label, action] = item;
    const onclick = () => {
      close();
      action();
    };
    const button = h("button", { type: "button", role: "menuitem", onclick }, label);
    buttons.push(button);
    return button;
  });
  /** @param {KeyboardEvent} event */
  const onkeydown = (event) => {
    const at = buttons.findIndex((button) => button === document.activeElement);
    if (event.key === "Escape" || event.key === "Tab") close();
    else if (event.key === "ArrowDown") buttons[(at + 1) % buttons.length].focus();
    else if (event.key === "ArrowUp") buttons[(at - 1 + buttons.length) % buttons.length].focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const list = h("div.menu", { role: "menu", onkeydown }, rows);
  document.body.append(list);
  const at = anchor.getBoundingClientRect();
  const size = list.getBoundingClientRect();
  const fitsBelow = at.bottom + size.height + 8 <= innerHeight;
  list.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  list.style.top = `${fitsBelow ? at.bottom + 4 : Math.max(8, at.top - size.height - 4)}px`;
  document.addEventListener("pointerdown", onOutside, true);
  buttons[0]?.focus();
}

// ---- Text and files -----------------------------------------------------------------------------

/**
 * Copies text. Resolves to whether it worked. Over plain HTTP from another machine there is no
 * navigator.clipboard.
 * @param {string} text
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const box = h("textarea.sr-only", { value: text, "aria-hidden": "true" });
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    if (before instanceof HTMLElement) before.focus();
    return done;
  }
}

/**
 * Lets the user save text as a file.
 * @param {string} name
 * @param {string} text
 * @param {string} type
 */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
