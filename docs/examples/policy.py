"""Put a policy file into a layer, unless somebody else changes it meanwhile, and ask what it does to a call."""

import json
import os
import sys
from pathlib import Path

from corral.client import CorralSync

with CorralSync(os.environ["CORRAL_URL"], os.environ["CORRAL_TOKEN"]) as corral:
    standing = corral.request("policy.get", layer="workspace")["policy"]
    patch = json.loads(Path(sys.argv[1]).read_text())
    made = corral.request("policy.update", layer="workspace", patch=patch, expectedVersion=standing["version"])
    print("version", made["version"])
    for command in sys.argv[2:]:
        answer = corral.request("policy.explain", toolName="bash.exec", args={"command": command})
        print(f"{answer['decision']}: {command} ({answer['reason']})")
