"""Policies as they hold in tests of what decides."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.governance.policy import BUILT_IN, EffectivePolicy, Layer
from corral.protocol.types import PolicyDocument


def layered(**documents: dict[str, Any]) -> EffectivePolicy:
    """The built-in layer under these documents, which are named tenant, workspace and agent."""
    layers = [Layer(name="default", document=BUILT_IN)]
    for name in ("tenant", "workspace", "agent"):
        if name in documents:
            layers.append(Layer(name=name, document=msgspec.convert(documents[name], PolicyDocument)))
    return EffectivePolicy(layers)
