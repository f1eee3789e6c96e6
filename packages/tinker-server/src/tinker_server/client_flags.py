"""What the server tells clients about how to use it: the answers of ``client/config`` and ``client/dynamic_config``."""

from __future__ import annotations

import attrs

from tinker_core.types import JsonObject

_BROKEN_TRANSPORT = frozenset({"0.22.0", "0.22.1"})
"""SDK releases whose default transport follows the redirect of an archive download and then cannot read it."""
_REFRESH_SECONDS = 300
"""How often clients look whether the dynamic part has changed; it never does while a server runs."""


@attrs.frozen(kw_only=True)
class ClientFlags:
    """What may differ between servers. Each field is the server's setting of that name.

    Whatever is not said keeps the client's own default; `docs/reference/http-api.md` says why.
    """

    retrieve_futures: bool = False
    """Clients wait for all samples of a sampling client in one poll, and no longer bound how many are in flight."""
    compress_uploads: bool = False
    """Clients compress the data that they send for training."""
    patient_samples: bool = False
    """Clients wait without end for samples that make no progress, and not two hours."""
    client_side_losses: bool = False
    """Clients compute custom losses themselves, in two passes, and do not send them to the server."""
    max_samples_in_flight: int = 2000
    """Samples that one sampling client has in progress at a time."""

    def config(self, sdk_version: str, *, issues_tokens: bool = False, runs_losses: bool = False) -> JsonObject:
        """SDK ``ClientConfigResponse``; the version counts only where a release is known to be broken.

        ``issues_tokens`` is whether clients exchange their API keys for tokens, ``runs_losses`` whether the trainers
        run custom losses.
        """
        answer: JsonObject = {
            "sample_join_sampling_session": True,
            "sample_max_concurrent_requests": self.max_samples_in_flight,
            "custom_loss_server_side": runs_losses and not self.client_side_losses,
        }
        if issues_tokens:
            answer["pjwt_auth_enabled"] = True
        if self.retrieve_futures:
            answer["sample_use_retrieve_futures"] = True
        if self.compress_uploads:
            answer["proto_compress_fwdbwd"] = True
        if self.patient_samples:
            answer["sample_enable_stuck_detection"] = False
        if sdk_version in _BROKEN_TRANSPORT:
            answer["use_pyqwest_transport"] = False
        return answer

    def dynamic_config(self) -> JsonObject:
        """SDK ``ClientDynamicConfigResponse``: samples that a client gives up are cancelled here, too."""
        return {"refresh_interval_sec": _REFRESH_SECONDS, "sample_cancel_enabled": True}


DEFAULT_FLAGS = ClientFlags()
"""What a server without flags tells."""
