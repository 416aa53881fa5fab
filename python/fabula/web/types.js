// Types only: the JSON that the server sends, as far as the page reads it, and the page's own
// state. No module loads this file in the browser; `tsc` reads it. Field names are those of the API
// (see /docs of a running server).

// ---- Sessions and turns ----

/**
 * @typedef {object} Sampling Settings that are null or missing are at their default.
 * @property {number | null} [temperature]
 * @property {number | null} [top_p]
 * @property {number | null} [top_k]
 * @property {number | null} [min_p]
 * @property {number | null} [repetition_penalty]
 * @property {number | null} [max_tokens]
 * @property {number | null} [seed]
 */

/** @typedef {Sampling & {source: string}} SamplingDefaults What a model recommends, and where that is said; "" for nowhere. */

/** @typedef {"error" | "slide" | "drop_oldest_turns"} PolicyName What happens when the context is full. */

/**
 * @typedef {object} Session Reply of GET and PATCH /sessions/{id}.
 * @property {string} session_id
 * @property {string} title
 * @property {string[]} tags
 * @property {string | null} system
 * @property {string} head_id "" for the empty start.
 * @property {Sampling} sampling
 * @property {SamplingDefaults} sampling_defaults
 * @property {{name: PolicyName}} context_policy
 */

/**
 * @typedef {object} SessionSummary One session in the reply of GET /sessions.
 * @property {string} session_id
 * @property {string} title
 * @property {string[]} tags
 * @property {string} model
 * @property {number} n_turns
 * @property {number} created_at Seconds since 1970.
 * @property {number} updated_at Seconds since 1970.
 */

/** @typedef {"stop" | "length" | "cancelled" | "timeout" | "interrupted" | "written"} FinishReason */

/**
 * @typedef {object} TurnJson One turn in the reply of GET /sessions/{id}/tree.
 * @property {string} id
 * @property {string} parent_id "" for a turn that follows the empty start.
 * @property {number} number Depth: 1 for a first turn.
 * @property {boolean} chat Whether it is a chat turn; false for a piece of a story.
 * @property {boolean} frozen A note: the model reads it, the story does not show it.
 * @property {string} prompt
 * @property {string} text
 * @property {FinishReason | null} finish_reason
 * @property {number | null} seed
 * @property {number} prompt_tokens
 * @property {number} reused Tokens whose keys and values were in the cache.
 * @property {number} recomputed Tokens whose keys and values had been evicted.
 * @property {number} generated Tokens of the reply.
 * @property {number} first_token_ms
 * @property {number} tokens_per_s
 * @property {string[]} tags
 */

/**
 * @typedef {object} TreeReply Reply of GET /sessions/{id}/tree; parents come before their children.
 * @property {string} head_id
 * @property {boolean} can_redo
 * @property {TurnJson[]} turns
 */

/** @typedef {TurnJson & {children: string[]}} Turn A turn as the page keeps it. */
/** @typedef {Map<string, Turn>} Turns Every turn of the open session, by id. */

/** @typedef {{session_id: string}} SessionRef */
/** @typedef {{session_id: string, head_id: string}} HeadReply Reply of /rollback and /redo. */

/**
 * @typedef {object} Alternative One token of the reply of /alternatives, the most likely first.
 * @property {number} token_id
 * @property {string} text
 * @property {number} logprob Natural logarithm of its probability.
 * @property {boolean} chosen Whether the model sampled this one.
 */

/** @typedef {{token_id: number, text: string}} Token One token of the reply of /turn_tokens. */

/**
 * @typedef {object} Count Reply of /count.
 * @property {number} prompt_tokens
 * @property {number} context Context length in tokens.
 * @property {boolean} fits
 */

/** @typedef {{id: string, turns: unknown[]}} SessionFile What /sessions/{id}/export gives. */

// ---- The server ----

/**
 * @typedef {object} ModelHealth
 * @property {string} name
 * @property {"fetching" | "loading" | "ready" | "failed"} state
 * @property {SamplingDefaults} [sampling_defaults] Once it is loaded.
 * @property {number | null} [progress] From 0 to 1.
 * @property {string} [error]
 * @property {number} [weight_bytes]
 * @property {number} [cache_bytes]
 * @property {number} [cache_limit_bytes]
 * @property {number} [state_bytes] Of recurrent states; 0 unless it is a hybrid.
 * @property {number} [state_limit_bytes]
 * @property {"keep" | "drop"} [window_kv]
 * @property {"bf16" | "f32" | null} [bf16_inputs]
 */

/** @typedef {{ready: boolean, version: string, models: ModelHealth[]}} Health Reply of GET /health. */
/** @typedef {{error?: {message?: string, code?: string | null}}} ErrorBody Reply of a request that failed. */
/** @typedef {{blocks: string[], last_line: number}} Rendered Blocks of HTML; more text changes only lines from `last_line`. */

// ---- Server-sent events ----

