/** What the transport needs of the API: requests, and a reply in the chunks of the AI SDK. */

import type { UIMessageChunk } from "ai";
import { type EventSourceMessage, EventSourceParserStream } from "eventsource-parser/stream";

/** Return a response; throw its error. */
export async function request(url: string, init?: RequestInit): Promise<Response> {
  const response = await fetch(url, init);
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

/** Send JSON and return the response; throw its error. */
export function send(method: string, url: string, json: object, headers?: HeadersInit): Promise<Response> {
  const body = JSON.stringify(json);
  return request(url, { method, body, headers: { "Content-Type": "application/json", ...headers } });
}

/** Return the events of a reply as chunks of a message. */
export function readChunks({ body }: Response): ReadableStream<UIMessageChunk> {
  function transform({ event, data }: EventSourceMessage, output: TransformStreamDefaultController<UIMessageChunk>) {
    const value = JSON.parse(data);
    if (event === "start") {
      output.enqueue({ type: "start", messageId: `${value[1].id}` });
      output.enqueue({ type: "text-start", id: "text" });
    } else if (event === "delta") {
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
