"""Start a run and show its events as they come: text as it is written, tool calls, the end."""

import asyncio
import os
import sys

from corral.client import Corral


async def main(url: str, token: str, text: str) -> None:
    async with Corral(url, token) as corral:
        async for event in corral.run(text):
            match event.event:
                case "agent.delta":
                    print(event.payload.delta, end="", flush=True)
                case "agent.message":
                    print()
                case "agent.tool_call":
                    print("call:", event.payload.tool_name, event.payload.args)
                case "agent.tool_result":
                    print("result:", event.payload.status)
                case "agent.completed":
                    print("completed after", event.payload.steps, "steps")
                case "agent.failed":
                    print("failed:", event.payload.code, event.payload.message)


if __name__ == "__main__":
    asyncio.run(main(os.environ["CORRAL_URL"], os.environ["CORRAL_TOKEN"], sys.argv[1]))
