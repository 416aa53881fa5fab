// Elements, messages, dialogs and menus: what every view is built from. Texts are set as text, never as HTML.

/** Makes an element: h("button.quiet", {onclick, title}, "Save"). null children are left out. */
export function h(name, props = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && key !== "list" && key !== "form") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** Makes an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
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
  bin: "M3.5 4.5h9M6.5 4V3h3v1M5 4.5l.5 8.5h5l.5-8.5",
};

/** A line icon of 16 x 16, hidden from screen readers: what carries it has a label. */
export function icon(name) {
  const path = svg("path", {
    d: PATHS[name],
    fill: "none",
    stroke: "currentColor",
    "stroke-width": "1.5",
    "stroke-linecap": "round",
    "stroke-linejoin": "round",
  });
  return svg(
    "svg",
    { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true", class: "icon" },
    path,
  );
}

/** A button that shows an icon and says what it does. */
export function iconButton(name, label, onclick, props = {}) {
  return h(
    "button.icon-button",
    { type: "button", title: label, "aria-label": label, onclick, ...props },
    icon(name),
  );
}

// ---- Messages -------------------------------------------------------------------------------------------------------

let toasts = null;

/** A message at the edge that goes by itself; `action` is [label, function]. Returns a function that takes it away. */
export function toast(text, { action = null, seconds = 6, kind = "" } = {}) {
  if (!toasts) {
    toasts = h("div.toasts", { role: "status", "aria-live": "polite" });
    document.body.append(toasts);
  }
  const close = () => {
    clearTimeout(timer);
    box.remove();
  };
  const button =
    action &&
    h(
      "button",
      {
        type: "button",
        onclick: () => {
          close();
          action[1]();
        },
      },
      action[0],
    );
  const box = h(`div.toast${kind ? "." + kind : ""}`, {}, h("span", {}, text), button);
  const timer = setTimeout(close, seconds * 1000);
  toasts.append(box);
  return close;
}

// ---- Dialogs and menus ----------------------------------------------------------------------------------------------

/** Shows a dialog; returns a function that closes it. Escape and a click beside it close it too. */
export function dialog(title, content, { onclose = () => {}, wide = false } = {}) {
  const box = h(`dialog${wide ? ".wide" : ""}`, {
    "aria-label": title,
    onclose: () => {
      box.remove();
      onclose();
    },
  });
  box.addEventListener("click", (event) => {
    if (event.target === box) box.close();
  });
  box.append(
    h(
      "header",
      {},
      h("h2", {}, title),
      iconButton("close", "×", () => box.close()),
    ),
    h("div.dialog-body", {}, content),
  );
  document.body.append(box);
  box.showModal();
  return () => box.close();
}

/** Asks for a line of text. Resolves to null when it is dismissed. */
export function ask(title, value, { label = "OK", type = "text", help = "" } = {}) {
  return new Promise((resolve) => {
    let answer = null;
    const input = h("input", { type, value, "aria-label": title, autocomplete: "off" });
    const form = h(
      "form.ask",
      {
        onsubmit: (event) => {
          event.preventDefault();
          answer = input.value;
          close();
        },
      },
      help ? h("p", {}, help) : null,
      input,
      h("button.primary", { type: "submit" }, label),
    );
    const close = dialog(title, form, { onclose: () => resolve(answer) });
    input.select();
  });
}

/** Opens a menu below `anchor`; items are [label, function] or null for a line. */
export function menu(anchor, items) {
  document.querySelector(".menu")?.remove();
  const close = () => {
    list.remove();
    document.removeEventListener("pointerdown", away, true);
    anchor.focus();
  };
  const away = (event) => {
    if (!list.contains(event.target)) close();
  };
  const buttons = items.map((item) =>
    item === null
      ? h("hr")
      : h(
          "button",
          {
            type: "button",
            role: "menuitem",
            onclick: () => {
              close();
              item[1]();
            },
          },
          item[0],
        ),
  );
  const list = h(
    "div.menu",
    {
      role: "menu",
      onkeydown: (event) => {
        const all = buttons.filter((button) => button.tagName === "BUTTON"),
          at = all.indexOf(document.activeElement);
        if (event.key === "Escape" || event.key === "Tab") close();
        else if (event.key === "ArrowDown") all[(at + 1) % all.length].focus();
        else if (event.key === "ArrowUp") all[(at - 1 + all.length) % all.length].focus();
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    },
    buttons,
  );
  document.body.append(list);
  const place = anchor.getBoundingClientRect(),
    size = list.getBoundingClientRect();
  list.style.left = `${Math.max(8, Math.min(place.left, innerWidth - size.width - 8))}px`;
  list.style.top = `${place.bottom + size.height + 8 > innerHeight ? Math.max(8, place.top - size.height - 4) : place.bottom + 4}px`;
  document.addEventListener("pointerdown", away, true);
  buttons[0]?.focus();
}

/** Copies text; tells whether it could. Over plain HTTP from another machine browsers offer the old way only. */
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
    before?.focus();
    return done;
  }
}

/** Saves text as a file of the reader's. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
