// Settings of a session: the system prompt, how tokens are sampled, and what happens when the
// context is full.

import { t } from "./i18n.js";
import { newSampling } from "./state.js";
import { dialog, h } from "./ui.js";

/** @import { Store } from "./store.js" */
/** @import { PolicyName } from "./types.js" */

/** @typedef {"temperature" | "top_p" | "top_k" | "min_p" | "repetition_penalty"} RangeName */

/** @type {Record<"precise" | "balanced" | "creative", Partial<Record<RangeName, number>>>} */
const PRESETS = {
  precise: { temperature: 0, top_p: 1, top_k: 0 },
  balanced: { temperature: 0.7, top_p: 0.9, top_k: 40 },
  creative: { temperature: 1.1, top_p: 0.95, top_k: 0 },
};

/** @type {{name: RangeName, min: number, max: number, step: number}[]} */
const RANGES = [
  { name: "temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", min: 0.05, max: 1, step: 0.05 },
  { name: "top_k", min: 0, max: 200, step: 1 },
  { name: "min_p", min: 0, max: 0.5, step: 0.01 },
  { name: "repetition_penalty", min: 0.8, max: 1.5, step: 0.01 },
];

/** What applies where neither the session nor the model says anything. */
const NEUTRAL = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 };

/** @type {PolicyName[]} */
const POLICIES = ["error", "slide", "drop_oldest_turns"];

/** @param {Store} store */
export function openSettings(store) {
  const { session, turns, draft, health } = store.state;
  /** What applies where the session gives nothing: the model's own defaults. */
  const defaults = {
    ...NEUTRAL,
    ...(session ? session.sampling_defaults : health?.models[0]?.sampling_defaults),
  };
  const sampling = { ...defaults, ...(session ? session.sampling : newSampling()) };
  const isFixed = Boolean(session && turns.size);
  const save = store.do.configure;

  /** @type {Map<string, (value: number) => void>} Shows a value, by the setting's name. */
  const setters = new Map();

  /** @param {typeof RANGES[number]} range */
  const rangeSetting = ({ name, min, max, step }) => {
    const now = String(sampling[name] ?? defaults[name] ?? NEUTRAL[name]);
    const output = h("output", {}, now);
    const helpId = `help-${name}`;
    /** @param {number} value */
    const set = (value) => {
      input.value = String(value);
      output.textContent = input.value;
    };
    /** @type {HTMLInputElement} */
    const input = h("input", {
      ...{
        type: "range",
        min,
        max,
        step,
        value: now,
        id: `set-${name}`,
        "aria-describedby": helpId,
      },
      oninput: () => void (output.textContent = input.value),
      onchange: () => save({ sampling: { [name]: Number(input.value) } }),
    });
    setters.set(name, set);
    const label = h("label", { htmlFor: input.id }, t(name));
    return h(
      "div.setting",
      {},
      label,
      output,
      input,
      h("p.help", { id: helpId }, t(`${name}Help`)),
    );
  };

  /**
   * A whole number, or nothing.
   * @param {"max_tokens" | "seed"} name
   * @param {"max_tokens" | "seedLabel"} label
   */
  const numberSetting = (name, label) => {
    const helpId = `help-${name}`;
    /** @type {HTMLInputElement} */
    const input = h("input", {
      ...{ type: "number", id: `set-${name}`, "aria-describedby": helpId },
      min: name === "seed" ? 0 : 1,
      value: sampling[name] ?? "",
      onchange: () =>
        save({ sampling: { [name]: input.value === "" ? null : Number(input.value) } }),
    });
    const labelElement = h("label", { htmlFor: input.id }, t(label));
    return h("div.setting", {}, labelElement, input, h("p.help", { id: helpId }, t(`${name}Help`)));
  };

  /** @type {HTMLTextAreaElement} */
  const system = h("textarea", {
    rows: 3,
    id: "set-system",
    value: (session || draft).system || "",
    disabled: isFixed,
    onchange: () => save({ system: system.value }),
  });
  const systemHelp = h("p.help", {}, t(isFixed ? "systemFixed" : "systemHelp"));

  const policyNow = (session ? session.context_policy.name : draft.context_policy) || "error";
  /** @type {HTMLSelectElement} */
  const policy = h(
    "select",
    {
      id: "set-policy",
      disabled: Boolean(session),
      onchange: () => save({ context_policy: /** @type {PolicyName} */ (policy.value) }),
    },
    POLICIES.map((name) =>
      h("option", { value: name, selected: name === policyNow }, t(`policy_${name}`)),
    ),
  );

  const presets = /** @type {(keyof typeof PRESETS)[]} */ (Object.keys(PRESETS)).map((name) => {
    const onclick = () => {
      for (const [key, value] of Object.entries(PRESETS[name])) setters.get(key)?.(value);
      save({ sampling: PRESETS[name] });
    };
    return h("button.quiet", { type: "button", onclick }, t(name));
  });

  const useModels = () => {
    for (const { name } of RANGES) setters.get(name)?.(defaults[name] ?? NEUTRAL[name]);
    save({ sampling: Object.fromEntries(RANGES.map(({ name }) => [name, null])) });
  };
  const modelsOwn = h("button.quiet", { type: "button", onclick: useModels }, t("modelsOwn"));

  const form = h(
    "form.settings",
    { onsubmit: (event) => event.preventDefault() },
    h("div.setting", {}, h("label", { htmlFor: system.id }, t("system")), system, systemHelp),
    h("div.setting.presets", { role: "group", "aria-label": t("presets") }, modelsOwn, presets),
    RANGES.map(rangeSetting),
    numberSetting("max_tokens", "max_tokens"),
    numberSetting("seed", "seedLabel"),
    h(
      "div.setting",
      {},
      h("label", { htmlFor: policy.id }, t("context")),
      policy,
      session && h("p.help", {}, t("policyFixed")),
    ),
  );
  dialog(t("settings"), form);
}
