/** Uses the API with the SDK of hey-api. */

import * as api from "./generated/hey-api";
import { client } from "./generated/hey-api/client.gen";
import { API, check } from "./setup";

client.setConfig({ baseUrl: API });

const body: api.Credentials = { username: "hey-api", password: "correct horse" };
const { data: created } = await api.signup({ body, throwOnError: true });
const taken = await api.signup({ body });
check(taken.response?.status === 400 && taken.error?.error === "Username already exists", "a username is unique");
const early = await api.getCurrentUser();
check(early.response?.status === 401 && early.error?.error === "Login required", "a session is required");
await api.login({ body, throwOnError: true });
const { data: current } = await api.getCurrentUser({ throwOnError: true });
check(current.user.user_id === created.user_id, "the cookie is kept");

const { data: conversation } = await api.createConversation({ body: { name: "First conversation" }, throwOnError: true });
const path = { conversation_id: conversation.id };
const sent = await api.sendMessage({
  path,
  body: { text: "Hello" },
  headers: { "Idempotency-Key": "first" },
  throwOnError: true,
});
const [message, reply] = sent.data;
check(message.text === "Hello" && reply.sender === "bot" && reply.text !== "", "the bot replies");

const { data: accepted } = await api.sendMessage({
  path,
  body: { text: "Hello again" },
  headers: { Prefer: "respond-async" },
  throwOnError: true,
});
let exchange: api.Exchange | undefined;
let text = "";
const { stream } = await api.followReply({ path: { ...path, message_id: accepted[1].id } });
for await (const data of stream) {
  if (Array.isArray(data)) exchange = data;
  else if (typeof data === "object" && "text" in data) text += data.text;
  else check(false, `unexpected event: ${JSON.stringify(data)}`);
}
check(text !== "" && exchange?.[1].text === text && exchange[1].status === undefined, "the reply is streamed");

const { data: edited } = await api.editMessage({
  path: { ...path, message_id: accepted[0].id },
  body: { text: "Hello once more" },
  throwOnError: true,
});
check(edited[0].text === "Hello once more" && edited[1].text !== "", "an edited message is answered");
const { data: messages } = await api.listMessages({ path, query: { limit: 10 }, throwOnError: true });
check(messages.map(({ sender }) => sender).join() === "user,bot,user,bot", "the list has all messages");
const { data: found } = await api.searchMessages({ query: { q: "once more", limit: 1 }, throwOnError: true });
check(found[0]?.conversation.id === conversation.id, "the search finds the message");
const missing = await api.getConversation({ path: { conversation_id: 999999 } });
check(missing.response?.status === 404 && missing.error?.error === "Conversation not found", "404 has an error");

const deleted = await api.deleteConversation({ path, throwOnError: true });
check(deleted.response.status === 204, "the conversation is deleted");
await api.logout({ path: { user_id: created.user_id }, throwOnError: true });
check((await api.getCurrentUser()).response?.status === 401, "the session has ended");
