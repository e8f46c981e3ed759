"""End a run that takes too long."""

import asyncio
import os
import sys

from corral.client import Corral


async def main(url: str, token: str, text: str, seconds: float) -> None:
    async with Corral(url, token) as corral:
        run_id = None
        try:
            async with asyncio.timeout(seconds):
                async for event in corral.run(text):
                    if event.event == "agent.accepted":
                        run_id = event.payload.run_id
                    elif event.event == "agent.completed":
                        print(event.payload.output)
        except TimeoutError:
            # Leaving the loop leaves the run going: it belongs to the gateway, not to this connection.
            if run_id is not None:
                print("ended as", await corral.abort(run_id))


if __name__ == "__main__":
    asyncio.run(main(os.environ["CORRAL_URL"], os.environ["CORRAL_TOKEN"], sys.argv[1], float(sys.argv[2])))
