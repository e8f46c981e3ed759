"""Schemathesis: requests made from the published OpenAPI document, right and wrong ones, and what comes back.

What must hold: an answer has a status, a content type and a body that the document names; a request that is
against the document is refused; no operation answers verbs that the document does not have.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
import schemathesis
from hypothesis import assume, given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from corral.gateway.openapi import openapi
from tests.fuzz.support import check_response, nothing_unexpected
from tests.support.examples import examples
from tests.support.house import TOKEN, House

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENT = openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [(verb, path) for path, verbs in DOCUMENT["paths"].items() for verb in verbs]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
VERBS = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}
# A page that is read answers HEAD, and what pages of other origins may call answers their preflight.
ALSO = {"/rpc": {"OPTIONS"}, "/v1/sessions/{sessionId}/events": {"OPTIONS"}}


def cases(verb: str, path: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
    return SCHEMA[path][verb.upper()].as_strategy(generation_mode=mode)


async def answered(home: House, case: Any) -> Any:
    """The answer, checked against the document."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    response = await asyncio.to_thread(case.call, base_url=home.url, headers=headers, timeout=100)
    case.validate_response(response, checks=CHECKS)
    return response


@pytest.mark.parametrize(("verb", "path"), OPERATIONS)
@examples(12)
@given(data=st.data())
async def test_a_request_by_the_document_is_answered_by_the_document(
    home: House, caplog: pytest.LogCaptureFixture, verb: str, path: str, data: st.DataObject
) -> None:
    response = await answered(home, data.draw(cases(verb, path, GenerationMode.POSITIVE)))
    if path == "/rpc":
        assert response.status_code == 200
        check_response(response.json()["response"])
    nothing_unexpected(caplog)


@examples(20)
@given(case=cases("post", "/rpc", GenerationMode.NEGATIVE))
async def test_a_request_against_the_document_is_refused(
    home: House, caplog: pytest.LogCaptureFixture, case: Any
) -> None:
    # With another token there is nothing of the frame that could be refused.
    assume("Authorization" not in (case.headers or {}))
    response = await answered(home, case)
    if response.status_code == 200:
        said = response.json()["response"]
        check_response(said)
        assert said["ok"] is False, case.body
    nothing_unexpected(caplog)


@pytest.mark.parametrize("path", DOCUMENT["paths"])
async def test_a_verb_that_the_document_does_not_have_gets_405_that_names_those_it_has(home: House, path: str) -> None:
    has = {verb.upper() for verb in DOCUMENT["paths"][path]} | ALSO.get(path, set())
    url = home.url + path.replace("{sessionId}", "s_none")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        for verb in sorted(VERBS - has):
            async with session.request(verb, url) as answer:
                assert answer.status == 405, verb
                assert has <= {each.strip() for each in answer.headers["Allow"].split(",")}
                body = json.loads(await answer.read())
                assert (body["response"] if path == "/rpc" else body)["error"]["code"] == "INVALID_REQUEST"
