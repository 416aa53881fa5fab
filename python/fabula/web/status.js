// The line on top of the page: what is not as it should be with the server.

import { t } from "./i18n.js";

/** @import { ModelHealth, State } from "./types.js" */

/**
 * "" when everything is well.
 * @param {Pick<State, "online" | "health">} state
 */
export function statusText({ online, health }) {
  if (!online) return t("offline");
  return (health?.models || []).map(modelText).filter(Boolean).join(" ");
}

/** @param {ModelHealth} model */
function modelText({ name, state, progress, error }) {
  const percent = progress ? ` ${Math.round(progress * 100)} %` : "";
  if (state === "ready") return "";
  if (state === "failed") return t("failedModel", { model: name, error: error || "" });
  return t(state === "fetching" ? "fetchingModel" : "loadingModel", { model: name }) + percent;
}
