"""Params of every method, made from its type: right ones, and right ones with something changed.

What must hold: what the published schema refuses gets INVALID_REQUEST that names the field, what it takes
gets any answer but that something went wrong in the server; each answer and each event is of the published
schema; no error tells of the inside; and the server logs no error.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import jsonschema
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from corral.protocol.methods import METHODS, Method
from corral.protocol.schema import protocol_schema
from tests.fuzz.support import HOSTILE, LETTERS, VALUES, check_response, mutated, nothing_unexpected, valid
from tests.support.examples import examples
from tests.support.house import TOKEN, House
from tests.support.wire import rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = protocol_schema()

# What the schema does not say, and a server may still refuse by name: texts with a meaning of their own.
TIMES = st.one_of(
    st.sampled_from(
        [
            *("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.123456789+23:59", "0001-01-01T00:00:00Z", "2026-01-01"),
            *("9999-12-31T23:59:59-23:59", "2026-02-30T00:00:00Z", "2026-06-30T23:59:60Z", "now", "", "T", "0", "NaN"),
        ]
    ),
    LETTERS,
)
KNOWN: dict[str, list[str]] = {name: [] for name in ("sessionId", "runId", "approvalId", "toolCallId", "agentId")}


def known(name: str) -> st.SearchStrategy[str]:
    """Ids of what there is on the server, which the fixture fills in, and others."""
    return st.one_of(
        st.integers(0, 3).map(lambda place: (KNOWN[name] or ["none"])[place % max(1, len(KNOWN[name]))]), LETTERS
    )


CURSORS = st.one_of(
    LETTERS, st.sampled_from(["AAAA", "=", "eyJhIjoxfQ", "1", "A" * 1000, "%00", "AAAAAAAAAAAAAAAAAAAAAA"])
)
POOLS: dict[str, st.SearchStrategy[Any]] = {
    **{name: known(name) for name in KNOWN},
    "from": TIMES,
    "to": TIMES,
    "expiresAt": TIMES,
    "cursor": st.one_of(CURSORS, st.integers(1, 2**70)),
    "after": st.one_of(CURSORS, st.integers(0, 9)),
    "model": st.sampled_from(
        ["demo", "openai-chat:test", ":", "x:y", "anthropic:", "openai-chat:", "nope", "a:b:c", "\0"]
    ),
    "toolName": st.sampled_from(
        ["bash.exec", "process.exec", "file.read", "file.write", "http.request", "none", "*", ""]
    ),
    "workspaceId": st.sampled_from(["w_default"] * 5 + ["w_other", "", "\0"]),
    "tenantId": st.sampled_from(["t_default"] * 5 + ["t_other", ""]),
    "patch": st.one_of(
        VALUES.filter(lambda value: isinstance(value, dict)),
        st.dictionaries(
            st.sampled_from(["toolDefault", "highRisk", "tools", "rules", "models", "limits", "version", "bashMode"]),
            st.one_of(
                HOSTILE, st.sampled_from(["deny", "allow", None, {"file.read": "deny"}, {"perDay": {"steps": 5}}])
            ),
            max_size=3,
        ),
    ),
    "args": st.one_of(
        st.fixed_dictionaries(
            {},
            optional={
                "command": st.one_of(LETTERS, HOSTILE),
                "argv": st.one_of(st.lists(LETTERS, max_size=3), HOSTILE),
                "path": st.one_of(LETTERS, HOSTILE),
                "url": st.one_of(LETTERS.map(lambda text: f"http://{text}"), HOSTILE),
                "timeoutMs": HOSTILE,
            },
        ),
        VALUES.filter(lambda value: isinstance(value, dict)),
    ),
}
# Made to leave the server as it is: these would end the fuzzer's own access, or make runs by the hundred.
LEFT_OUT = {"tokens.revoke"}


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def things(home: House) -> AsyncIterator[None]:
    """One of everything on the server, so that ids lead somewhere."""
    async with await home.wire() as wire:
        await wire.effect("agents.upsert", agent={"id": "a_fuzz", "name": "for the fuzzer"})
        await wire.effect("policy.update", patch={"tools": {"file.list": "approval-required"}})
        waiting = await wire.effect("agent.run", input="go", sessionId="s_waits")
        asked = (await wire.event("approval.required", runId=waiting["runId"]))["payload"]
        made = await wire.effect("sessions.create", title="idle")
        KNOWN["sessionId"][:] = ["s_waits", made["session"]["id"]]
        KNOWN["runId"][:] = [waiting["runId"]]
        KNOWN["approvalId"][:] = [asked["approvalId"]]
        KNOWN["toolCallId"][:] = [asked["toolCallId"]]
        KNOWN["agentId"][:] = ["a_default", "a_fuzz"]
    yield
    for ids in KNOWN.values():
        ids.clear()


@cache
def validator(ref: str) -> jsonschema.Draft202012Validator:
    """Of one of the published schema's `$defs`."""
    return jsonschema.Draft202012Validator({"$ref": ref, "$defs": SCHEMA["$defs"]})


