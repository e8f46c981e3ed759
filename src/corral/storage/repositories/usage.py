"""What runs use up by the day, what is reserved of it, and what metrics are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import asdict
from sqlalchemy import (
    ColumnElement,
    Insert,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
)

from corral.storage import tables as t
from corral.storage.repositories._base import Repository, Upsert, bound, is_
from corral.storage.rows import ApprovalFact, RunFact, RunSums, UsageRow

HOUR_MS, DAY_MS = 3_600_000, 86_400_000

_d = t.usage_days.c
_v = t.reservations.c
_f = t.run_facts.c
_w = t.approval_facts.c
_h = t.run_hours.c
_k = t.run_hour_counts.c
_a = t.approvals.c
_r = t.runs.c


class _Adding(Upsert):
    """Insert rows; where the key of one is taken, add its other columns to that row's. Gives the columns `returning`.

    One statement for `rows` of them, no two with one key. The values of the first are bound as `v_<column>`,
    of the next as `v1_<column>` and so on.
    """

    def __init__(self, table: Table, *returning: ColumnElement[Any], rows: int = 1) -> None:
        self._returning = returning
        self._rows = rows
        super().__init__(table, replace=False)

    def _build(self, insert: Any) -> Insert:
        key = list(self._table.primary_key.columns)
        values = [
            {c.key: bindparam(f"v{number or ''}_{c.key}", type_=c.type) for c in self._table.c}
            for number in range(self._rows)
        ]
        sums = {c.key: c + insert.excluded[c.key] for c in self._table.c if not c.primary_key}
        built: Any = insert.values(values).on_conflict_do_update(index_elements=key, set_=sums)
        return built.returning(*self._returning) if self._returning else built  # type: ignore[no-any-return]


_ADD_DAYS = {rows: _Adding(t.usage_days, rows=rows) for rows in (1, 2, 3)}
_LOCK_DAY = _Adding(t.usage_days, _d.steps, _d.tokens, _d.cost_usd)
_HELD = select(
    func.coalesce(func.sum(_v.steps), 0),
    func.coalesce(func.sum(_v.tokens), 0),
    func.coalesce(func.sum(_v.cost_usd), 0.0),
).where(is_(_v.tenant_id), is_(_v.scope), is_(_v.day))
_RESERVE = insert(t.reservations).values({c.key: bindparam(f"v_{c.key}") for c in t.reservations.c})
_RELEASE = delete(t.reservations).where(is_(_v.tenant_id), is_(_v.run_id))
_RESERVED = (
    select(_v.scope, _v.day, _v.steps, _v.tokens, _v.cost_usd)
    .where(is_(_v.tenant_id), is_(_v.run_id))
    .order_by(_v.scope)
)
_OF_SESSION = select(
    func.coalesce(func.sum(_r.steps), 0),
    func.coalesce(func.sum(_r.input_tokens + _r.output_tokens), 0),
    func.coalesce(func.sum(_r.cost_usd), 0.0),
).where(is_(_r.tenant_id), is_(_r.session_id), _r.created_at >= bound("from", _r.created_at))


class Usage(Repository):
    """Counters of what is used up on a day within a scope, and the reservations of calls that are under way."""

    def add(self, tenant_id: str, *used: UsageRow) -> None:
        """Add to the counters of up to three scopes and days, each another."""
        values = [{"tenant_id": tenant_id, **asdict(row)} for row in used]
        _ADD_DAYS[len(used)].execute(self._connection, _numbered(values))

    def taken(self, tenant_id: str, scope: str, day: int) -> UsageRow:
        """What is used up and what is reserved, together.

        Takes the counter's row for this transaction: where several write at once, the others wait
        here, so that two of them never reserve the same rest.
        """
        none = _bound(UsageRow(scope=scope, day=day))
        used = _LOCK_DAY.execute(self._connection, {"v_tenant_id": tenant_id, **none}).one()
        held = self._connection.execute(_HELD, {"b_tenant_id": tenant_id, "b_scope": scope, "b_day": day}).one()
        steps, tokens, cost = (int(used[0] + held[0]), int(used[1] + held[1]), float(used[2] + held[2]))
        return UsageRow(scope=scope, day=day, steps=steps, tokens=tokens, cost_usd=cost)

    def of_session(self, tenant_id: str, session_id: str, day: int) -> UsageRow:
        """What the session's runs that were begun on the day or later have used up, each of them whole."""
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_from": day * DAY_MS}
        steps, tokens, cost = self._connection.execute(_OF_SESSION, values).one()
        return UsageRow(scope=f"session:{session_id}", day=day, steps=steps, tokens=tokens, cost_usd=cost)

    def reserve(self, tenant_id: str, run_id: str, need: UsageRow) -> None:
        """Set this aside for the run. Raises the driver's IntegrityError if the run has a reservation in the scope."""
        self._connection.execute(_RESERVE, {"v_tenant_id": tenant_id, "v_run_id": run_id, **_bound(need)})

    def release(self, tenant_id: str, run_id: str) -> None:
        """Let go of what is reserved for the run, if anything is."""
        self._connection.execute(_RELEASE, {"b_tenant_id": tenant_id, "b_run_id": run_id})

    def reserved(self, tenant_id: str, run_id: str) -> list[UsageRow]:
        """What is reserved for the run, by scope."""
        rows = self._connection.execute(_RESERVED, {"b_tenant_id": tenant_id, "b_run_id": run_id})
        return [UsageRow(scope=row[0], day=row[1], steps=row[2], tokens=row[3], cost_usd=row[4]) for row in rows]


