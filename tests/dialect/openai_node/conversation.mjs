// A scripted conversation with OpenAI's own client. Prints one JSON object: what each step found.
//   node conversation.mjs BASE_URL KEY POOR_KEY
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, apiKey, poorKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const ask = (content) => [{ role: "user", content }];
const found = {};

const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const TEMPERATURES = { Oslo: 3, Rome: 21 };

async function failure(asking) {
  try {
    await asking();
  } catch (error) {
    const { status, code, param, type } = error;
    return { name: error.constructor.name, status, code, param, type, request: Boolean(error.requestID) };
  }
  return null;
}

// -- a conversation

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

const whole = await client.chat.completions.create({ model: "gpt", messages: ask("seed=3 deltas=12") });
found.whole = { text: whole.choices[0].message.content, usage: whole.usage, request: Boolean(whole._request_id) };

const stream = await client.chat.completions.create({
  model: "gpt",
  messages: ask("seed=3 deltas=12"),
  stream: true,
  stream_options: { include_usage: true },
});
found.stream = { text: "", finish: null, usage: null };
for await (const chunk of stream) {
  found.stream.text += chunk.choices[0]?.delta.content ?? "";
  found.stream.finish ??= chunk.choices[0]?.finish_reason ?? null;
  found.stream.usage ??= chunk.usage ?? null;
}

// The caller's own loop, with tools called in parallel.
const messages = [
  { role: "system", content: "Be brief." },
  ...ask('seed=5 deltas=3 tool=get_weather:{"city":"Oslo"} tool=get_weather:{"city":"Rome"}'),
];
found.loop = { rounds: 0 };
for (;;) {
  found.loop.rounds += 1;
  const { choices } = await client.chat.completions.create({ model: "gpt", messages, tools, parallel_tool_calls: true });
  messages.push(choices[0].message);
  if (choices[0].finish_reason !== "tool_calls") {
    found.loop.text = choices[0].message.content;
    break;
  }
  for (const call of choices[0].message.tool_calls) {
    const { city } = JSON.parse(call.function.arguments);
    const content = JSON.stringify({ celsius: TEMPERATURES[city] });
    messages.push({ role: "tool", tool_call_id: call.id, content });
  }
}

// The client's own loop, which streams.
found.runner = { called: [] };
const runner = client.chat.completions.runTools({
  model: "gpt",
  stream: true,
  messages: ask('seed=5 deltas=3 tool=get_weather:{"city":"Oslo"}'),
  tools: [
    {
      type: "function",
      function: {
        ...tools[0].function,
        parse: JSON.parse,
        function: ({ city }) => {
          found.runner.called.push(city);
          return JSON.stringify({ celsius: TEMPERATURES[city] });
        },
      },
    },
  ],
});
found.runner.text = await runner.finalContent();

const parsed = await client.chat.completions.parse({
  model: "gpt",
  messages: ask('say={"name":"Ada","age":36}'),
  response_format: zodResponseFormat(z.object({ name: z.string(), age: z.number() }), "person"),
});
found.parsed = parsed.choices[0].message.parsed;

// -- what goes wrong

const bad = new OpenAI({ baseURL, apiKey: "sk-nothing", maxRetries: 0 });
found.authentication = await failure(() => bad.models.list());
found.notFound = await failure(() => client.chat.completions.create({ model: "gpt-99", messages: ask("?") }));
found.badRequest = await failure(() => client.chat.completions.create({ model: "gpt", messages: ask(5) }));
const poor = new OpenAI({ baseURL, apiKey: poorKey, maxRetries: 5 });
await poor.chat.completions.create({ model: "gpt", messages: ask("deltas=2") });
found.rateLimit = await failure(() => poor.chat.completions.create({ model: "gpt", messages: ask("poor deltas=2") }));
const again = new OpenAI({ baseURL, apiKey, maxRetries: 2 });
found.again = (await again.chat.completions.create({ model: "gpt", messages: ask("deltas=3 fail=503 fail_first=1") }))
  .choices[0].message.content;
found.broken = { text: "" };
found.broken.error = await failure(async () => {
  const breaking = await client.chat.completions.create({
    model: "gpt",
    messages: ask("seed=3 deltas=9 fail=die_at:3"),
    stream: true,
  });
  for await (const chunk of breaking) found.broken.text += chunk.choices[0].delta.content ?? "";
});

// -- leaving

const left = await client.chat.completions.create({ model: "gpt", messages: ask("left rate=50 deltas=5000"), stream: true });
for await (const chunk of left) {
  if (chunk.choices[0].delta.content) break; // which aborts
}

console.log(JSON.stringify(found));