def errors(method: Method, params: Any) -> list[str]:
    """Where the published schema says no, as `$.params…`."""
    found: list[str] = []
    for error in validator(SCHEMA["methods"][method.name]["params"]["$ref"]).iter_errors(params):
        found.append(
            "$.params" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.absolute_path)
        )
    return found


def shortest(path: str) -> str:
    """The first field below `params`."""
    return re.match(r"\$\.params(\.\w+)?", path)[0]  # type: ignore[index]


def check(method: Method, params: Any, response: Any) -> None:
    wrong = errors(method, params) if isinstance(params, dict) else ["$.params"]
    code = None if response["ok"] else response["error"]["code"]
    assert code not in ("INTERNAL_ERROR", "METHOD_NOT_FOUND"), (method.name, params, response)
    check_response(response)
    if response["ok"]:
        result = SCHEMA["methods"][method.name]["result"]["$ref"]
        assert list(validator(result).iter_errors(response["payload"])) == [], (method.name, params, response)
    if wrong:
        assert code == "INVALID_REQUEST", (method.name, params, response, wrong)
        named = re.match(r"\$\.params[\w.\[\]…]*", response["error"]["message"])
        assert named is not None, (method.name, params, response)
        # The first that is wrong is named; which is the first, the two readers may see differently.
        fields = {shortest(path) for path in wrong}
        assert shortest(named[0]) in fields or "$.params" in fields, (method.name, params, response, wrong)


def params_of(name: str) -> st.SearchStrategy[Any]:
    """As often right ones as wrong ones."""
    strategy = valid(METHODS[name].params, POOLS)
    return st.one_of(strategy, mutated(strategy))


PARAMS = {name: params_of(name) for name in METHODS if name not in LEFT_OUT}
ANY_CALL = st.sampled_from(list(PARAMS)).flatmap(lambda name: st.tuples(st.just(name), PARAMS[name]))


@pytest.mark.parametrize("name", PARAMS)
@examples(12)
@given(data=st.data())
async def test_every_method_answers_whatever_its_params_are_and_names_what_is_wrong(
    home: House, caplog: pytest.LogCaptureFixture, name: str, data: st.DataObject
) -> None:
    asked = [data.draw(ANY_CALL), (name, data.draw(PARAMS[name]))]
    async with await home.wire(ordered=False) as wire:
        for called, drawn in asked:
            method = METHODS[called]
            params = [] if drawn is None else drawn  # none at all counts as {}
            if called == "sessions.delete":
                # A session made anew under the same id begins at version 1 again.
                for session in KNOWN["sessionId"]:
                    wire.forget_versions(session)
            if called == "connect":
                if isinstance(params, dict):
                    params.pop("auth", None)
                answer = await rpc(home.url, "connect", params, token=TOKEN)
                check(method, params, answer.response)
                continue
            check(method, params, await wire.call(called, params))
        for event in wire.events:
            assert list(validator("#/$defs/Event").iter_errors(event)) == [], event
            payload = SCHEMA["events"][event["event"]]["payload"]["$ref"]
            assert list(validator(payload).iter_errors(event["payload"])) == [], event
    nothing_unexpected(caplog)


async def test_the_fuzzer_knows_every_method() -> None:
    assert set(PARAMS) | LEFT_OUT == set(METHODS)
