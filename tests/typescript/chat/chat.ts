/** The conversation whose id is in the page's URL; opened without one, the page begins a conversation as a new user. */

import { Chat, type UIMessage } from "@ai-sdk/react";
import { request } from "./replies";
import { createTransport } from "./transport";

type Message = { id: number; sender: "user" | "bot"; text: string };

async function post(path: string, body: object) {
  const headers = { "Content-Type": "application/json" };
  return (await request(`/api/${path}`, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

function toUIMessage({ id, sender, text }: Message): UIMessage {
  return { id: `${id}`, role: sender === "user" ? "user" : "assistant", parts: [{ type: "text", text }] };
}

if (!location.hash) {
  const credentials = { username: crypto.randomUUID(), password: crypto.randomUUID() };
  await post("signup", credentials);
  await post("login", credentials);
  location.hash = (await post("conversations", { name: "A conversation" })).id;
}

const url = `/api/conversations/${location.hash.slice(1)}`;
const messages: UIMessage[] = (await (await request(url)).json()).messages.map(toUIMessage);
// The chat does not belong to a component: one that is unmounted would stop the reply.
export const chat = new Chat({ messages, transport: createTransport(`${url}/messages`, messages) });
