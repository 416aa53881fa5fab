// The server, as functions: JSON in and out, errors as `ApiError`, streams as events.

const KEY = "fabula.key";

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message || `HTTP ${status}`);
    this.status = status;
    this.code = body?.error?.code || "";
    this.body = body?.error || {};
  }
}

export const key = {
  get: () => localStorage.getItem(KEY) || "",
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

async function request(method, path, body, options = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, {
    method,
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    ...options,
  });
  if (response.ok) return response;
  throw new ApiError(response.status, await response.json().catch(() => null));
}

export const get = async (path) => (await request("GET", path)).json();
export const post = async (path, body = {}) => (await request("POST", path, body)).json();
export const patch = async (path, body) => (await request("PATCH", path, body)).json();

/** Sends what must arrive even while the page is being closed. */
export const postLast = (path, body) => request("POST", path, body, { keepalive: true });

/** How the server is; never throws for a server that answers. */
export async function health() {
  const response = await fetch("/health");
  return response.json();
}

/** Events of a stream, each {id, event, data}. Throws when the connection breaks before the end. */
export async function* events(method, path, body, signal) {
  const response = await request(method, path, body, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const found = { id: -1, event: "message", data: null };
        for (const line of part.split("\n")) {
          if (line.startsWith("id: ")) found.id = Number(line.slice(4));
          else if (line.startsWith("event: ")) found.event = line.slice(7);
          else if (line.startsWith("data: ")) found.data = JSON.parse(line.slice(6));
        }
        if (found.data !== null) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
