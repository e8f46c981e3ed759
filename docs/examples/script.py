"""A script: ask, print the answer, and go on in the same session."""

import os
import sys

from corral.client import CorralSync, RunFailed

with CorralSync(os.environ["CORRAL_URL"], os.environ["CORRAL_TOKEN"]) as corral:
    try:
        first = corral.run("write: notes.txt :: Written by a script.")
        print(first.output)
        print(corral.run("read: notes.txt", session_id=first.session_id).output)
    except RunFailed as error:
        sys.exit(f"{error.code}: {error.message}")
