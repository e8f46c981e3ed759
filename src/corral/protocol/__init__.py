"""The wire contract as types: frames, methods, events, errors. No I/O, no knowledge of a server.

The rest of the package treats this room as the single description of what goes over the
wire: dispatch, validation, the published JSON Schema and the reference pages come from here.
"""

PROTOCOL_VERSION = "1.0.0"
