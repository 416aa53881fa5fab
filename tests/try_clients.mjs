// The quick starts of the npm clients against a server, as rows of docs/clients.md; see try_clients.py.
//
//     npm install openai ai @ai-sdk/openai-compatible zod @anthropic-ai/sdk ollama
//     NODE_PATH=node_modules node try_clients.mjs http://127.0.0.1:8000

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const version = (name) => require(process.cwd() + `/node_modules/${name}/package.json`).version;
const address = process.argv[2] ?? "http://127.0.0.1:8000";
const baseURL = address + "/v1";
const model = (await (await fetch(baseURL + "/models")).json()).data[0].id;
const question = "What is the capital of France?";

function check(value, what) {
  if (!value) throw new Error(`nothing in ${what}`);
}

async function openai() {
  const { default: OpenAI } = await load("openai");
  const client = new OpenAI({ baseURL, apiKey: "none" });
  const messages = [{ role: "user", content: question }];
  const whole = await client.chat.completions.create({ model, messages, max_tokens: 20 });
  check(whole.choices[0].message.content, "the chat");
  let text = "";
  for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 20, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  check(text, "the stream");
  const response = await client.responses.create({ model, input: question, max_output_tokens: 20 });
  check(response.output_text, "the response");
  check((await client.embeddings.create({ model, input: "a" })).data[0].embedding.length, "the embedding");
  return "chat, stream, responses, embeddings";
}

async function ai() {
  const { generateText, streamText, generateObject } = await load("ai");
  const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
  const { z } = await load("zod");
  const provider = createOpenAICompatible({ name: "fabula", baseURL, supportsStructuredOutputs: true });
  const settings = { model: provider(model), prompt: question, maxOutputTokens: 40, temperature: 0 };
  check((await generateText(settings)).text, "the text");
  let text = "";
  for await (const part of streamText(settings).textStream) text += part;
  check(text, "the stream");
  const { object } = await generateObject({ ...settings, schema: z.object({ name: z.string().max(20) }) });
  check(object.name !== undefined, "the object");
  return "generateText, streamText, generateObject";
}

async function anthropic() {
  const { default: Anthropic } = await load("@anthropic-ai/sdk");
  const client = new Anthropic({ baseURL: address, apiKey: "none" });
  const asked = { model, max_tokens: 20, messages: [{ role: "user", content: question }] };
  check((await client.messages.create(asked)).content[0].text, "the message");
  check((await client.messages.stream(asked).finalMessage()).usage.output_tokens, "the stream");
  check((await client.messages.countTokens({ model, messages: asked.messages })).input_tokens, "the count");
  return "messages, stream, countTokens";
}

async function ollama() {
  const { Ollama } = await load("ollama");
  const client = new Ollama({ host: address });
  const asked = { model, messages: [{ role: "user", content: question }], options: { num_predict: 20 } };
  check((await client.chat(asked)).message.content, "the chat");
  let text = "";
  for await (const part of await client.chat({ ...asked, stream: true })) text += part.message.content;
  check(text, "the stream");
  check((await client.generate({ model, prompt: question, options: asked.options })).response, "the answer");
  check((await client.embed({ model, input: "a" })).embeddings[0].length, "the embedding");
  check((await client.list()).models.length && (await client.show({ model })).capabilities, "the models");
  return "chat, stream, generate, embed, list, show";
}

const clients = [["openai", openai], ["ai", ai], ["@anthropic-ai/sdk", anthropic], ["ollama", ollama]];
const named = process.argv.slice(3);
let failed = 0;
for (const [name, run] of clients.filter(([name]) => !named.length || named.includes(name))) {
  try {
    console.log(`| ${name} (npm) | ${version(name)} | ${await run()} | runs |`);
  } catch (error) {
    failed += 1;
    console.error(error);
    console.log(`| ${name} (npm) | ${version(name)} | | ${error.name}: ${String(error.message).slice(0, 200)} |`);
  }
}
process.exit(failed);
