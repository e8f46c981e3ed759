"""What policy, grants and approvals say of one call, before it is recorded and again before it starts."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from corral.core.state import RunOptions, context_of, policy_of
from corral.executor.api import CallContext, ToolExecutor, ToolSpec
from corral.governance.approvals import Edited
from corral.governance.facts import CallFacts, facts_for
from corral.governance.policy import EffectivePolicy
from corral.protocol.canonical import canonical_hash
from corral.protocol.errors import InvalidRequest, NotFound, PolicyDenied
from corral.protocol.types import Risk
from corral.storage.repositories import Transaction
from corral.storage.rows import ApprovalRow, RunRow


def question(context: CallContext, run: RunRow, tool_name: str, risk: Risk, args: dict[str, Any]) -> CallFacts:
    """The call as policy sees it. Looks at the file system (links are resolved), so not on the event loop."""
    session = {"id": run.session_id, "agentId": run.agent_id, "runtimeMode": run.runtime_mode}
    return facts_for(tool_name, risk, args, session=session, actor=run.actor, root=context.root)


def args_hash(tool_name: str, args: dict[str, Any]) -> str:
    """What a decision is about: the tool and exactly these arguments."""
    return canonical_hash({"tool": tool_name, "args": args})


def binding_of(spec: ToolSpec, args: dict[str, Any], context: CallContext, policy: EffectivePolicy) -> str:
    """What an approval or a grant is bound to, besides its run: all that decides what a call does.

    The tool as it is (a new version of it is another tool), the arguments, the folder, the mode,
    and the profile of the sandbox. The environment is the sandbox's fixed list, part of the profile.
    """
    return canonical_hash(
        {
            # What a call does, not what becomes of one that was interrupted: `ask` may be set without
            # making void what people have decided.
            "tool": {
                "name": spec.name,
                "description": spec.description,
                "parameters": spec.parameters,
                "risk": spec.risk,
                "repeatable": spec.repeatable,
            },
            "args": args,
            "folder": str(context.root),
            "runtimeMode": context.runtime_mode,
            "bashMode": policy.bash_mode,
            "bashNetwork": policy.bash_network,
        }
    )


def _of_params(problem: str) -> str:
    """What is wrong with arguments, with its field named as the request has it."""
    if problem.startswith("$."):
        field, _, rest = problem.partition(": ")
        return f"$.params.args{field.removeprefix('$')}: {rest}"
    return f"$.params.args: {problem}"


class Rejudge:
    """Judges arguments that a person has edited, as if the model had sent them."""

    def __init__(self, executor: ToolExecutor, options: RunOptions) -> None:
        self._executor = executor
        self._options = options

    def __call__(self, tx: Transaction, row: ApprovalRow, args: dict[str, Any]) -> Edited:
        problem = self._executor.check(row.tool_name, args)
        spec = self._executor.spec(row.tool_name)
        if problem is not None or spec is None:
            raise InvalidRequest(_of_params(problem or "there is no such tool any more"))
        run = tx.runs.get(row.tenant_id, row.run_id)
        session = tx.sessions.get(row.tenant_id, row.session_id)
        if run is None or session is None:
            raise NotFound("the run of this approval is gone")
        policy = policy_of(tx, run)
        context = context_of(self._options, run, session, policy)
        verdict = policy.decide(question(context, run, row.tool_name, spec.risk, args))
        if verdict.decision == "deny":
            raise PolicyDenied(f"policy denies the edited call ({verdict.reason}); the approval is still pending")
        return Edited(args_hash=args_hash(row.tool_name, args), binding=binding_of(spec, args, context, policy))


def current(context: CallContext, policy: EffectivePolicy) -> CallContext:
    """The context with the sandbox profile that policy says now."""
    return structs.replace(context, bash_mode=policy.bash_mode, bash_network=policy.bash_network)


def four_eyes(tx: Transaction, row: ApprovalRow) -> bool:
    """Whether policy wants somebody else than who started the run to decide on this call."""
    run = tx.runs.get(row.tenant_id, row.run_id)
    return run is not None and policy_of(tx, run).four_eyes
