// Settings of a session: what the model is told first, how words are drawn, what happens when the context is full.

import { t } from "./i18n.js";
import { samplingToBegin } from "./store.js";
import { dialog, h } from "./ui.js";

const PRESETS = { precise: { temperature: 0, top_p: 1, top_k: 0 }, balanced: { temperature: 0.7, top_p: 0.9, top_k: 40 }, creative: { temperature: 1.1, top_p: 0.95, top_k: 0 } };
const NUMBERS = [
  ["temperature", 0, 2, 0.05], ["top_p", 0.05, 1, 0.05], ["top_k", 0, 200, 1], ["min_p", 0, 0.5, 0.01], ["repetition_penalty", 0.8, 1.5, 0.01],
];
const NEUTRAL = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: null, seed: null };

/** What the model takes for settings that a session does not give: its own defaults, else neutral ones. */
function defaultsOf(state) {
  const { session, health } = state;
  return { ...NEUTRAL, ...(session ? session.sampling_defaults : health?.models?.[0]?.sampling_defaults) };
}

export function openSettings(store) {
  const state = store.state, session = state.session;
  const defaults = defaultsOf(state), now = { ...defaults, ...(session ? session.sampling : samplingToBegin()) };
  const isFixed = Boolean(session && state.turns.size);
  const save = (settings) => store.do.configure(settings);
  const inputs = {};

  const number = ([name, min, max, step]) => {
    const shown = h("output", {}, String(now[name]));
    const range = h("input", { type: "range", min, max, step, value: String(now[name]), id: `set-${name}`, "aria-describedby": `help-${name}`, oninput: () => { shown.textContent = range.value; }, onchange: () => save({ sampling: { [name]: Number(range.value) } }) });
    inputs[name] = (value) => { range.value = String(value); shown.textContent = range.value; };
    return h("div.setting", {}, h("label", { htmlFor: range.id }, t(name)), shown, range, h("p.help", { id: `help-${name}` }, t(`${name}Help`)));
  };
  const whole = (name, label) => {
    const box = h("input", { type: "number", min: name === "seed" ? 0 : 1, value: now[name] ?? "", id: `set-${name}`, "aria-describedby": `help-${name}`, onchange: () => save({ sampling: { [name]: box.value === "" ? null : Number(box.value) } }) });
    return h("div.setting", {}, h("label", { htmlFor: box.id }, t(label)), box, h("p.help", { id: `help-${name}` }, t(`${name}Help`)));
  };

  const system = h("textarea", { rows: 3, id: "set-system", value: session ? session.system || "" : state.draft.system || "", disabled: isFixed, onchange: () => save({ system: system.value }) });
  const policyNow = session ? session.context_policy.name || session.context_policy.kind || "error" : state.draft.context_policy || "error";
  const policy = h("select", { id: "set-policy", disabled: Boolean(session), onchange: () => save({ context_policy: policy.value }) },
    ["error", "slide", "drop_oldest_turns"].map((name) => h("option", { value: name, selected: name === policyNow }, t(`policy_${name}`))));
  const own = Object.fromEntries(NUMBERS.map(([name]) => [name, null])); // null: as the model has it
  const toModel = h("button.quiet", { type: "button", onclick: () => { for (const name of Object.keys(own)) inputs[name](defaults[name]); save({ sampling: own }); } }, t("modelsOwn"));
  const presets = Object.entries(PRESETS).map(([name, values]) => h("button.quiet", { type: "button", onclick: () => { for (const [key, value] of Object.entries(values)) inputs[key](value); save({ sampling: values }); } }, t(name)));

  dialog(t("settings"), h("form.settings", { onsubmit: (event) => event.preventDefault() },
    h("div.setting", {}, h("label", { htmlFor: system.id }, t("system")), system, h("p.help", {}, t(isFixed ? "systemFixed" : "systemHelp"))),
    h("div.setting.presets", { role: "group", "aria-label": t("presets") }, toModel, presets),
    NUMBERS.map(number), whole("max_tokens", "max_tokens"), whole("seed", "seedLabel"),
    h("div.setting", {}, h("label", { htmlFor: policy.id }, t("context")), policy, session ? h("p.help", {}, t("policyFixed")) : null)));
}
