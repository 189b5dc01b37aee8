/** A chat of the AI SDK with the messages of a conversation, of which it shows one version each. */

import { Chat, type UIMessage } from "@ai-sdk/react";
import { request, send } from "./replies";
import { createTransport } from "./transport";

export type Message = {
  id: number;
  sender: "user" | "bot";
  text: string;
  status?: string;
  error?: string; // why the bot failed
  versions?: number[]; // the ids of all versions, if there are several
};
export type ChatMessage = UIMessage<Pick<Message, "error" | "versions">>;

function toUIMessage({ id, sender, text, error, versions }: Message): ChatMessage {
  const role = sender === "user" ? "user" : "assistant";
  return { id: `${id}`, role, parts: [{ type: "text", text }], metadata: { error, versions } };
}

/**
 * Return the chat of a conversation and a function that shows another version of a message, by its id.
 *
 * `getId` returns the conversation's id if that exists, `create` creates it if necessary. A chat must not belong to a
 * component, as one that is unmounted would stop the reply.
 */
export function createChat(getId: () => string | undefined, create: () => Promise<string>) {
  async function load(): Promise<Message | undefined> {
    if (!getId()) return;
    const { messages } = await (await request(`/api/conversations/${getId()}?versions=1`)).json();
    if (chat.status === "ready" || chat.status === "error") chat.messages = messages.map(toUIMessage);
    return messages.at(-1);
  }
  const chat = new Chat<ChatMessage>({
    transport: createTransport(async () => `/api/conversations/${await create()}/messages`, load),
    async onFinish({ isAbort, isDisconnect }) {
      // What was refused is not stored, and stays as it is; the transport loads what was stopped.
      if (isAbort || chat.lastMessage?.role !== "assistant") return;
      await load();
      if (!isDisconnect) chat.clearError(); // it is shown with its message
    },
  });
  async function show(messageId: number) {
    await send("PUT", `/api/conversations/${getId()}/current`, { message_id: messageId });
    await chat.resumeStream();
  }
  return { chat, show };
}

/** Begin a session as a new user unless there is one; your page has a login form instead. */
export async function logIn() {
  if ((await fetch("/api/current_user")).ok) return;
  const credentials = { username: crypto.randomUUID(), password: crypto.randomUUID() };
  await send("POST", "/api/signup", credentials);
  await send("POST", "/api/login", credentials);
}
