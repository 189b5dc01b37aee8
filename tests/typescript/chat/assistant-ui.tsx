/** A page with one conversation, with assistant-ui. */

import { useChat } from "@ai-sdk/react";
import {
  ActionBarPrimitive,
  type AppendMessage,
  AssistantRuntimeProvider,
  ComposerPrimitive,
  ErrorPrimitive,
  MessagePrimitive,
  ThreadPrimitive,
} from "@assistant-ui/react";
import { useAISDKRuntime } from "@assistant-ui/react-ai-sdk";
import type { CreateUIMessage, UIMessage } from "ai";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { chat } from "./chat";

/** Return the message to send; one that was edited keeps its id. */
function toCreateMessage<Message extends UIMessage>({ sourceId, content }: AppendMessage) {
  const parts = content.filter((part) => part.type === "text");
  return { ...(sourceId && { id: sourceId }), role: "user", parts } as CreateUIMessage<Message>;
}

function UserMessage() {
  return (
    <MessagePrimitive.Root className="user">
      <MessagePrimitive.Parts />
      <ActionBarPrimitive.Edit>Edit</ActionBarPrimitive.Edit>
    </MessagePrimitive.Root>
  );
}

function EditComposer() {
  return (
    <ComposerPrimitive.Root>
      <ComposerPrimitive.Input aria-label="New text" />
      <ComposerPrimitive.Send>Save</ComposerPrimitive.Send>
    </ComposerPrimitive.Root>
  );
}

function AssistantMessage() {
  return (
    <MessagePrimitive.Root>
      <div className="assistant">
        <MessagePrimitive.Parts />
      </div>
      <MessagePrimitive.Error>
        <ErrorPrimitive.Root>
          <ErrorPrimitive.Message />
        </ErrorPrimitive.Root>
      </MessagePrimitive.Error>
      <ActionBarPrimitive.Reload>Regenerate</ActionBarPrimitive.Reload>
    </MessagePrimitive.Root>
  );
}

function Page() {
  const helpers = useChat({ chat, resume: true });
  const runtime = useAISDKRuntime(helpers, { toCreateMessage });
  return (
    <AssistantRuntimeProvider runtime={runtime}>
      <ThreadPrimitive.Root>
        <ThreadPrimitive.Messages components={{ UserMessage, AssistantMessage, EditComposer }} />
        <ComposerPrimitive.Root>
          <ComposerPrimitive.Input aria-label="Message" />
          <ComposerPrimitive.Send>Send</ComposerPrimitive.Send>
          <ComposerPrimitive.Cancel>Stop</ComposerPrimitive.Cancel>
        </ComposerPrimitive.Root>
        <output>{helpers.status}</output>
      </ThreadPrimitive.Root>
    </AssistantRuntimeProvider>
  );
}

createRoot(document.getElementById("root")!).render(
  <StrictMode>
    <Page />
  </StrictMode>,
);
