/** The transport of useChat: how the chat sends a message, follows the reply, and stops it. */

import type { ChatTransport } from "ai";
import type { ChatMessage, Message } from "./chat";
import { readChunks, request, send } from "./replies";

/**
 * Return a transport. `open` returns the URL of the conversation's messages, and creates the conversation if necessary;
 * `load` shows what is stored, and returns the last message.
 */
export function createTransport(
  open: () => Promise<string>,
  load: () => Promise<Message | undefined>,
): ChatTransport<ChatMessage> {
  async function follow(url: string, signal?: AbortSignal) {
    async function stop() {
      await request(`${url}/stop`, { method: "POST" });
      await load();
    }
    signal?.addEventListener("abort", stop);
    if (signal?.aborted) await stop();
    return readChunks(await request(`${url}/events`, { signal }));
  }
  return {
    resumeStreamIsReplay: true, // the events begin with the beginning of the reply
    async sendMessages({ messages, abortSignal }) {
      const { id, parts } = messages.at(-1)!;
      const text = parts.map((part) => (part.type === "text" ? part.text : "")).join("");
      const url = await open();
      // A stored message, whose id is a number, is edited, or its reply regenerated, if the text is the same. A new one
      // may have arrived though no response did: its key makes it safe to send again.
      const [method, path, key] = /^\d+$/.test(id) ? ["PUT", `/${id}`] : ["POST", "", { "Idempotency-Key": id }];
      const response = await send(method, url + path, { text }, { Prefer: "respond-async", ...key });
      const [, reply] = await response.json();
      return follow(`${url}/${reply.id}`, abortSignal);
    },
    async reconnectToStream({ abortSignal }) {
      const reply = await load();
      const isInProgress = reply?.status === "in_progress" && !abortSignal?.aborted;
      return isInProgress ? follow(`${await open()}/${reply.id}`, abortSignal) : null;
    },
  };
}
