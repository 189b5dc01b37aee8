/** A page with one conversation, whose id is in its URL, with useChat of the AI SDK. */

import { useChat } from "@ai-sdk/react";
import { type FormEvent, StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { createChat, logIn } from "./chat";
import { send } from "./replies";
import { Versions } from "./versions";

await logIn();
if (!location.hash) location.hash = (await (await send("POST", "/api/conversations", { name: "A chat" })).json()).id;
const id = location.hash.slice(1);
const { chat, show } = createChat(
  () => id,
  async () => id,
);

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
      {messages.map(({ id, role, parts, metadata }) => (
        <div key={id} data-message-id={id}>
          <span className={role}>{parts.map((part) => part.type === "text" && part.text)}</span>
          {metadata?.error && <span role="alert">{metadata.error}</span>}
          {role === "user" && <button onClick={() => edit(id)}>Edit</button>}
          <Versions id={id} versions={metadata?.versions} show={show} />
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
