/** What the transport needs of the API: requests, and a reply in the chunks of the AI SDK. */

import type { UIMessageChunk } from "ai";
import { type EventSourceMessage, EventSourceParserStream } from "eventsource-parser/stream";

/** Return a response; throw its error. */
export async function request(url: string, init?: RequestInit): Promise<Response> {
  const response = await fetch(url, init);
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

/** Return the ids of the last message of the user and of the reply to it if that is in progress, else nothing. */
export async function getExchangeInProgress(url: string): Promise<string[]> {
  const [question, reply] = await (await request(`${url}?limit=2`)).json();
  return reply?.status === "in_progress" ? [`${question.id}`, `${reply.id}`] : [];
}

/** Return the chunks of a streamed reply; call a function with the id of the user's message once there is text. */
export function readChunks({ body }: Response, onText: (id: string) => void): ReadableStream<UIMessageChunk> {
  let id: string;
  function transform({ event, data }: EventSourceMessage, output: TransformStreamDefaultController<UIMessageChunk>) {
    const value = JSON.parse(data);
    if (event === "start") {
      id = `${value[0].id}`;
      output.enqueue({ type: "start", messageId: `${value[1].id}` });
      output.enqueue({ type: "text-start", id: "text" });
    } else if (event === "delta") {
      onText(id);
      output.enqueue({ type: "text-delta", id: "text", delta: value.text });
    } else if (event === "done") {
      output.enqueue({ type: "text-end", id: "text" });
    } else {
      output.enqueue({ type: "error", errorText: value.error });
    }
  }
  const events = body!.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
  return events.pipeThrough(new TransformStream({ transform }));
}
