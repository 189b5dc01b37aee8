/** A page with the user's conversations, with assistant-ui. The id of the one that is shown is in the page's URL. */

import { useChat } from "@ai-sdk/react";
import {
  ActionBarPrimitive,
  type AppendMessage,
  AssistantRuntimeProvider,
  ComposerPrimitive,
  MessagePrimitive,
  ThreadListItemPrimitive,
  ThreadListPrimitive,
  ThreadPrimitive,
  useAui,
  useAuiState,
  useRemoteThreadListRuntime,
} from "@assistant-ui/react";
import { useAISDKRuntime } from "@assistant-ui/react-ai-sdk";
import type { CreateUIMessage, UIMessage } from "ai";
import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { createChat, logIn } from "./chat";
import { threads } from "./threads";
import { Versions } from "./versions";

const chats = new Map<string, ReturnType<typeof createChat>>(); // by the thread's id in the page

/** Return the chat of the current thread. */
function useThreadChat() {
  const aui = useAui();
  const id = useAuiState(({ threadListItem }) => threadListItem.id);
  if (!chats.has(id)) {
    const item = aui.threadListItem();
    const create = async () => (await item.initialize()).remoteId;
    chats.set(id, createChat(() => item.getState().remoteId, create));
  }
  return chats.get(id)!;
}

/** Return the message to send; one that was edited keeps its id. */
function toCreateMessage<Message extends UIMessage>({ sourceId, content }: AppendMessage) {
  const parts = content.filter((part) => part.type === "text");
  return { ...(sourceId && { id: sourceId }), role: "user", parts } as CreateUIMessage<Message>;
}

function useThreadRuntime() {
  return useAISDKRuntime(useChat({ chat: useThreadChat().chat, resume: true }), { toCreateMessage });
}

function MessageVersions() {
  const { id, metadata } = useAuiState(({ message }) => message);
  return <Versions id={id} versions={metadata.custom.versions as number[]} show={useThreadChat().show} />;
}

function UserMessage() {
  return (
    <MessagePrimitive.Root>
      <div className="user">
        <MessagePrimitive.Parts />
      </div>
      <ActionBarPrimitive.Edit>Edit</ActionBarPrimitive.Edit>
      <MessageVersions />
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
  const error = useAuiState(({ message }) => message.metadata.custom.error as string | undefined);
  return (
    <MessagePrimitive.Root>
      <div className="assistant">
        <MessagePrimitive.Parts />
      </div>
      {error && <p role="alert">{error}</p>}
      <ActionBarPrimitive.Reload>Regenerate</ActionBarPrimitive.Reload>
      <MessageVersions />
    </MessagePrimitive.Root>
  );
}

function Thread() {
  const { error, status } = useChat({ chat: useThreadChat().chat });
  return (
    <ThreadPrimitive.Root className="thread">
      <ThreadPrimitive.Messages components={{ UserMessage, AssistantMessage, EditComposer }} />
      {error && <p role="alert">{error.message}</p>}
      <ComposerPrimitive.Root>
        <ComposerPrimitive.Input aria-label="Message" />
        <ComposerPrimitive.Send>Send</ComposerPrimitive.Send>
        <ComposerPrimitive.Cancel>Stop</ComposerPrimitive.Cancel>
      </ComposerPrimitive.Root>
      <output>{status}</output>
    </ThreadPrimitive.Root>
  );
}

function ThreadListItem() {
  const aui = useAui();
  const { title, status } = useAuiState(({ threadListItem }) => threadListItem);

  function rename() {
    const name = prompt("The new name", title);
    if (name) aui.threadListItem().rename(name);
  }

  return (
    <ThreadListItemPrimitive.Root className="item">
      <ThreadListItemPrimitive.Trigger className="title">
        <ThreadListItemPrimitive.Title fallback="New chat" />
      </ThreadListItemPrimitive.Trigger>
      <button onClick={rename}>Rename</button>
      {status === "archived" ? (
        <ThreadListItemPrimitive.Unarchive>Unarchive</ThreadListItemPrimitive.Unarchive>
      ) : (
        <ThreadListItemPrimitive.Archive>Archive</ThreadListItemPrimitive.Archive>
      )}
      <ThreadListItemPrimitive.Delete>Delete</ThreadListItemPrimitive.Delete>
    </ThreadListItemPrimitive.Root>
  );
}

function ThreadList() {
  return (
    <ThreadListPrimitive.Root className="threads">
      <ThreadListPrimitive.New>New chat</ThreadListPrimitive.New>
      <ThreadListPrimitive.Items components={{ ThreadListItem }} />
      <ThreadListPrimitive.LoadMore>More</ThreadListPrimitive.LoadMore>
      <details>
        <summary>Archive</summary>
        <ThreadListPrimitive.Items archived components={{ ThreadListItem }} />
      </details>
    </ThreadListPrimitive.Root>
  );
}

function Page() {
  const [threadId, setThreadId] = useState(location.hash.slice(1) || undefined);

  function onThreadIdChange(id?: string) {
    history.replaceState(null, "", `#${id ?? ""}`);
    setThreadId(id);
  }

  const runtimeHook = useThreadRuntime;
  const runtime = useRemoteThreadListRuntime({ runtimeHook, adapter: threads, threadId, onThreadIdChange });
  return (
    <AssistantRuntimeProvider runtime={runtime}>
      <ThreadList />
      <Thread />
    </AssistantRuntimeProvider>
  );
}

await logIn();
createRoot(document.getElementById("root")!).render(
  <StrictMode>
    <Page />
  </StrictMode>,
);
