"""Decide on the calls that wait for a person: let `git status` through, refuse the rest."""

import os

from corral.client import CorralSync
from corral.protocol.errors import Conflict

with CorralSync(os.environ["CORRAL_URL"], os.environ["CORRAL_TOKEN"]) as corral:
    for item in corral.request("approval.queue")["items"]:
        harmless = item["toolName"] == "bash.exec" and item["args"] == {"command": "git status"}
        try:
            answer = corral.request(
                "approval.resolve",
                approvalId=item["approvalId"],
                decision="approve" if harmless else "reject",
                comment="decided by approve.py",
            )
            print(item["toolName"], item["args"], answer["status"])
        except Conflict as error:
            print(item["toolName"], "was decided by somebody else:", error.details)
