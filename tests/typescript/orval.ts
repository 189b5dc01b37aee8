/** Uses the API with the fetch functions of orval. */

import * as api from "./generated/orval";
import { check } from "./setup";

const credentials: api.Credentials = { username: "orval", password: "correct horse" };
const created = await api.signup(credentials);
if (created.status !== 201) throw new Error(created.data.error);
const taken = await api.signup(credentials);
check(taken.status === 400 && taken.data.error === "Username already exists", "a username is unique");
const early = await api.getCurrentUser();
check(early.status === 401 && early.data.error === "Login required", "a session is required");
check((await api.login(credentials)).status === 200, "the user logs in");
const current = await api.getCurrentUser();
check(current.status === 200 && current.data.user.user_id === created.data.user_id, "the cookie is kept");

const opened = await api.createConversation({ name: "First conversation" });
if (opened.status !== 201) throw new Error(opened.data.error);
const conversationId = opened.data.id;
const sent = await api.sendMessage(conversationId, { text: "Hello" }, { headers: { "Idempotency-Key": "first" } });
if (sent.status !== 201) throw new Error("the message is not created");
const [message, reply] = sent.data;
check(message.text === "Hello" && reply.sender === "bot" && reply.text !== "", "the bot replies");

const headers = { Prefer: "respond-async" };
const accepted = await api.sendMessage(conversationId, { text: "Hello again" }, { headers });
if (accepted.status !== 202) throw new Error("the message is not accepted");
const events = await api.followReply(conversationId, accepted.data[1].id);
if (events.status !== 200 || typeof events.data !== "string") throw new Error("the events are not text");
check(events.data.startsWith("event: start\n") && events.data.includes("event: done\n"), "the reply is streamed");

const edited = await api.editMessage(conversationId, accepted.data[0].id, { text: "Hello once more" });
check(edited.status === 200 && edited.data[0].text === "Hello once more", "an edited message is answered");
const messages = await api.listMessages(conversationId, { limit: 10 });
if (messages.status !== 200) throw new Error("the messages cannot be read");
check(messages.data.map(({ sender }) => sender).join() === "user,bot,user,bot", "the list has all messages");
const found = await api.searchMessages({ q: "once more", limit: 1 });
check(found.status === 200 && found.data[0]?.conversation.id === conversationId, "the search finds the message");
const missing = await api.getConversation(999999);
check(missing.status === 404 && missing.data.error === "Conversation not found", "404 has an error");

check((await api.deleteConversation(conversationId)).status === 204, "the conversation is deleted");
check((await api.logout(created.data.user_id)).status === 200, "the user logs out");
check((await api.getCurrentUser()).status === 401, "the session has ended");