/**
 * @typedef {object} StreamStart Data of the event "start" of a stream.
 * @property {string} session_id
 * @property {string} stream_id
 * @property {string} parent_id "" for the empty start.
 * @property {string} prompt
 * @property {boolean} selects Whether the reply becomes the head.
 * @property {number} [n] Replies that are generated side by side; 1 if missing.
 * @property {string} [begun_text] Text that the reply continues.
 */

/** @typedef {{turn_id?: string | null, finish_reason?: FinishReason | null}} ReplyResult Data of "done". */
/** @typedef {{index?: number}} ReplyIndex Which of several replies an event is about; 0 if missing. */

/**
 * @typedef {{id: number, event: "start", data: StreamStart}
 *   | {id: number, event: "token", data: ReplyIndex & {text: string}}
 *   | {id: number, event: "done", data: ReplyIndex & ReplyResult}
 *   | {id: number, event: "error", data: ReplyIndex & {error: {message: string}}}} StreamEvent
 */

/**
 * @typedef {{id: number, event: "state", data: {head_id: string, streams: StreamStart[]}}
 *   | {id: number, event: "begun", data: StreamStart}   | {id: number, event: "ended", data:
 * {stream_id: string}}   | {id: number, event: "head" | "tree" | "tags" | "settings", data:
 * {head_id: string, can_redo: boolean}}   | {id: number, event: "deleted", data: object}} SessionEvent An event of GET
 * /sessions/{id}/events.
 */

// ---- The page's state ----

/**
 * @typedef {object} GrowingText A text that grows, and the HTML of its beginning. See renderer.js.
 * @property {string} text
 * @property {string[]} blocks HTML of text[0, shown).
 * @property {number} [shown]
 * @property {string[]} [settled] Blocks that cannot change any more.
 * @property {number} [from] Where the text after `settled` begins.
 * @property {boolean} [isAsked] Whether the server is rendering it.
 * @property {boolean} [isChanged] Whether it grew meanwhile.
 * @property {number} [askedAt] performance.now() of the last request.
 */

/**
 * @typedef {GrowingText & {
 *   done: boolean, result: ReplyResult | null, nTokens: number, firstAt?: number, }} LiveReply A
 * reply that is being generated. `firstAt`: performance.now() of its first token on the page.
 */

/**
 * @typedef {object} Live A stream that is being read.
 * @property {string} streamId
 * @property {string} parentId
 * @property {string} prompt
 * @property {boolean} selects Whether the reply becomes the head.
 * @property {LiveReply[]} replies
 * @property {number} last Id of the last event; -1 before the first.
 * @property {boolean} broken Whether the connection is lost and is being made again.
 * @property {Set<string>} before Ids of the turns there were when it began.
 */

/** @typedef {{sampling: Sampling, system?: string, context_policy?: PolicyName}} Draft Settings of a session to come. */

/**
 * @typedef {object} State
 * @property {Health | null} health null before the first reply.
 * @property {boolean} online Whether the server answers.
 * @property {boolean} needsKey Whether the server asks for an API key.
 * @property {SessionSummary[]} sessions The list, newest first.
 * @property {string} search What the list is filtered by.
 * @property {Session | null} session The open session; null for none, or for one that has no turn yet.
 * @property {Turns} turns
 * @property {string[]} path Turn ids from the first turn to the head.
 * @property {string} headId "" for the empty start.
 * @property {boolean} canRedo
 * @property {Map<string, Live>} live Streams that are being read, by id.
 * @property {{prompt: string, text: string} | null} lost A reply that the server lost when it ended.
 * @property {Draft} draft
 * @property {Count | null} count
 */

/** @typedef {"health" | "sessions" | "key" | "session" | "opened" | "tree" | "live" | "count"} Change */
/** @typedef {(state: State, changed: Set<Change>) => void} Subscriber */
/** @typedef {{unmount: () => void}} View */

// ---- Elements ----

/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * @typedef {Record<string, unknown> & {
 *   onclick?: (event: MouseEvent) => unknown,
 *   oninput?: (event: Event) => unknown,
 *   onchange?: (event: Event) => unknown,
 *   onsubmit?: (event: SubmitEvent) => unknown,
 *   onkeydown?: (event: KeyboardEvent) => unknown,
 *   onclose?: (event: Event) => unknown,
 * }} Props
 */

/**
 * The element that a name such as "button.quiet" makes.
 * @template {string} Name
 * @typedef {Name extends `${infer Tag}.${string}` ? ElementOf<Tag>
 *   : Name extends keyof HTMLElementTagNameMap ? HTMLElementTagNameMap[Name]
 *   : HTMLElement} ElementOf
 */

/** @typedef {[label: string, action: () => unknown] | null} MenuItem null is a line. */
/** @typedef {{getBoundingClientRect(): DOMRect, focus(): void}} Anchor Where a menu opens. */

export {};
