"""What the program's streams are measured against: FastAPI, uvicorn and the openai package, relaying a model's reply.

It stores nothing and knows no users.
"""

import json
import os

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI

app = FastAPI()
client = AsyncOpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="none")


@app.get("/api/test")
async def test():
    return {"message": "Server is running"}


@app.post("/messages")
async def send_message(request: Request):
    text = (await request.json())["text"]
    return StreamingResponse(stream_reply(text), media_type="text/event-stream")


async def stream_reply(text):
    """Yield the chunks of a reply as server-sent events."""
    messages = [{"role": "user", "content": text}]
    async for chunk in await client.chat.completions.create(model="tiny", messages=messages, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            yield f"event: delta\ndata: {json.dumps({'text': chunk.choices[0].delta.content})}\n\n"
