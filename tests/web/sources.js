// The page's source files, for tests that look at them.

import { readdirSync, readFileSync } from "node:fs";

export const WEB = new URL("../../python/fabula/web/", import.meta.url);
export const MODULES = readdirSync(WEB).filter((name) => name.endsWith(".js"));

/** @param {string} name */
export const source = (name) => readFileSync(new URL(name, WEB), "utf8");

/** Files that a module imports: by "import ... from", by "import()", or for a type in a comment. */
export const importsOf = (name) => {
  const pattern = /(?:\bfrom|\bimport\(?)\s*"\.\/([^"]+)"/g;
  return [...new Set([...source(name).matchAll(pattern)].map((match) => match[1]))];
};

/** Files that a module loads before it runs. */
export const staticImportsOf = (name) => {
  const pattern = /^(?:import|export)\b[^;"]*"\.\/([^"]+)";/gm;
  return [...new Set([...source(name).matchAll(pattern)].map((match) => match[1]))];
};
