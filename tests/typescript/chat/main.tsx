/** A page with one conversation, with useChat of the AI SDK. */

import { useChat } from "@ai-sdk/react";
import { type FormEvent, StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { chat } from "./chat";

function Page() {
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
        <div key={id} className={role}>
          {parts.map((part) => part.type === "text" && part.text)}
          {role === "user" && <button onClick={() => edit(id)}>Edit</button>}
        </div>
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
    <Page />
  </StrictMode>,
);
