/** A typed client: signs up, chats, reads a stream, pages through history and logs out, at process.env.API. */

import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type Schemas = components["schemas"];
type Data = { delta: Schemas["Delta"]; done: Schemas["MessagePair"]; error: Schemas["Error"] };
type Name = Schemas["StreamEvent"]["event"];
type StreamEvent = { [K in Name]: { name: K; data: Data[K] } }[Name];

declare const process: { env: Record<string, string | undefined> };

const api = createClient<paths>({ baseUrl: process.env.API ?? "http://localhost:5000" });
let cookie = ""; // a browser keeps it by itself, with credentials: "include"
api.use({
  onRequest({ request }) {
    if (cookie) request.headers.set("Cookie", cookie);
  },
  onResponse({ response }) {
    cookie = response.headers.get("Set-Cookie")?.split(";")[0] ?? cookie;
  },
});

/** Take the data of an answer, or throw the sentence of its error. */
function given<T>(answer: { data?: T; error?: Schemas["Error"]; response: Response }): T {
  if (answer.error) throw new Error(`${answer.response.status}: ${answer.error.error}`);
  return answer.data as T;
}

function check(truth: boolean, what: string) {
  if (!truth) throw new Error(what);
}

async function* events(body: ReadableStream<Uint8Array<ArrayBuffer>>): AsyncGenerator<StreamEvent> {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let received = "";
  for (let part; !(part = await reader.read()).done; ) {
    received += part.value;
    const blocks = received.split("\n\n");
    received = blocks.pop() ?? "";
    for (const block of blocks) {
      const [, name, data] = block.match(/^event: (\w+)\ndata: (.*)$/) ?? [];
      if (name && data) yield { name, data: JSON.parse(data) } as StreamEvent;
    }
  }
}

const ada: Schemas["Credentials"] = { username: "ada", password: "correct horse" };
const { user_id } = given(await api.POST("/api/signup", { body: ada }));
const taken = await api.POST("/api/signup", { body: ada });
check(taken.error?.error === "Username already exists", "a name is taken once");
const { user } = given(await api.POST("/api/login", { body: ada }));
check(user.user_id === user_id && user.username === "ada", "the session is ada's");
check(given(await api.GET("/api/current_user")).user.user_id === user_id, "the cookie is kept");

const talk: Schemas["ConversationSummary"] = given(await api.POST("/api/conversations", { body: { name: "First talk" } }));
const path = { conversation_id: talk.id };
const MESSAGES = "/api/conversations/{conversation_id}/messages";
const send = { params: { path, header: { "Idempotency-Key": "once" } }, body: { text: "Hello" } };
const answer = given(await api.POST(MESSAGES, send));
if (!Array.isArray(answer)) throw new Error("a stream nobody asked for");
const [asked, replied] = answer as Schemas["MessagePair"];
check(asked.text === "Hello" && replied.sender === "bot", "the bot replies");

const stream = await api.POST(MESSAGES, {
  params: { path },
  body: { text: "/long 50" },
  headers: { Accept: "text/event-stream" },
  parseAs: "stream",
});
let pieces = "";
let stored: Schemas["MessagePair"] | undefined;
for await (const event of events(given(stream)!)) {
  if (event.name === "delta") pieces += event.data.text;
  else if (event.name === "done") stored = event.data;
  else throw new Error(event.data.error);
}
check(stored?.[1].text === pieces && pieces.split(" ").length > 50, "the pieces make the stored reply");

const pages: Schemas["Message"][] = [];
let before: number | undefined;
for (let more = true; more; ) {
  const query: paths[typeof MESSAGES]["get"]["parameters"]["query"] = before ? { limit: 1, before } : { limit: 1 };
  const page = await api.GET(MESSAGES, { params: { path, query } });
  pages.unshift(...given(page));
  before = pages[0]?.id;
  more = page.response.headers.has("Link");
}
check(pages.map((message) => message.sender).join() === "user,bot,user,bot", "the pages are the whole history");
const [listed] = given(await api.GET("/api/conversations", { params: { query: { limit: 20, messages: 1, q: "HELLO" } } }));
check(listed?.name === "First talk" && listed.messages.length === 1, "the search finds the conversation");
const { users } = given(await api.GET("/api/users/status"));
const status: "Online" | "Offline" | undefined = users[0]?.status;
check(status === "Online" && users[0]?.last_logout === null, "ada is online");

given(await api.POST("/api/logout/{user_id}", { params: { path: { user_id } } }));
const over = await api.GET("/api/current_user");
check(over.response.status === 401 && over.error?.error === "Login required", "the session is over");
console.log("signed up, chatted, logged out");
