"""Who gets at an engine: only those with its secret."""

from __future__ import annotations

import asyncio
import stat
import struct
import tempfile
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from tests.vllm_links.engines import claim_of, connected, free_address, make_sample, run, served
from tinker_core.encoding import Encoder
from tinker_core.errors import ConfigurationError, WorkerLostError
from tinker_sampler_vllm.links.link import HealthChecks, SocketLink
from tinker_sampler_vllm.protocol import CALL, MAX_CALL_BYTES, ClaimCall
from tinker_sampler_vllm.security import MIN_SECRET, create_secret, key_pair, read_secret

_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
"""How every ZeroMQ peer begins: signature, version, mechanism, role."""
_LARGE_COMMAND = 6


def test_a_server_with_another_secret_is_told_so_and_reaches_nothing():
    async def scenario():
        address = free_address()
        async with served(address) as engine, connected(address) as link:
            with pytest.raises(WorkerLostError, match="secret"):
                async with connected(address, secret="another one of enough characters"):
                    pass
            assert not engine.running
            assert (await link.sample(make_sample())).sequences

    run(scenario())


def test_whoever_knows_the_public_key_of_an_engine_needs_the_secret_all_the_same():
    async def scenario():
        address = free_address()
        async with served(address):
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                socket.curve_serverkey = key_pair("a secret of enough characters", "engine").public
                await _get_nowhere(socket, address)

    run(scenario())


def test_a_server_without_any_secret_reaches_nothing():
    async def scenario():
        address = free_address()
        async with served(address):
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                await _get_nowhere(socket, address)

    run(scenario())


async def _get_nowhere(socket, address):
    """Send a claim; the engine must end the handshake instead of answering."""
    refusals = (
        zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_DISCONNECTED
    )
    events = socket.get_monitor_socket(refusals)
    socket.connect(address)
    body = Encoder().encode(claim_of(), ClaimCall)
    # The refusal may come first, and then there is nobody to send to.
    claim = asyncio.ensure_future(socket.send_multipart([CALL, b"1", b"claim", body]))
    answer = asyncio.create_task(asyncio.wait_for(socket.recv_multipart(), 20))
    await events.recv_multipart()
    assert not answer.done()
    claim.cancel()
    answer.cancel()
    socket.disable_monitor()
    events.close()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), _GREETING, b"\xff" * 200])
def test_plain_connections_do_not_disturb_an_engine(sent):
    async def scenario():
        address = free_address()
        host, port = address.removeprefix("tcp://").split(":")
        async with served(address), connected(address) as link:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            await writer.drain()
            assert (await link.sample(make_sample())).sequences
            writer.close()
            assert (await link.sample(make_sample())).sequences

    run(scenario())


def test_a_stranger_who_claims_to_send_much_is_cut_off_before_the_first_byte_of_it():
    async def scenario():
        address = free_address()
        host, port = address.removeprefix("tcp://").split(":")
        async with served(address), connected(address) as link:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(_GREETING + struct.pack(">BQ", _LARGE_COMMAND, MAX_CALL_BYTES * 2))
            await writer.drain()
            await reader.read()  # until the engine ends the connection, which it would keep for much less
            writer.close()
            assert (await link.sample(make_sample())).sequences

    run(scenario())


def test_an_engine_does_not_listen_on_a_network_without_a_secret():
    async def scenario():
        with pytest.raises(ConfigurationError, match="needs a secret"):
            async with served(free_address(), secret=None):
                pass

    run(scenario())


def test_an_address_in_use_is_reported():
    async def scenario():
        address = free_address()
        async with served(address):
            with pytest.raises(ConfigurationError, match=f"cannot listen at {address}: Address already in use"):
                async with served(address):
                    pass

    run(scenario())


def test_a_private_directory_needs_no_secret():
    async def scenario():
        with tempfile.TemporaryDirectory() as directory:
            address = f"ipc://{directory}/engine"
            async with served(address, secret=None):
                link = SocketLink("engine", HealthChecks())
                try:
                    await link.connect(address, None, claim_of())
                    assert (await link.sample(make_sample())).sequences
                finally:
                    await link.close()

    run(scenario())


def test_a_new_secret_is_long_and_only_its_owner_may_read_it(tmp_path):
    path = tmp_path / "secret"
    create_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read_secret(path)) >= 2 * MIN_SECRET
    with pytest.raises(ConfigurationError, match="File exists"):
        create_secret(path)


def test_a_secret_that_is_missing_or_short_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read the secret"):
        read_secret(Path(tmp_path / "none"))
    (tmp_path / "short").write_text("1234")
    with pytest.raises(ConfigurationError, match="at least 16 characters"):
        read_secret(tmp_path / "short")


def test_keys_differ_by_side_and_secret_and_do_not_show_in_logs():
    pairs = [key_pair(secret, side) for secret in ("one" * 8, "two" * 8) for side in ("engine", "sampler")]
    assert len({pair.secret for pair in pairs}) == 4
    assert pairs[0] == key_pair("one" * 8, "engine")
    assert pairs[0].secret.decode() not in repr(pairs[0])
