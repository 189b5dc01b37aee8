/** A transport for useChat of the AI SDK. The id of a chat is that of a conversation. */

import type { ChatTransport, UIMessage, UIMessageChunk } from "ai";
import { type EventSourceMessage, EventSourceParserStream } from "eventsource-parser/stream";

type Message = { id: number; sender: "user" | "bot"; text: string; status?: string };
type SendOptions = Parameters<ChatTransport<UIMessage>["sendMessages"]>[0];
type ReconnectOptions = Parameters<ChatTransport<UIMessage>["reconnectToStream"]>[0];

async function request(path: string, init?: RequestInit): Promise<Response> {
  const response = await fetch(`/api/conversations/${path}`, init);
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

export class ConversationTransport implements ChatTransport<UIMessage> {
  private ids = new Map<string, number>(); // the ids of the user's messages in the API, by those in the chat

  /** Return the messages of a conversation, to begin a chat with. */
  async load(chatId: string): Promise<UIMessage[]> {
    const { messages }: { messages: Message[] } = await (await request(chatId)).json();
    for (const { id } of messages) this.ids.set(`${id}`, id);
    return messages.map(({ id, sender, text }) => {
      return { id: `${id}`, role: sender === "user" ? "user" : "assistant", parts: [{ type: "text", text }] };
    });
  }

  /** Send the last message, or, if the API has it, edit it and regenerate the reply. Aborting stops the reply. */
  async sendMessages({ chatId, messages, abortSignal: signal }: SendOptions) {
    const { id: key, parts } = messages.at(-1)!;
    const text = parts.map((part) => (part.type === "text" ? part.text : "")).join("");
    const id = this.ids.get(key);
    signal?.addEventListener("abort", () => this.stop(chatId, key));
    const response = await request(id ? `${chatId}/messages/${id}` : `${chatId}/messages`, {
      method: id ? "PUT" : "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream", "Idempotency-Key": key },
      body: JSON.stringify({ text }),
      signal,
    });
    return this.read(response, key);
  }

  /** Follow the last reply if it is in progress. Aborting stops it. */
  async reconnectToStream({ chatId, abortSignal: signal }: ReconnectOptions) {
    const [question, reply] = await this.getLastExchange(chatId, signal);
    if (reply?.status !== "in_progress") return null;
    const key = `${question!.id}`;
    signal?.addEventListener("abort", () => this.stop(chatId, key));
    return this.read(await request(`${chatId}/messages/${reply.id}/events`, { signal }), key);
  }

  private async getLastExchange(chatId: string, signal?: AbortSignal): Promise<Message[]> {
    return (await request(`${chatId}/messages?limit=2`, { signal })).json();
  }

  private async stop(chatId: string, key: string) {
    const id = this.ids.get(key) ?? (await this.getLastExchange(chatId))[0]?.id;
    if (!id) return;
    this.ids.set(key, id);
    await request(`${chatId}/messages/${id}/stop`, { method: "POST" });
  }

  private read(response: Response, key: string): ReadableStream<UIMessageChunk> {
    let id: number;
    const transform: Transformer<EventSourceMessage, UIMessageChunk>["transform"] = ({ event, data }, controller) => {
      const value = JSON.parse(data);
      if (event === "start") {
        id = value[0].id;
        controller.enqueue({ type: "start", messageId: `${value[1].id}` });
        controller.enqueue({ type: "text-start", id: "text" });
      } else if (event === "delta") {
        this.ids.set(key, id); // a reply that fails before its first word is not stored, nor is the message
        controller.enqueue({ type: "text-delta", id: "text", delta: value.text });
      } else if (event === "done") {
        controller.enqueue({ type: "text-end", id: "text" });
        controller.enqueue({ type: "finish" });
      } else if (event === "error") controller.enqueue({ type: "error", errorText: value.error });
    };
    const events = response.body!.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
    return events.pipeThrough(new TransformStream({ transform }));
  }
}
