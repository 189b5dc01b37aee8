/** Uses the API with the types of openapi-typescript, by openapi-fetch. */

import createClient from "openapi-fetch";
import type { components, paths } from "./generated/openapi-typescript";
import { API, check } from "./setup";

type Schemas = components["schemas"];

const MESSAGES = "/api/conversations/{conversation_id}/messages";
const EVENTS = "/api/conversations/{conversation_id}/messages/{message_id}/events";
const api = createClient<paths>({ baseUrl: API });

/** Return the data of a response, or throw its error. */
function unwrap<T>(result: { data?: T; error?: Schemas["ApiError"]; response: Response }): T {
  if (result.error) throw new Error(`${result.response.status}: ${result.error.error}`);
  return result.data as T;
}

const credentials: Schemas["Credentials"] = { username: "openapi-typescript", password: "correct horse" };
const { user_id } = unwrap(await api.POST("/api/signup", { body: credentials }));
const taken = await api.POST("/api/signup", { body: credentials });
check(taken.response.status === 400 && taken.error?.error === "Username already exists", "a username is unique");
const early = await api.GET("/api/current_user");
check(early.response.status === 401 && early.error?.error === "Login required", "a session is required");
unwrap(await api.POST("/api/login", { body: credentials }));
check(unwrap(await api.GET("/api/current_user")).user.user_id === user_id, "the cookie is kept");

const conversation: Schemas["ConversationSummary"] = unwrap(
  await api.POST("/api/conversations", { body: { name: "First conversation" } }),
);
const path = { conversation_id: conversation.id };
const [message, reply] = unwrap(
  await api.POST(MESSAGES, { params: { path, header: { "Idempotency-Key": "first" } }, body: { text: "Hello" } }),
) as Schemas["Exchange"]; // openapi-fetch turns the tuple into an array
check(message.text === "Hello" && reply.sender === "bot" && reply.text !== "", "the bot replies");

const [, pending] = unwrap(
  await api.POST(MESSAGES, { params: { path, header: { Prefer: "respond-async" } }, body: { text: "Hello again" } }),
) as Schemas["Exchange"];
const events = await api.GET(EVENTS, { params: { path: { ...path, message_id: pending.id } }, parseAs: "stream" });
const stream = events.data as ReadableStream<BufferSource>;
let received = "";
for (const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
  const { done, value } = await reader.read();
  if (done) break;
  received += value;
}
check(received.startsWith("event: start\n") && received.includes("event: done\n"), "the reply is streamed");
const ended = unwrap(
  await api.GET("/api/conversations/{conversation_id}/messages/{message_id}", {
    params: { path: { ...path, message_id: pending.id } },
  }),
);
check(ended.status === undefined && ended.text !== "", "the reply is complete");

const messages: Schemas["Message"][] = [];
let before: number | undefined;
for (let more = true; more; ) {
  const query: paths[typeof MESSAGES]["get"]["parameters"]["query"] = before ? { limit: 1, before } : { limit: 1 };
  const page = await api.GET(MESSAGES, { params: { path, query } });
  messages.unshift(...unwrap(page));
  before = messages[0]?.id;
  more = page.response.headers.has("Link");
}
check(messages.map(({ sender }) => sender).join() === "user,bot,user,bot", "the pages are the whole history");
const query = { limit: 20, messages: 1, q: "HELLO", order: "recent" } as const;
const [recent] = unwrap(await api.GET("/api/conversations", { params: { query } }));
check(recent?.messages.length === 1 && recent.updated_at !== undefined, "the search finds the conversation");
const [found] = unwrap(await api.GET("/api/messages", { params: { query: { q: "again", limit: 1 } } }));
check(found?.snippet.slice(found.match.start, found.match.end) === "again", "the search finds the message");
const { users } = unwrap(await api.GET("/api/users/status"));
check(users.some((user) => user.user_id === user_id && user.status === "Online"), "the user is online");
const missing = await api.GET("/api/conversations/{conversation_id}", { params: { path: { conversation_id: 999999 } } });
check(missing.response.status === 404 && missing.error?.error === "Conversation not found", "404 has an error");

unwrap(await api.POST("/api/logout/{user_id}", { params: { path: { user_id } } }));
check((await api.GET("/api/current_user")).response.status === 401, "the session has ended");
