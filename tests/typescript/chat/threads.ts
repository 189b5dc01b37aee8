/** The thread list of assistant-ui: the user's conversations. */

import type { RemoteThreadListAdapter } from "@assistant-ui/react";
import { createAssistantStream } from "assistant-stream";
import { request, send } from "./replies";

type Conversation = { id: number; name: string; archived: boolean; updated_at: string };

const API = "/api/conversations";

function toThread({ id, name, archived, updated_at }: Conversation) {
  const status = archived ? ("archived" as const) : ("regular" as const);
  return { remoteId: `${id}`, title: name, status, lastMessageAt: new Date(updated_at) };
}

async function change(id: string, fields: object) {
  await send("PATCH", `${API}/${id}`, fields);
}

export const threads: RemoteThreadListAdapter = {
  async list({ after } = {}) {
    const response = await request(after ?? `${API}?order=recent&messages=0&limit=50`);
    const [, next] = response.headers.get("Link")?.match(/<(.+)>/) ?? [];
    return { threads: (await response.json()).map(toThread), nextCursor: next && API + next };
  },
  async fetch(id) {
    return toThread(await (await request(`${API}/${id}?messages=0`)).json());
  },
  async initialize() {
    const { id } = await (await send("POST", API, { name: "New chat" })).json();
    return { remoteId: `${id}` };
  },
  rename: (id, name) => change(id, { name }),
  archive: (id) => change(id, { archived: true }),
  unarchive: (id) => change(id, { archived: false }),
  async delete(id) {
    await request(`${API}/${id}`, { method: "DELETE" });
  },
  async generateTitle(id, messages) {
    // assistant-ui asks at once, when the message may not have arrived yet, and again after the reply.
    const isReplied = messages.some(({ role }) => role === "assistant");
    const title = isReplied ? (await (await send("POST", `${API}/${id}/title`, {})).json()).name : "";
    return createAssistantStream((controller) => controller.appendText(title));
  },
};