def _numbered(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of several rows under the names by which `_Adding` binds them."""
    return {f"v{number or ''}_{name}": value for number, row in enumerate(rows) for name, value in row.items()}


def _bound(row: UsageRow) -> dict[str, Any]:
    return {f"v_{name}": value for name, value in asdict(row).items()}


_INSERT_FACT = insert(t.run_facts).values({c.key: bindparam(f"v_{c.key}") for c in t.run_facts.c})
_INSERT_DECISION = insert(t.approval_facts).values({c.key: bindparam(f"v_{c.key}") for c in t.approval_facts.c})
_ADD_HOUR = _Adding(t.run_hours)
_ADD_COUNTS = {rows: _Adding(t.run_hour_counts, rows=rows) for rows in (2, 3)}


def _of_agent(statement: Select[Any], column: ColumnElement[Any]) -> dict[bool, Select[Any]]:
    """The statement for all agents, and for one."""
    return {False: statement, True: statement.where(column + "" == bound("agent_id", column))}


def _period(column: ColumnElement[Any]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return column >= bound("from", column), column < bound("to", column)


def _sum(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(column), 0)


_SUMMED = RunSums.__struct_fields__
_HOURS_WHERE = (is_(_h.tenant_id), is_(_h.workspace_id), *_period(_h.hour))
_HOUR_SUMS = _of_agent(select(*(_sum(_h[name]) for name in _SUMMED)).where(*_HOURS_WHERE), _h.agent_id)
_HOUR_COUNTS = _of_agent(
    select(_k.name, func.sum(_k.count))
    .where(is_(_k.tenant_id), is_(_k.workspace_id), is_(_k.kind), *_period(_k.hour))
    .group_by(_k.name),
    _k.agent_id,
)
_FACTS_WHERE = (is_(_f.tenant_id), is_(_f.workspace_id), *_period(_f.finished_at))
_FACT_SUMS = _of_agent(
    select(
        *(_sum(case((_f.status == name, 1), else_=0)) for name in ("completed", "failed", "aborted")),
        *(_sum(_f[name]) for name in ("tool_calls", "tool_failures", "input_tokens", "output_tokens", "cost_usd")),
        func.count(_f.cost_usd),
    ).where(*_FACTS_WHERE),
    _f.agent_id,
)
_FACT_BUCKETS = _of_agent(select(_f.bucket, func.count()).where(*_FACTS_WHERE).group_by(_f.bucket), _f.agent_id)
_FACT_FAILURES = _of_agent(
    select(_f.code, func.count()).where(*_FACTS_WHERE, _f.status == "failed").group_by(_f.code), _f.agent_id
)
_LATENCIES = _of_agent(select(_f.latency_ms).where(*_FACTS_WHERE).order_by(_f.latency_ms), _f.agent_id)

# Counted and put in order by the database, which need not make objects of a hundred thousand rows.
_OF_PLACE = (is_(_w.tenant_id), is_(_w.workspace_id))
_DECIDED = (*_OF_PLACE, *_period(_w.resolved_at))
_BY_STATUS: list[ColumnElement[Any]] = [func.count(case((_w.status == name, 1))) for name in ("approved", "rejected")]
_DECISIONS = _of_agent(select(*_BY_STATUS).where(*_DECIDED), _w.agent_id)
_NTH_WAIT = select(_w.wait_ms).where(*_OF_PLACE).limit(1).offset(bindparam("b_shorter"))
# Those of the period, sorted: the planner would rather go along all waits that there are.
_WAIT = _of_agent(_NTH_WAIT.where(*_period(_w.resolved_at)).order_by(_w.wait_ms + 0), _w.agent_id)
# Along all waits in their order, passing over those of other times: nothing is to be sorted.
_WAIT_OF_MANY = _of_agent(_NTH_WAIT.where(*_period(_w.resolved_at + 0)).order_by(_w.wait_ms), _w.agent_id)
_MANY = 10_000

_OF_RUN = (_r.tenant_id == _a.tenant_id) & (_r.id == _a.run_id)
_WAITING = select(func.count()).select_from(t.approvals).where(is_(_a.tenant_id), is_(_a.workspace_id), is_(_a.status))
_PENDING = {
    False: _WAITING,
    True: _WAITING.join(t.runs, _OF_RUN).where(_r.agent_id + "" == bound("agent_id", _r.id)),
}


class Metrics(Repository):
    """Runs that have ended: each one's facts, and the sums of each hour (hours since the epoch). And what
    people decided."""

    def add(self, fact: RunFact) -> None:
        """Keep the facts of a run that ends and add them to its hour. Raises the driver's IntegrityError
        if they are kept already."""
        self._fact(fact)
        hour: dict[str, Any] = {
            "tenant_id": fact.tenant_id,
            "workspace_id": fact.workspace_id,
            "agent_id": fact.agent_id,
            "hour": fact.finished_at // HOUR_MS,
        }
        sums = RunSums(
            completed=int(fact.status == "completed"),
            failed=int(fact.status == "failed"),
            aborted=int(fact.status == "aborted"),
            tool_calls=fact.tool_calls,
            tool_failures=fact.tool_failures,
            input_tokens=fact.input_tokens,
            output_tokens=fact.output_tokens,
            cost_usd=fact.cost_usd or 0.0,
            priced=int(fact.cost_usd is not None),
        )
        _ADD_HOUR.execute(self._connection, _numbered([hour | asdict(sums)]))
        one = {**hour, "count": 1}
        name, day = str(fact.bucket), fact.finished_at // DAY_MS
        counts = [{**one, "kind": "latency", "name": name}, {**one, "kind": "latency-day", "hour": day, "name": name}]
        if fact.status == "failed":
            counts.append({**one, "kind": "failure", "name": fact.code})
        _ADD_COUNTS[len(counts)].execute(self._connection, _numbered(counts))

    def _fact(self, fact: RunFact) -> None:
        self._connection.execute(_INSERT_FACT, {f"v_{name}": value for name, value in asdict(fact).items()})

    def decided(self, fact: ApprovalFact) -> None:
        """Keep what a person decided. Raises the driver's IntegrityError if it is kept already."""
        self._connection.execute(_INSERT_DECISION, {f"v_{name}": value for name, value in asdict(fact).items()})

    def hours(self, tenant_id: str, workspace_id: str, agent_id: str | None, from_hour: int, to_hour: int) -> RunSums:
        """The runs that ended in these hours (`to_hour` excluded), added up."""
        return self._sums(_HOUR_SUMS, _values(tenant_id, workspace_id, agent_id, from_hour, to_hour))

    def hour_counts(
        self, tenant_id: str, workspace_id: str, agent_id: str | None, from_hour: int, to_hour: int, kind: str
    ) -> dict[str, int]:
        """How many of those runs by bucket (`kind` latency, a number as text) or by code (`kind` failure).

        With the kind latency-day the two numbers are days instead of hours.
        """
        values = _values(tenant_id, workspace_id, agent_id, from_hour, to_hour) | {"b_kind": kind}
        return {row[0]: int(row[1]) for row in self._connection.execute(_HOUR_COUNTS[agent_id is not None], values)}

    def facts(self, tenant_id: str, workspace_id: str, agent_id: str | None, from_ms: int, to_ms: int) -> RunSums:
        """The runs with `from_ms` <= `finished_at` < `to_ms`, added up one by one."""
        return self._sums(_FACT_SUMS, _values(tenant_id, workspace_id, agent_id, from_ms, to_ms))

    def fact_buckets(
        self, tenant_id: str, workspace_id: str, agent_id: str | None, from_ms: int, to_ms: int
    ) -> dict[int, int]:
        """How many of those runs by bucket of latency."""
        values = _values(tenant_id, workspace_id, agent_id, from_ms, to_ms)
        return {row[0]: row[1] for row in self._connection.execute(_FACT_BUCKETS[agent_id is not None], values)}

    def fact_failures(
        self, tenant_id: str, workspace_id: str, agent_id: str | None, from_ms: int, to_ms: int
    ) -> dict[str, int]:
        """How many of those runs failed, by code."""
        values = _values(tenant_id, workspace_id, agent_id, from_ms, to_ms)
        return {row[0]: row[1] for row in self._connection.execute(_FACT_FAILURES[agent_id is not None], values)}

    def latencies(
        self, tenant_id: str, workspace_id: str, agent_id: str | None, from_ms: int, to_ms: int
    ) -> Sequence[int]:
        """The latency of each of those runs, ascending."""
        values = _values(tenant_id, workspace_id, agent_id, from_ms, to_ms)
        return list(self._connection.execute(_LATENCIES[agent_id is not None], values).scalars())

    def decisions(
        self, tenant_id: str, workspace_id: str, agent_id: str | None, from_ms: int, to_ms: int
    ) -> tuple[int, int]:
        """How many calls people approved, and how many they rejected, with `from_ms` <= `resolved_at` < `to_ms`."""
        values = _values(tenant_id, workspace_id, agent_id, from_ms, to_ms)
        approved, rejected = self._connection.execute(_DECISIONS[agent_id is not None], values).one()
        return approved, rejected

    def wait(
        self, tenant_id: str, workspace_id: str, agent_id: str | None, from_ms: int, to_ms: int, rank: int
    ) -> int | None:
        """The wait for one of those decisions: the shortest is of rank 1. None if there are not so many."""
        values = _values(tenant_id, workspace_id, agent_id, from_ms, to_ms) | {"b_shorter": rank - 1}
        statements = _WAIT_OF_MANY if rank > _MANY else _WAIT
        wait: int | None = self._connection.execute(statements[agent_id is not None], values).scalar_one_or_none()
        return wait

    def pending(self, tenant_id: str, workspace_id: str, agent_id: str | None) -> int:
        """How many approvals wait for a person now."""
        values = _values(tenant_id, workspace_id, agent_id, 0, 0) | {"b_status": "pending"}
        count: int = self._connection.execute(_PENDING[agent_id is not None], values).scalar_one()
        return count

    def _sums(self, statements: dict[bool, Select[Any]], values: dict[str, Any]) -> RunSums:
        row = self._connection.execute(statements["b_agent_id" in values], values).one()
        return RunSums(**dict(zip(_SUMMED, row, strict=True)))


def _values(tenant_id: str, workspace_id: str, agent_id: str | None, from_: int, to: int) -> dict[str, Any]:
    values = {"b_tenant_id": tenant_id, "b_workspace_id": workspace_id, "b_from": from_, "b_to": to}
    return values if agent_id is None else {**values, "b_agent_id": agent_id}
