"""Who decided what: the approvals in the audit log of the last day; and is the log whole?"""

import os
from datetime import UTC, datetime, timedelta

from corral.client import CorralSync

with CorralSync(os.environ["CORRAL_URL"], os.environ["CORRAL_TOKEN"]) as corral:
    since = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    params = {"from": since, "action": "approval.resolved"}
    while True:
        page = corral.request("audit.query", **params)
        for record in page["items"]:
            print(record["createdAt"], record["actor"], record["metadata"]["toolName"], record["metadata"]["status"])
        if "nextCursor" not in page:
            break
        params["cursor"] = page["nextCursor"]
    result = corral.request("audit.verify")
    print("whole" if result["ok"] else f"broken at record {result['brokenAt']}", result["checked"])
