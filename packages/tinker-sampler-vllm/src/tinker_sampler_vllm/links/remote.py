"""An engine on another machine, which ``tinker-sampler-vllm serve`` keeps running there."""

from __future__ import annotations

from tinker_core.errors import ConfigurationError
from tinker_sampler_vllm.links.link import SocketLink
from tinker_sampler_vllm.protocol import ClaimCall


class RemoteLink(SocketLink):
    """A connection to an engine that outlives it."""

    @classmethod
    async def start(
        cls, name: str, address: str, secret: str, claim: ClaimCall, base_model: str, dtype: str
    ) -> RemoteLink:
        """Connect and take the engine over; raises why that cannot be."""
        link = cls(name)
        try:
            await link.connect(address, secret, claim)
            served = (link.description.base_model, link.description.dtype)
            if served != (base_model, dtype):
                raise ConfigurationError(f"{name} serves {served[0]!r} in {served[1]}, not {base_model!r} in {dtype}")
        except BaseException:
            await link.close()
            raise
        return link
