import type { ChatTransport, UIMessage } from "ai";
import { getExchangeInProgress, readChunks, request } from "./replies";

export function createTransport(url: string, stored: UIMessage[]): ChatTransport<UIMessage> {
  const ids = new Map(stored.map(({ id }) => [id, id])); // of stored messages: from the id in the chat to the API's
  async function stop(key: string) {
    const id = ids.get(key) ?? (await getExchangeInProgress(url))[0];
    if (!id) return;
    ids.set(key, id);
    await request(`${url}/${id}/stop`, { method: "POST" });
  }
  async function stream(key: string, path: string, init: RequestInit) {
    init.signal?.addEventListener("abort", () => stop(key));
    return readChunks(await request(url + path, init), (id) => ids.set(key, id));
  }
  return {
    resumeStreamIsReplay: true,
    async sendMessages({ messages, abortSignal: signal }) {
      const { id: key, parts } = messages.at(-1)!;
      const id = ids.get(key); // if it is stored, the message is edited, or its reply regenerated
      const headers = { "Content-Type": "application/json", Accept: "text/event-stream", "Idempotency-Key": key };
      const body = JSON.stringify({ text: parts.map((part) => (part.type === "text" ? part.text : "")).join("") });
      return stream(key, id ? `/${id}` : "", { method: id ? "PUT" : "POST", headers, body, signal });
    },
    async reconnectToStream({ abortSignal: signal }) {
      const [key, id] = await getExchangeInProgress(url);
      return key ? stream(key, `/${id}/events`, { signal }) : null;
    },
  };
}
