/** A page with one conversation, whose id is in the URL; opened without one, it begins a conversation as a new user. */

import { Chat, useChat } from "@ai-sdk/react";
import { type FormEvent, StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { ConversationTransport } from "./transport";

async function post(path: string, body: object) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(`/api/${path}`, { method: "POST", headers, body: JSON.stringify(body) });
  const json = await response.json();
  if (!response.ok) throw new Error(json.error);
  return json;
}

if (!location.hash) {
  const credentials = { username: crypto.randomUUID(), password: crypto.randomUUID() };
  await post("signup", credentials);
  await post("login", credentials);
  location.hash = (await post("conversations", { name: "A conversation" })).id;
}

const id = location.hash.slice(1);
const transport = new ConversationTransport();
const chat = new Chat({ id, messages: await transport.load(id), transport });

function Conversation() {
  const { messages, status, error, sendMessage, regenerate, stop } = useChat({ chat, resume: true });

  function submit(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    sendMessage({ text: `${new FormData(event.currentTarget).get("text")}` });
    event.currentTarget.reset();
  }

  function edit(messageId: string) {
    const text = prompt("The new text");
    if (text) sendMessage({ text, messageId });
  }

  return (
    <main>
      {messages.map(({ id, role, parts }) => (
        <p key={id} className={role}>
          {parts.map((part) => part.type === "text" && part.text)}
          {role === "user" && <button onClick={() => edit(id)}>Edit</button>}
        </p>
      ))}
      {error && <p role="alert">{error.message}</p>}
      <form onSubmit={submit}>
        <input name="text" aria-label="Message" required />
        <button>Send</button>
        <button type="button" onClick={stop}>
          Stop
        </button>
        <button type="button" onClick={() => regenerate()}>
          Regenerate
        </button>
      </form>
      <output>{status}</output>
    </main>
  );
}

createRoot(document.getElementById("root")!).render(
  <StrictMode>
    <Conversation />
  </StrictMode>,
);
